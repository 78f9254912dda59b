# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's process: REST and gRPC over one service layer over one store."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI
from ulid import ULID

from services.common import grpc_server, lifecycle
from services.common.auth.access import Access
from services.common.auth.gate import Gate
from services.common.auth.interceptor import AccessInterceptor
from services.common.certificates import Kind
from services.common.errors import InvalidArgumentError
from services.common.health import Health
from services.common.lifecycle import ExitStatus
from services.common.listen import INSECURE_FLAG, Address, parse_listen
from services.common.peer_tls import add_tls_option, open_certificates
from services.common.tls import Certificates
from services.common.tls_metrics import TlsCollector
from services.orchestrator import rest, rpc
from services.orchestrator.agents import AgentPool, Deadlines
from services.orchestrator.auth.connection import CONNECTION_COUNT_MAX
from services.orchestrator.auth.settings import (
    AuthSettings,
    add_auth_options,
    admitting,
    read_auth,
)
from services.orchestrator.bitmaps import Bitmaps
from services.orchestrator.changes import Changes
from services.orchestrator.doubt import Doubt
from services.orchestrator.election import LEASE_S, Election, Role
from services.orchestrator.events.feed import Feed
from services.orchestrator.events.reader import StoreReader
from services.orchestrator.events.service import Events
from services.orchestrator.fleet import Fleet, check_node
from services.orchestrator.homes import HomesInCharge, NoHomes
from services.orchestrator.http_server import serving_http
from services.orchestrator.kubernetes.options import add_kubernetes_options, read_kubernetes
from services.orchestrator.kubernetes.settings import Settings as KubernetesSettings
from services.orchestrator.machines import Machines
from services.orchestrator.metrics import Metrics
from services.orchestrator.move import Context, Limits
from services.orchestrator.nodes import Nodes
from services.orchestrator.operations.runner import OperationRunner
from services.orchestrator.operations.service import Operations
from services.orchestrator.queue import Queue
from services.orchestrator.retries import Retrier
from services.orchestrator.runner import Runner
from services.orchestrator.store import open_store
from services.orchestrator.store.backup import in_use
from services.orchestrator.store.opening import read_store

log = logging.getLogger(__name__)

DESCRIPTORS_BESIDE = 2048
"""Files beside REST's connections: gRPC's, agents', the store's."""
LEASE_S_MIN = 1.0
LEASE_S_MAX = 300.0
STANDBY_LOOK_S = 1.0
"""How old what a watcher of a standby sees may be."""
LEADER = "godwit.Leader"
"""Of grpc.health.v1: SERVING where the orchestrator leads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an orchestrator is set up."""

    store: Path | str
    """The SQLite file, on a local disk: file locks and fsync of network file systems lie. Or the
    URL of a PostgreSQL database."""
    rest: Address
    grpc: Address
    nodes: tuple[tuple[str, str], ...] = ()
    """(name, agent address) of nodes to register at the start."""
    limits: Limits = field(default_factory=Limits)
    deadlines: Deadlines = field(default_factory=Deadlines)
    lease_s: float = LEASE_S
    """How long a leader that is not heard of any more goes on leading. PostgreSQL only."""
    advertise_rest: str = ""
    """HOST:PORT where clients and other orchestrators call this one; empty: as it listens."""
    advertise_grpc: str = ""

    @property
    def file(self) -> Path | None:
        """The store, if it is a file."""
        return self.store if isinstance(self.store, Path) else None

    auth: AuthSettings = field(default_factory=AuthSettings)
    tls_dir: Path | None = None
    """The orchestrator's certificates; None: plaintext."""
    kubernetes: KubernetesSettings | None = None
    """None: it is no Kubernetes controller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """An orchestrator at work, whoever may call it."""

    fleet: Fleet
    operations: Operations
    events: Events
    context: Context
    runner: Runner
    nodes: Nodes
    machines: Machines
    queue: Queue
    operating: OperationRunner
    retrier: Retrier

    def build_app(self, access: Access | None = None) -> FastAPI:
        """REST, to be served. Without `access` nobody is asked who he is."""
        registry = self.context.metrics.registry
        admitted = access or Access(Gate())
        return rest.build_app(
            self.fleet, self.operations, self.events, registry, self._ready, admitted
        )

    async def _ready(self) -> Role:
        """One that stands by is ready too: to answer what is asked, and to lead."""
        role = self.context.role
        if role.leads:
            self.runner.require_running()
            self.context.doubt.require_none()
        await self.context.store.fleet.nodes()
        return role


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An orchestrator that can be called."""

    rest: Address
    grpc: Address
    core: Core


