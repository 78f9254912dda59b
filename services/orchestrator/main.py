# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's process: REST and gRPC over one service layer over one store."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from services.common import grpc_server, lifecycle
from services.common.errors import InvalidArgumentError, UnavailableError
from services.common.lifecycle import ExitStatus
from services.common.listen import INSECURE_FLAG, Address, parse_listen
from services.orchestrator import rest, rpc
from services.orchestrator.agents import AgentPool, Deadlines
from services.orchestrator.bitmaps import Bitmaps
from services.orchestrator.changes import Changes
from services.orchestrator.doubt import Doubt
from services.orchestrator.fleet import Fleet, check_node
from services.orchestrator.machines import Machines
from services.orchestrator.metrics import Metrics
from services.orchestrator.move import Context, Limits
from services.orchestrator.nodes import Nodes
from services.orchestrator.runner import Runner
from services.orchestrator.store import open_store
from services.orchestrator.store.backup import in_use

log = logging.getLogger(__name__)

HTTP_GRACE_S = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an orchestrator is set up."""

    store: Path
    """The SQLite file. On a local disk: file locks and fsync of network file systems lie."""
    rest: Address
    grpc: Address
    nodes: tuple[tuple[str, str], ...] = ()
    """(name, agent address) of nodes to register at the start."""
    limits: Limits = field(default_factory=Limits)
    deadlines: Deadlines = field(default_factory=Deadlines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """An orchestrator at work, whoever may call it."""

    fleet: Fleet
    context: Context
    runner: Runner
    nodes: Nodes

    def build_app(self) -> FastAPI:
        """REST, to be served."""
        return rest.build_app(self.fleet, self.context.metrics.registry, self._ready)

    async def _ready(self) -> None:
        self.runner.require_running()
        self.context.doubt.require_none()
        await self.context.store.fleet.nodes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An orchestrator that can be called."""

    rest: Address
    grpc: Address
    core: Core


class _Uvicorn(uvicorn.Server):
    """Signals are the process's business, not the HTTP server's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _http(app: FastAPI, listen: Address) -> AsyncIterator[Address]:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((listen.host, listen.port))
        except OSError as error:
            raise UnavailableError(
                "LISTEN_FAILED", f"cannot bind {listen}: {error.strerror}"
            ) from error
        server = _Uvicorn(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=HTTP_GRACE_S,
            )
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(server.serve(sockets=[listener]))
            try:
                yield Address(host=listen.host, port=listener.getsockname()[1])
            finally:
                server.should_exit = True


@contextlib.asynccontextmanager
async def working(settings: Settings) -> AsyncIterator[Core]:
    """Move what is to be moved for the length of the block.

    At the end watches end, guests that stand still get a moment, and every migration that has not
    ended is left to the next start.
    """
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(in_use(settings.store, alone=False))
        store = await stack.enter_async_context(open_store(settings.store))
        agents = AgentPool(store.incarnation, settings.deadlines)
        stack.push_async_callback(agents.close)
        metrics = Metrics()
        doubt = Doubt(store, metrics)
        agents.refused_by = doubt.hear_hello
        context = Context(
            store=store,
            doubt=doubt,
            agents=agents,
            bitmaps=Bitmaps(store.bitmaps),
            metrics=metrics,
            changes=Changes(),
            limits=settings.limits,
        )
        nodes = Nodes(context)
        machines = Machines(context)
        runner = Runner(context)
        fleet = Fleet(context, nodes, machines, runner)
        await context.bitmaps.load()
        await nodes.load()
        for name, address in settings.nodes:
            await nodes.put(name, address, ask=False)
        await stack.enter_async_context(
            lifecycle.background(
                {"nodes": nodes.poll, "machines": machines.settle, "doubt": doubt.keep}
            )
        )
        await stack.enter_async_context(runner.running())
        yield Core(fleet=fleet, context=context, runner=runner, nodes=nodes)


@contextlib.asynccontextmanager
async def orchestrating(settings: Settings) -> AsyncIterator[Running]:
    """`working`, and served over REST and gRPC. At the end nothing is admitted any more, first."""
    async with (
        working(settings) as core,
        _http(core.build_app(), settings.rest) as http,
        grpc_server.serving(settings.grpc, rpc.services(core.fleet)) as grpc,
    ):
        try:
            yield Running(rest=http, grpc=grpc.address, core=core)
        finally:
            core.context.changes.close()


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line; GODWIT_* stand in for what it leaves out.

    Raises:
        InvalidArgumentError: an address or a node is wrong.
    """
    env = os.environ
    parser = argparse.ArgumentParser(
        prog="godwit orchestrator", description="Moves virtual machines between nodes."
    )
    parser.add_argument(
        "--rest",
        default=env.get("GODWIT_REST", "127.0.0.1:8080"),
        metavar="HOST:PORT",
        help="where REST is served; port 0 takes a free one (GODWIT_REST, %(default)s)",
    )
    parser.add_argument(
        "--grpc",
        default=env.get("GODWIT_GRPC", "127.0.0.1:8081"),
        metavar="HOST:PORT",
        help="where gRPC is served (GODWIT_GRPC, %(default)s)",
    )
    parser.add_argument(
        "--store",
        default=env.get("GODWIT_STORE", "godwit.db"),
        type=Path,
        metavar="PATH",
        help="the SQLite file, on a local disk (GODWIT_STORE, %(default)s)",
    )
    parser.add_argument(
        "--node",
        action="append",
        default=None,
        metavar="NAME=HOST:PORT",
        help="a node and its agent, registered at the start; repeat it (GODWIT_NODES, by commas)",
    )
    parser.add_argument(
        INSECURE_FLAG,
        action="store_true",
        default=env.get("GODWIT_INSECURE_PLAINTEXT", "") == "1",
        help="let others than this machine reach the listeners, without TLS",
    )
    parsed = parser.parse_args(arguments)
    nodes = parsed.node
    if nodes is None:
        nodes = [each for each in env.get("GODWIT_NODES", "").split(",") if each]
    insecure = bool(parsed.insecure_plaintext)
    return Settings(
        store=parsed.store,
        rest=parse_listen(parsed.rest, insecure_plaintext=insecure),
        grpc=parse_listen(parsed.grpc, insecure_plaintext=insecure),
        nodes=tuple(read_node(each) for each in nodes),
    )


def read_node(text: str) -> tuple[str, str]:
    """NAME=HOST:PORT of a command line.

    Raises:
        InvalidArgumentError: NODE_INVALID, FIELD_INVALID.
    """
    name, separator, address = text.partition("=")
    if not separator:
        raise InvalidArgumentError("NODE_INVALID", f"{text!r} is not NAME=HOST:PORT")
    check_node(name, address)
    return name, address


async def _serve(arguments: Sequence[str]) -> ExitStatus:
    settings = parse(arguments)
    with lifecycle.stop_on_signal() as stop:
        async with orchestrating(settings) as running:
            # For whoever started us: the ports may have been chosen by the kernel.
            sys.stdout.write(f"listening rest={running.rest} grpc={running.grpc}\n")
            sys.stdout.flush()
            lifecycle.spare_collector()
            await stop.wait()
            log.info("stopping: migrations under way are left to the next start")
    return ExitStatus.OK


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the orchestrator; returns an ExitStatus."""
    given = sys.argv[1:] if arguments is None else arguments
    return lifecycle.run("orchestrator", lambda: _serve(given))
