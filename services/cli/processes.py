# SPDX-License-Identifier: Apache-2.0
"""`godwit page-server`, `fault-agent`, `orchestrator` and what stands beside them: become that."""

from __future__ import annotations

import os
import sys

import typer

PASS_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}
"""Every argument, --help too, is the service's business."""


def page_server(ctx: typer.Context) -> None:
    """Serve guest memory of this node; all arguments are the service's own, --help too."""
    _become("services.page_server", ctx.args)


def fault_agent(ctx: typer.Context) -> None:
    """Run this node's agent; all arguments are the service's own, --help too."""
    _become("services.fault_agent", ctx.args)


def orchestrator(ctx: typer.Context) -> None:
    """Run the orchestrator; all arguments are the service's own, --help too."""
    _become("services.orchestrator", ctx.args)


def node_keeper(ctx: typer.Context) -> None:
    """Tell the cluster what depends on this node, keep its certificates."""
    _become("services.node_keeper", ctx.args)


def node_wait(ctx: typer.Context) -> None:
    """Wait until no guest depends on this node."""
    _become("services.node_keeper.wait", ctx.args)


def device_plugin(ctx: typer.Context) -> None:
    """Offer /dev/kvm and /dev/userfaultfd to pods: a kubelet device plugin."""
    _become("services.device_plugin", ctx.args)


def _become(module: str, arguments: list[str]) -> None:
    """Replace this process: signals and the exit status are the service's, without a go-between."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - no shell