@contextlib.asynccontextmanager
async def working(
    settings: Settings, certificates: Certificates | None = None
) -> AsyncIterator[Core]:
    """Move what is to be moved for the length of the block.

    Or stand by until it is this one's turn. At the end watches end, guests that stand still get a
    moment, and every migration that has not ended is left to the next start, or to who leads then.
    """
    async with contextlib.AsyncExitStack() as stack:
        if settings.file:
            stack.enter_context(in_use(settings.file, alone=False))
        store = await stack.enter_async_context(open_store(settings.store))
        agents = AgentPool(store.incarnation, settings.deadlines, certificates)
        stack.push_async_callback(agents.close)
        metrics = Metrics()
        if certificates is not None:
            metrics.registry.register(TlsCollector(certificates))
        doubt = Doubt(store, metrics)
        agents.refused_by = doubt.hear_hello
        bitmaps, changes = Bitmaps(store.bitmaps), Changes()
        queue = Queue(store, bitmaps, changes, metrics, time.time_ns)
        homes = HomesInCharge() if settings.kubernetes else NoHomes()
        context = Context(
            store=store,
            doubt=doubt,
            agents=agents,
            bitmaps=bitmaps,
            metrics=metrics,
            changes=changes,
            queue=queue,
            homes=homes,
            limits=settings.limits,
            role=Role(
                name=f"{socket.gethostname()}/{ULID()}",
                rest=settings.advertise_rest or _callable(settings.rest),
                grpc=settings.advertise_grpc or _callable(settings.grpc),
            ),
        )
        nodes = Nodes(context)
        queue.status_of, queue.view = nodes.status, nodes.view
        machines = Machines(context)
        runner = Runner(context)
        fleet = Fleet(context, nodes, machines, runner, queue)
        operating = OperationRunner(context, fleet, nodes, queue)
        operations = Operations(context, fleet, queue, operating)
        feed = Feed(StoreReader(store, queue, fleet.some_nodes, operations.get), changes)
        core = Core(
            fleet=fleet,
            operations=operations,
            events=Events(feed),
            context=context,
            runner=runner,
            nodes=nodes,
            machines=machines,
            queue=queue,
            operating=operating,
            retrier=Retrier(context, runner, queue),
        )
        election = Election(store, context.role, lease_s=settings.lease_s, file=settings.file)
        await stack.enter_async_context(_elected(election, lambda: _leading(settings, core)))
        if not context.role.leads:
            await context.bitmaps.load()
            await nodes.load()
        await stack.enter_async_context(
            lifecycle.background({"standby": lambda: _stand_by(context), "events": feed.run})
        )
        yield core


def _callable(listen: Address) -> str:
    """Where others call a listener; "": it is not known yet."""
    if not listen.port:
        return ""
    if listen.host in ("0.0.0.0", "::"):  # noqa: S104 - it is not bound here
        return f"{socket.gethostname()}:{listen.port}"
    return str(listen)


@contextlib.asynccontextmanager
async def _elected(
    election: Election, lead: Callable[[], contextlib.AbstractAsyncContextManager[None]]
) -> AsyncIterator[None]:
    """Stand by or lead for the length of the block, which begins when it is known which."""
    settled = asyncio.Event()
    try:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(election.run(lead, settled.set), name="election")
            await settled.wait()
            try:
                yield
            finally:
                running.cancel()
    except BaseExceptionGroup as failed:
        if settled.is_set() or len(failed.exceptions) > 1:
            raise
        raise failed.exceptions[0] from None


@contextlib.asynccontextmanager
async def _leading(settings: Settings, core: Core) -> AsyncIterator[None]:
    """All that only one orchestrator does."""
    context = core.context
    context.doubt.read_again()
    context.metrics.leader.set(1)
    context.changes.publish_all()  # what the leader before has written was not told here
    context.metrics.leader_term.set(context.role.leader.term)
    await context.bitmaps.load()
    await core.nodes.load()
    core.nodes.begin_view()
    for name, address in settings.nodes:
        await core.nodes.put(name, address, ask=False)
    tasks = {
        "nodes": core.nodes.poll,
        "machines": core.machines.settle,
        "doubt": context.doubt.keep,
    }
    if settings.kubernetes and isinstance(context.homes, HomesInCharge):
        # Its client takes half a second to import, which every other start would wait for.
        from services.orchestrator.kubernetes import controller

        run = functools.partial(
            controller.run, settings.kubernetes, context, core.fleet, core.operations, context.homes
        )
        tasks["kubernetes"] = run
    try:
        async with (
            lifecycle.background(tasks),
            core.queue.running(),
            core.runner.running(),
            core.operating.running(),
            core.retrier.running(),
        ):
            yield
    finally:
        context.metrics.leader.set(0)


