# SPDX-License-Identifier: Apache-2.0
"""The `godwit` command.

Modules that take long to import (the HTTP client, rich, the demo) are imported by the commands that
need them: `godwit --help` and shell completion answer at once.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from services.cli import (
    bitmap,
    certs,
    demo,
    migrations,
    nodes,
    operations,
    processes,
    rescue,
    schedule,
    simulate,
    store,
    tokens,
    top,
    vms,
)
from services.cli.exit_status import ExitStatus, of_http
from services.cli.session import (
    ENV_URL,
    Options,
    OutputOption,
    TlsDirOption,
    TokenFileOption,
    TokenOption,
    UrlOption,
)

_EPILOG = """\
Exit status: 0 done · 1 bug · 2 wrong usage · 3 refused · 4 not found · 5 unreachable ·
6 the migration or operation did not succeed (demo, simulate: the verdict is not ok) ·
130 interrupted.
"""

app = typer.Typer(
    name="godwit",
    help="Move running VMs between the nodes of a fleet by post-copy live migration.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would cost a third of the start
)
app.command()(nodes.nodes)
app.command()(nodes.idle)
app.add_typer(vms.app, name="vms")
app.command()(migrations.migrate)
app.add_typer(migrations.app, name="migrations")
app.command()(operations.drain)
app.command()(operations.undrain)
app.command()(operations.rebalance)
app.command()(operations.batch)
app.command()(operations.plan)
app.add_typer(operations.app, name="operations")
app.add_typer(schedule.queue_app, name="queue")
app.add_typer(schedule.limits_app, name="limits")
app.add_typer(schedule.policy_app, name="policy")
app.add_typer(schedule.place_app, name="place")
app.command()(top.top)
app.command()(bitmap.bitmap)
app.command()(rescue.recover)
app.command()(rescue.abandon)
app.command("break-glass")(rescue.break_glass)
app.add_typer(store.app, name="store")
app.add_typer(certs.app, name="certs")
app.add_typer(tokens.app, name="tokens")
app.command()(demo.demo)
app.command()(simulate.simulate)
app.command("page-server", context_settings=processes.PASS_ON)(processes.page_server)
app.command("fault-agent", context_settings=processes.PASS_ON)(processes.fault_agent)
app.command("orchestrator", context_settings=processes.PASS_ON)(processes.orchestrator)
app.command("node-keeper", context_settings=processes.PASS_ON)(processes.node_keeper)
app.command("node-wait", context_settings=processes.PASS_ON)(processes.node_wait)
app.command("device-plugin", context_settings=processes.PASS_ON)(processes.device_plugin)


@app.callback()
def root(
    ctx: typer.Context,
    output: OutputOption = None,
    orchestrator: UrlOption = None,
    tls_dir: TlsDirOption = None,
    token: TokenOption = None,
    token_file: TokenFileOption = None,
) -> None:
    """Move running VMs between the nodes of a fleet by post-copy live migration."""
    options = ctx.ensure_object(Options)
    options.override(output, orchestrator)
    options.tls_dir = tls_dir
    options.token, options.token_file = token, token_file


def main() -> NoReturn:
    """Run the command of sys.argv; the exit status is an ExitStatus."""
    try:
        app()
    except SystemExit:
        raise
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not complain at exit either.
        sys.stderr.close()
        sys.exit(ExitStatus.OK)
    except Exception as error:
        status = _explain(error)
        if status is None:
            raise
        sys.exit(status)
    sys.exit(ExitStatus.OK)


def _explain(error: Exception) -> ExitStatus | None:
    """Say what is wrong and what to do on stderr; None: nobody foresaw this one."""
    from godwit.errors import GodwitApiError, GodwitClientError, GodwitConnectionError

    if isinstance(error, GodwitApiError):
        unsaid = {key: value for key, value in error.metadata.items() if value not in error.detail}
        names = "".join(f", {key} {value}" for key, value in unsaid.items())
        _complain(f"{error.reason}: {error.detail}{names}", error.hint)
        return of_http(error.status)
    if isinstance(error, GodwitConnectionError):
        hint = f"is `godwit orchestrator` running there? See --orchestrator, {ENV_URL}"
        _complain(str(error), hint)
        return ExitStatus.UNREACHABLE
    if isinstance(error, GodwitClientError):
        _complain(str(error), "")
        return ExitStatus.USAGE
    from services.common.errors import GodwitError

    if not isinstance(error, GodwitError):
        return None
    _complain(f"{error.reason}: {error.message}", error.hint)
    return of_http(error.http_status)


def _complain(what: str, hint: str) -> None:
    print(f"godwit: {what}", file=sys.stderr)
    if hint:
        print(f"  {hint}", file=sys.stderr)


if __name__ == "__main__":
    main()
