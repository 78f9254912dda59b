# SPDX-License-Identifier: Apache-2.0
"""Serve the memory of a node's guests to their destinations.

    python -m services.page_server --listen 127.0.0.1:7443 --control 127.0.0.1:7444 --images-dir DIR

One process per node, without state of its own: what it serves is in the image records of the fault
agent beside it, so that it can be killed and started again at any time. Until a destination has
every page, the memory behind a frozen image is the only copy of part of a guest, so SIGTERM means
"take no new migration and finish the ones you have", not "exit".

When it answers it prints one line on stdout: `listening page=ADDRESS control=ADDRESS
metrics=ADDRESS`. Exit status: 0 drained; 2 bad configuration; 3 the drain deadline passed while
destinations still read (each image is logged; start it again at once); 1 a bug.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common import grpc_server, health, hooks, lifecycle, metrics
from services.common.errors import GodwitError, UnavailableError
from services.common.lifecycle import ExitStatus
from services.common.listen import INSECURE_FLAG, Address, parse_listen
from services.common.peer_tls import add_tls_option, open_certificates
from services.common.privileges import capabilities
from services.common.privileges.capabilities import Capability
from services.common.privileges.option import add_sandbox_option
from services.page_server.collector import ServeCollector
from services.page_server.confinement import Confinement
from services.page_server.images import ImageTable, this_boot_id
from services.page_server.servicer import ImageAdminServicer
from services.pagecore.api import PageCore, PageServer, SandboxMode, TlsIdentity

log = logging.getLogger(__name__)

PROGRAM = "page_server"
DEFAULT_RAM_DIRS = (Path("/dev/shm"),)  # noqa: S108 - guest memory has to be tmpfs
DRAIN_POLL_S = 0.05
DRAIN_REPORT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the process is told from outside, already checked."""

    listen: Address
    """Of the native PageService."""
    control: Address
    """Of ImageAdminService and health, for the agent of this node."""
    metrics: Address
    images_dir: Path
    """The agent's image records. Made if it is not there."""
    drain_s: float
    """How long SIGTERM waits for migrations in progress. Seconds, > 0."""
    connection_count_max: int
    """Of the native listener. 1..1024."""
    ram_dirs: tuple[Path, ...] = DEFAULT_RAM_DIRS
    """Where guest memory lies. Nothing outside is opened, but for what is served at the start."""
    sandbox: SandboxMode = SandboxMode.ENFORCE
    tls_dir: Path | None = None
    """Certificates of this node; None: plaintext."""

    @classmethod
    def from_argv(cls, argv: Sequence[str]) -> Config:
        """Parse and check the command line; exits with BAD_CONFIG on any error."""
        parser = argparse.ArgumentParser(
            prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--listen", required=True, metavar="HOST:PORT")
        parser.add_argument("--control", required=True, metavar="HOST:PORT")
        parser.add_argument("--metrics", default="127.0.0.1:0", metavar="HOST:PORT")
        parser.add_argument("--images-dir", required=True, type=Path, metavar="DIR")
        parser.add_argument(
            "--ram-dir",
            action="append",
            type=Path,
            metavar="DIR",
            help="the agent's; repeat it; it must be there (default: /dev/shm)",
        )
        add_sandbox_option(parser)
        parser.add_argument("--drain-s", type=float, default=600.0, metavar="SECONDS")
        parser.add_argument("--connections-max", type=int, default=64, metavar="N")
        parser.add_argument(INSECURE_FLAG, action="store_true", dest="insecure_plaintext")
        add_tls_option(parser)
        args = parser.parse_args(argv)
        if not args.drain_s > 0:
            parser.error(f"--drain-s must be > 0, got {args.drain_s}")
        for ram_dir in args.ram_dir or ():
            if not ram_dir.is_dir():
                parser.error(f"--ram-dir {ram_dir} is no directory")
        if not 1 <= args.connections_max <= 1024:
            parser.error(f"--connections-max must be 1..1024, got {args.connections_max}")
        try:
            insecure, tls = bool(args.insecure_plaintext), args.tls_dir is not None
            listen, control = (
                parse_listen(text, insecure_plaintext=insecure, tls=tls)
                for text in (args.listen, args.control)
            )
            metrics_address = parse_listen(args.metrics, insecure_plaintext=insecure)
        except GodwitError as error:
            parser.error(str(error))
        return cls(
            listen=listen,
            control=control,
            metrics=metrics_address,
            images_dir=args.images_dir,
            drain_s=args.drain_s,
            connection_count_max=args.connections_max,
            ram_dirs=tuple(path.resolve() for path in args.ram_dir or DEFAULT_RAM_DIRS),
            sandbox=args.sandbox,
            tls_dir=args.tls_dir,
        )

    def confinement(self) -> Confinement:
        """What this process is left with while it serves."""
        # Certificates are read again while it serves.
        return Confinement(
            images_dir=self.images_dir,
            ram_dirs=self.ram_dirs,
            mode=self.sandbox,
            further=() if self.tls_dir is None else (self.tls_dir,),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A page server that answers."""

    server: PageServer
    images: ImageTable
    health: health.Health
    page: Address
    control: Address
    metrics: Address


def _bind(core: PageCore, config: Config, identity: TlsIdentity | None) -> PageServer:
    try:
        return core.create_page_server(
            host=config.listen.host,
            port=config.listen.port,
            connection_count_max=config.connection_count_max,
            tls=identity,
        )
    except OSError as error:
        raise UnavailableError(
            "LISTEN_FAILED",
            f"cannot bind {config.listen}: {error}",
            hint="is another process listening there?",
        ) from error


@contextlib.asynccontextmanager
async def serving(
    config: Config, core: PageCore, confinement: Confinement | None = None
) -> AsyncIterator[Serving]:
    """Serve for the length of the block.

    Order: the port is bound, the records are read, and only then is anybody answered. A
    destination that has waited for our return must not be told that its image is unknown.
    In between the process is confined, if it is to be: what was served before a restart is open by
    then, so that no mistake of a configuration keeps it from a guest that waits.

    Raises:
        UnavailableError: LISTEN_FAILED, IMAGES_DIR_UNREADABLE.
        FailedPreconditionError: CERTIFICATE_UNREADABLE, CERTIFICATE_OF_ANOTHER.
    """
    registry = metrics.new_registry()
    certificates = open_certificates(config.tls_dir)
    async with contextlib.AsyncExitStack() as stack:
        identity = None
        if certificates is not None:
            from services.common.certificates import Kind
            from services.common.tls_metrics import TlsCollector, open_identity

            certificates.require(Kind.NODE)
            identity = stack.enter_context(contextlib.closing(open_identity(core, certificates)))
            certificates.on_change(identity.reload)
            # The agent of this node has the same key, and is known by it after the end of dates.
            ours = certificates
            ours.pinned_callers = lambda: tuple(filter(None, (ours.own_pin(),)))
            registry.register(TlsCollector(certificates, identity))
            await stack.enter_async_context(certificates.kept())
        server = stack.enter_context(contextlib.closing(_bind(core, config, identity)))
        page = Address(host=config.listen.host, port=server.port)
        try:
            config.images_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnavailableError("IMAGES_DIR_UNREADABLE", str(error)) from error
        images = ImageTable(server, config.images_dir, boot_id=this_boot_id())
        with contextlib.closing(images):
            images.reload()
            if confinement is not None:
                images.open_ram = confinement.enter(core)
            registry.register(ServeCollector(server, images))
            await hooks.reach("page_server.start")
            server.start()
            admin = ImageAdminServicer(images, page).service()
            async with (
                grpc_server.serving(config.control, [admin], certificates=certificates) as control,
                metrics.serving(registry, config.metrics) as metrics_address,
            ):
                yield Serving(
                    server=server,
                    images=images,
                    health=control.health,
                    page=page,
                    control=control.address,
                    metrics=metrics_address,
                )


async def drain(running: Serving, drain_s: float) -> ExitStatus:
    """Take nothing new and wait until no destination reads a frozen image.

    Streams on LIVE images do not count: their guest runs here and needs nobody's page.
    """
    # Readiness goes first, so that nothing new is routed here.
    await running.health.drain()
    running.server.drain()
    deadline = time.monotonic() + drain_s
    report_at = time.monotonic()
    while needed := running.images.needed_by():
        now = time.monotonic()
        if now >= deadline:
            for image_id, count in needed.items():
                log.error("drain deadline passed: image %s has %d streams open", image_id, count)
            return ExitStatus.GUESTS_DEPEND
        if now >= report_at:
            report_at = now + DRAIN_REPORT_S
            log.info("draining: %s still read", ", ".join(sorted(needed)))
        await hooks.reach("page_server.draining")
        await asyncio.sleep(DRAIN_POLL_S)  # the core counts streams; it has no event for the last
    log.info("drained")
    return ExitStatus.OK


async def run(config: Config, core: PageCore) -> ExitStatus:
    """Serve until SIGTERM or SIGINT, then drain."""
    with lifecycle.stop_on_signal() as stop:
        async with serving(config, core, config.confinement()) as running:
            print(  # noqa: T201 - the supervisor and the tests read it
                f"listening page={running.page} control={running.control}"
                f" metrics={running.metrics}",
                flush=True,
            )
            lifecycle.spare_collector()
            await stop.wait()
            return await drain(running, config.drain_s)


def _capabilities(config: Config) -> list[Capability]:
    """What is kept: nothing. What it reads belongs to its own user or group."""
    ports = (config.listen.port, config.control.port, config.metrics.port)
    return [Capability.NET_BIND_SERVICE] if any(0 < port < 1024 for port in ports) else []


def main(argv: Sequence[str] | None = None) -> ExitStatus:
    """Entry point of the container image and of `godwit page-server`."""
    config = Config.from_argv(sys.argv[1:] if argv is None else argv)
    capabilities.keep_only(_capabilities(config))
    hooks.hold_gil_on_signal()
    # After the command line is known to be good: it loads the native module.
    from services.pagecore.native import NativePageCore

    return lifecycle.run(PROGRAM, lambda: run(config, NativePageCore()))