async def _stand_by(context: Context) -> None:
    """Who watches a migration here is told that the leader may have written."""
    while True:
        await asyncio.sleep(STANDBY_LOOK_S)
        if not context.role.leads:
            context.changes.publish_all()


@contextlib.asynccontextmanager
async def orchestrating(settings: Settings) -> AsyncIterator[Running]:
    """`working`, and served over REST and gRPC. At the end nothing is admitted any more, first."""
    certificates = open_certificates(settings.tls_dir)
    if certificates is not None:
        certificates.require(Kind.ORCHESTRATOR)
    async with (
        certificates.kept() if certificates else contextlib.nullcontext(),
        working(settings, certificates) as core,
        admitting(settings.auth, certificates=certificates is not None) as access,
        serving_http(
            core.build_app(access),
            settings.rest,
            certificates.server_context() if certificates else None,
        ) as http,
        grpc_server.serving(
            settings.grpc,
            rpc.services(core.fleet, core.operations, core.events),
            certificates=certificates,
            interceptors=[AccessInterceptor(access)],
        ) as grpc,
        _telling_role(core.context.role, grpc.health),
    ):
        core.context.role.rest = core.context.role.rest or _callable(http)
        core.context.role.grpc = core.context.role.grpc or _callable(grpc.address)
        try:
            yield Running(rest=http, grpc=grpc.address, core=core)
        finally:
            core.context.changes.close()


@contextlib.asynccontextmanager
async def _telling_role(role: Role, health: Health) -> AsyncIterator[None]:
    """GRPC's health says of the service LEADER whether this process leads."""
    roles: asyncio.Queue[bool] = asyncio.Queue()
    roles.put_nowait(role.leads)
    role.watch.append(roles.put_nowait)

    async def tell() -> None:
        while True:
            await health.set_serving(await roles.get(), LEADER)

    async with lifecycle.background({"role": tell}):
        yield


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
        metavar="PATH|URL",
        help="the SQLite file, on a local disk, or postgresql://USER@HOST/DATABASE, for"
        " orchestrators that stand by for each other (GODWIT_STORE, godwit.db)",
    )
    parser.add_argument(
        "--lease",
        default=env.get("GODWIT_LEASE", str(LEASE_S)),
        metavar="SECONDS",
        help="on PostgreSQL: when another orchestrator takes over from one that is not heard of"
        " (GODWIT_LEASE, %(default)s)",
    )
    parser.add_argument(
        "--advertise",
        default=env.get("GODWIT_ADVERTISE", ""),
        metavar="HOST:PORT",
        help="where clients reach this orchestrator's REST; others name it while it leads"
        " (GODWIT_ADVERTISE, where it listens)",
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
    add_tls_option(parser)
    add_auth_options(parser, env)
    add_kubernetes_options(parser, env)
    parsed = parser.parse_args(arguments)
    nodes = parsed.node
    if nodes is None:
        nodes = [each for each in env.get("GODWIT_NODES", "").split(",") if each]
    insecure, tls = bool(parsed.insecure_plaintext), parsed.tls_dir is not None
    return Settings(
        store=read_store(parsed.store),
        rest=parse_listen(parsed.rest, insecure_plaintext=insecure, tls=tls),
        grpc=parse_listen(parsed.grpc, insecure_plaintext=insecure, tls=tls),
        tls_dir=parsed.tls_dir,
        nodes=tuple(read_node(each) for each in nodes),
        lease_s=_read_lease(parsed.lease),
        advertise_rest=parsed.advertise,
        auth=read_auth(parsed),
        kubernetes=read_kubernetes(parsed),
    )


def _read_lease(text: str) -> float:
    try:
        lease_s = float(text)
    except ValueError:
        lease_s = 0.0
    if not LEASE_S_MIN <= lease_s <= LEASE_S_MAX:
        raise InvalidArgumentError(
            "LEASE_INVALID", f"--lease {text!r} is not {LEASE_S_MIN:g}..{LEASE_S_MAX:g} seconds"
        )
    return lease_s


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


def _allow_descriptors() -> None:
    """As many files as CONNECTION_COUNT_MAX needs, where the limit is lower and may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = CONNECTION_COUNT_MAX + DESCRIPTORS_BESIDE
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if allowed < needed:
        log.warning("%d open files are allowed, watchers may need %d", allowed, needed)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


async def _serve(arguments: Sequence[str]) -> ExitStatus:
    settings = parse(arguments)
    _allow_descriptors()
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
