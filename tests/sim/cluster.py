# SPDX-License-Identifier: Apache-2.0
"""The cluster: one orchestrator, two agents, all as they are, on simulated machines.

`Cluster.run` plays one scenario: a guest on node a is asked to move to b, faults strike, then all
faults end and everybody is started again; the rest must come right by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import random
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import sqlalchemy as sa
from godwit.agent.v1 import fault_agent_service_pb2_grpc

from services.common import metrics, telemetry
from services.common.errors import GodwitError, UnavailableError
from services.common.listen import Address
from services.fault_agent import (
    arrival_engine,
    arrivals,
    departures,
    device_state,
    evidence,
    first_touch,
    host,
    kept_state,
    node,
    processes,
    progress,
    residents,
    servicer,
)
from services.fault_agent.drivers.api import VmmState
from services.fault_agent.journal import Role
from services.fault_agent.node import NodeConfig
from services.fault_agent.recovery import recover
from services.orchestrator import agents, main
from services.orchestrator.agents import AgentPool
from services.orchestrator.main import Core, Settings, working
from services.orchestrator.metrics import Metrics
from services.orchestrator.migration import Decision
from services.orchestrator.move import Context, Limits
from services.orchestrator.rebuild import rebuild
from services.orchestrator.store import Store, identity, open_store, opening, schema
from services.orchestrator.store.database import Database, typed_errors
from tests.sim import hosts, network
from tests.sim.hosts import SPEC, BrokenError, Host, Truth
from tests.sim.machinery import CURRENT, Killed, SimProcess, VirtualLoop, effect
from tests.sim.network import NETWORK, Network

_T = TypeVar("_T")

VM = "vm-1"
LIMITS = Limits(
    patience_s=3,
    switchover_s=6,
    alarm_s=30,
    progress_ms=500,
    poll_s=10,
    beat_s=5,
    settle_s=3,
    drain_s=0,
)
LEASE_S = 3.0
"""Of a shell whose state was not loaded. Short: in bad weather it is over now and then."""
HEAL_S = 600.0
"""Virtual time in which everything must have come right once the faults are over."""

_violations = metrics.invariant_violations(metrics.new_registry())
_metrics = Metrics()


# --- the store: the real tables on a SQLite in memory that can be copied and put back ---


def _connect() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    connection.execute("PRAGMA foreign_keys=ON")
    return connection


_DISK = _connect()
_ENGINE = sa.create_engine("sqlite://", creator=lambda: _DISK, poolclass=sa.pool.StaticPool)
sa.event.listen(_ENGINE, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))


class SimDatabase(Database):
    """Durable when a transaction is committed. Whoever asked may be dead before and after."""

    dialect = "sqlite"

    def __init__(self, on_write: Callable[[], None]) -> None:
        self._on_write = on_write

    async def prepare(self, work: Callable[[sa.Connection], _T]) -> _T:
        return await self._do(work, writes=False)

    async def claim(self, work: Callable[[sa.Connection], _T]) -> _T:
        return await self._do(work, writes=True)

    async def write(self, work: Callable[[sa.Connection], _T]) -> _T:
        return await self._do(work, writes=True)

    async def read(self, work: Callable[[sa.Connection], _T]) -> _T:
        return await self._do(work, writes=False)

    async def write_then_read(
        self, write: Callable[[sa.Connection], None], read: Callable[[sa.Connection], _T]
    ) -> _T:
        await self._do(write, writes=True)
        return await self._do(read, writes=False)

    async def _do(self, work: Callable[[sa.Connection], _T], *, writes: bool) -> _T:
        def run() -> _T:
            with typed_errors(), _ENGINE.begin() as connection:
                done = work(connection)
            if writes:
                self._on_write()
            return done

        return await asyncio.get_running_loop().run_in_executor(None, run)

    async def close(self) -> None:
        """Nothing to close."""


def _template() -> bytes:
    """A store with both nodes and the guest on a under epoch 1."""
    with _ENGINE.begin() as connection:
        opening.prepare(connection)
        identity.put(connection, identity.INCARNATION, "STORE-0")
        for name in "ab":
            connection.execute(
                sa.insert(schema.nodes).values(
                    name=name, agent_address=f"10.0.0.{ord(name)}:1", registered_at_ns=1
                )
            )
        connection.execute(sa.insert(schema.epochs).values(vm_id=VM, last_epoch=1))
        connection.execute(
            sa.insert(schema.vms).values(
                vm_id=VM,
                node="a",
                epoch=1,
                state="running",
                spec_json=SPEC.canonical_json(),
                spec_hash=SPEC.spec_hash,
                memory_bytes=SPEC.memory_bytes,
                created_at_ns=1,
            )
        )
    return _DISK.serialize()


_TEMPLATE = _template()


class _Leads:
    """In place of an election: whoever runs leads, two of them at once too (I13)."""

    def __init__(self, *_args: object, **_more: object) -> None:
        """Nothing is asked."""

    async def run(
        self,
        lead: Callable[[], contextlib.AbstractAsyncContextManager[None]],
        settled: Callable[[], None],
    ) -> None:
        """See the real one."""
        async with lead():
            settled()
            await asyncio.Event().wait()


class Witness:
    """Looks at the store after every write: what the invariants say of it."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        self.decisions: dict[str, str] = {}
        self.progress: dict[str, float] = {}
        self.epochs: dict[str, int] = {}
        self.returned: dict[str, int] = {}
        self.phases: dict[str, str] = {}
        self.at_commit: list[Callable[[], None]] = []
        """Done once, when a COMMITTED is written."""

    def forget(self) -> None:
        """The store was put back: only what was acted on counts from now on."""
        self.__init__(self._truth)  # type: ignore[misc]

    def committed(self) -> None:
        """The most interesting moment there is."""
        waiting, self.at_commit = self.at_commit, []
        for act in waiting:
            act()

    def look(self) -> None:
        """Assert."""
        broke = self._truth.broke
        active: list[str] = []
        columns = "migration_id, vm_id, terminal, decision, progress, cancel_requested, given_back"
        query = f"SELECT {columns}, return_epoch, epoch, phase, reason FROM migrations"
        for row in _DISK.execute(query):
            *row_of_it, phase, reason = row
            migration_id, vm_id, terminal, decision, progress, cancelled, *returned = row_of_it
            self._look_at_return(migration_id, decision, *returned)
            was = self.phases.get(migration_id)
            self.phases[migration_id] = phase
            if reason == "ABANDONED" and phase == "lost" and was not in (None, "lost"):
                self._truth.abandon()
            if cancelled and decision == "committed" and migration_id not in self.decisions:
                broke("I2", f"{migration_id} was committed over a cancel that was accepted")
            if not terminal:
                active.append(vm_id)
            known = self.decisions.get(migration_id)
            if known is not None and decision != known:
                broke("I2", f"migration {migration_id} was {known} and is {decision}")
            if decision == "committed" and known is None:
                self.committed()
            if decision is not None:
                self.decisions[migration_id] = decision
            if progress < self.progress.get(migration_id, 0.0):
                broke("I12", f"progress of {migration_id} fell to {progress}")
            self.progress[migration_id] = progress
        if len(active) != len(set(active)):
            broke("I7", f"unfinished migrations of {active}")
        for vm_id, epoch in _DISK.execute("SELECT vm_id, last_epoch FROM epochs"):
            if epoch < self.epochs.get(vm_id, 0):
                broke("I1", f"the store forgets epoch {self.epochs[vm_id]} of {vm_id}")
            self.epochs[vm_id] = epoch

    def _look_at_return(
        self, migration_id: str, decision: str | None, given_back: int, fresh: int, epoch: int
    ) -> None:
        known = self.returned.get(migration_id)
        if known and not given_back:
            self._truth.broke("I5", f"{migration_id} was given back and is not")
        if not given_back:
            return
        query = "SELECT count(*) FROM transitions WHERE migration_id = ? AND phase = 'given_back'"
        if _DISK.execute(query, (migration_id,)).fetchone()[0] > 1:
            self._truth.broke("I5", f"{migration_id} was given back twice")
        if known:
            return
        self.returned[migration_id] = fresh
        if decision != "committed" or fresh <= epoch:
            self._truth.broke("I5", f"{migration_id} was given back under {fresh}, {decision}")
        self._truth.check_unrun(epoch)


def _by_death(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_by_death(each) for each in error.exceptions)
    # An agent that a link or a full disk keeps from starting is started again.
    return isinstance(error, Killed | GodwitError | asyncio.CancelledError)


class _Tasks:
    """What a Node wants of a TaskGroup; its tasks die with their process."""

    def create_task(self, work: Any, *, name: str = "") -> asyncio.Task[Any]:
        return asyncio.get_running_loop().create_task(work, name=name)


class Cluster:
    """Everything there is in one example."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.truth = Truth()
        self.network = Network(loop)
        self.network.names["orchestrator"] = "o"
        self.hosts = {name: Host(name, self.truth, loop, self.network) for name in "ab"}
        self.witness = Witness(self.truth)
        self.truth.gave_back = self._gave_back
        self.processes: dict[str, SimProcess] = {}
        self.core: Core | None = None
        self.twins: list[SimProcess] = []
        self.copy: bytes = _TEMPLATE
        self.restored = False
        self.healing = False
        self.crash_count = 0
        self._ids = itertools.count(1)
        _DISK.deserialize(_TEMPLATE)
        _DISK.execute("PRAGMA foreign_keys=ON")
        hosts.HOSTS.clear()
        hosts.first_record(self.hosts["a"])

    def _gave_back(self, migration_id: str, epoch: int) -> bool:
        query = "SELECT given_back, return_epoch FROM migrations WHERE migration_id = ?"
        row = _DISK.execute(query, (migration_id,)).fetchone()
        return self.restored or (row is not None and bool(row[0]) and row[1] == epoch)

    # --- processes ---

    async def start(self, name: str) -> None:
        """Start an agent ("a", "b") or the orchestrator ("o"), unless it lives."""
        present = self.processes.get(name)
        if present and present.alive:
            return
        process = self.processes[name] = SimProcess(name)
        process.on_death = lambda: self._died(name)
        if name == "o":
            task = process.spawn(self._orchestrate(process))
        else:
            hosts.HOSTS[id(process)] = self.hosts[name]
            task = process.spawn(self._serve(process, self.hosts[name]))
        task.add_done_callback(lambda done: self._ended(process, done))
        await asyncio.sleep(0)

    async def ask(self, call: Coroutine[Any, Any, None]) -> None:
        """Let the orchestrator serve a call: what that begins is its own, and dies with it.

        Raises:
            UnavailableError: it died.
        """
        done = self.processes["o"].spawn(call)
        await asyncio.wait({done})
        if done.cancelled() or isinstance(done.exception(), Killed):
            raise UnavailableError("PEER_UNAVAILABLE", "the orchestrator is dead")
        done.result()

    def kill(self, name: str) -> None:
        """Kill -9."""
        self.processes[name].die()

    def _ended(self, process: SimProcess, task: asyncio.Task[None]) -> None:
        """A process that ends by itself has a bug, or the model lacks something."""
        error = None if task.cancelled() else task.exception()
        if process.alive and error is not None and not _by_death(error):
            self.truth.broken.append(f"BUG: {process.name} ended: {error!r}")

    def _died(self, name: str) -> None:
        self.crash_count += 1
        if name == "o":
            self.core = None
        else:
            self.network.servers.pop(self.hosts[name].address, None)

    def twin(self, for_s: float) -> None:
        """Another orchestrator on the same store: one that was deposed and does not know (I13)."""
        process = SimProcess("o")
        self.processes.setdefault("o", process)
        process.spawn(self._orchestrate(process))
        self.twins.append(process)
        self.loop.call_later(for_s, process.die)

    async def _serve(self, process: SimProcess, host_of: Host) -> None:
        config = NodeConfig(
            name=host_of.name,
            state_dir=Path("/sim"),
            ram_dir=Path("/sim") / host_of.name,
            images_dir=Path("/sim"),
            page_server_control="",
            arrival_lease_s=LEASE_S,
        )
        made = node.Node(
            config,
            pagecore=hosts.SimPageCore(host_of),  # type: ignore[arg-type]
            drivers={"qemu": hosts.SimDriver(host_of)},  # type: ignore[dict-item]
            violations=_violations,
            tasks=_Tasks(),  # type: ignore[arg-type]
        )
        made.load_journal()
        engines = arrival_engine.ArrivalEngines(made)
        await recover(made, engines)
        effect()
        serving = servicer.FaultAgentServicer(made, engines)
        made.start_task(serving.leases.expire(engines), "arrival leases")
        self.network.servers[host_of.address] = (process, serving)

    async def _orchestrate(self, process: SimProcess) -> None:
        settings = Settings(
            store=Path("/sim/store"),
            rest=Address(host="127.0.0.1", port=0),
            grpc=Address(host="127.0.0.1", port=0),
            limits=LIMITS,
        )
        async with working(settings) as core:
            if process.alive and process not in self.twins:
                self.core = core
            await asyncio.Event().wait()

    @contextlib.asynccontextmanager
    async def open_store(self, _path: Path) -> AsyncIterator[Store]:
        """In place of the real one: no file."""
        database = SimDatabase(self.witness.look)
        yield Store(database, await database.read(identity.read))

    # --- faults ---

    def backup(self) -> None:
        """`godwit store backup`."""
        self.copy = _DISK.serialize()

    async def restore(self) -> None:
        """`godwit store restore` and `rebuild`, as the runbook has it; the orchestrator ends."""
        self._stop_orchestrators()
        self.restored = True
        _DISK.deserialize(self.copy)
        _DISK.execute("PRAGMA foreign_keys=ON")
        self.witness.forget()
        with _ENGINE.begin() as connection:
            identity.put(connection, identity.INCARNATION, f"STORE-{next(self._ids)}")
            identity.put(connection, identity.IN_DOUBT, "restored")

    def _stop_orchestrators(self) -> None:
        """The lock of the store's file keeps them out."""
        for process in (self.processes["o"], *self.twins):
            process.die()

    async def keep_running(self, down_s: float) -> None:
        """Start again whoever died, after a while. Never ends."""
        while True:
            await asyncio.sleep(down_s)
            for name in "abo":
                await self.start(name)

    async def rebuild(self) -> bool:
        """`godwit store rebuild --from-agents`; False: a node does not answer."""
        self._stop_orchestrators()
        process = self.processes["o"] = SimProcess("o")
        done = process.spawn(self._rebuild())
        await asyncio.wait({done})
        process.die()
        error = done.exception()
        if isinstance(error, GodwitError) and error.reason == "REBUILD_INCOMPLETE":
            return False
        if error:
            raise error
        return True

    async def _rebuild(self) -> None:
        async with self.open_store(Path()) as store:
            before = list(self.truth.runs)
            # What was decided and told to nobody may be decided otherwise now.
            self.witness.forget()
            await rebuild(store, AgentPool, now_ns=1)
            if self.truth.runs[: len(before)] != before:
                self.truth.broke("I2", "a rebuild rewrote history")

    def state(self) -> dict[str, Any]:
        """For whoever reads a failure."""
        return {
            "running": [(each.host.name, each.launch.epoch) for each in self.truth.running(VM)],
            "runs": self.truth.runs,
            "journals": {
                name: (each.records[VM].role.value, each.records[VM].epoch_seen)
                for name, each in self.hosts.items()
                if VM in each.records
            },
            "migrations": _DISK.execute(
                "SELECT migration_id, phase, decision, epoch, resume_epoch, reason, wait_reason,"
                " wait_message, destination_owed FROM migrations"
            ).fetchall(),
            "vms": _DISK.execute("SELECT vm_id, node, epoch, state FROM vms").fetchall(),
            "doubt": self.core.context.doubt.why if self.core else None,
        }

    # --- the end ---

    async def heal(self) -> None:
        """No more faults: everybody is started, everything must end well, by itself."""
        net = self.network
        self.healing = True
        net.cuts.clear()
        net.loss = net.duplication = net.lateness = 0.0
        for each in self.hosts.values():
            each.page_server_up = True
        for process in self.twins:
            process.die()
        for process in self.processes.values():
            process.die_in = None
        until = self.loop.time() + HEAL_S
        for name in "abo":
            await self.start(name)
        while self.loop.time() < until and not self.truth.broken:
            await asyncio.sleep(2)
            if self.core and self.core.context.doubt.why:
                if not self.restored:
                    self.truth.broke("I2", f"doubt without a reason: {self.core.context.doubt.why}")
                await self.rebuild()
                await self.start("o")
                continue
            if self.core and self._settled():
                break
        self._judge()

    def _settled(self) -> bool:
        unfinished = "SELECT count(*) FROM migrations WHERE phase NOT IN ('needs_attention')"
        owed = _DISK.execute(
            f"{unfinished} AND NOT terminal OR terminal AND (destination_owed OR source_owed)"
        ).fetchone()[0]
        return not owed

    def _judge(self) -> None:
        broke = self.truth.broke
        if not self._settled():
            broke("END", f"not over after {HEAL_S:g} s: {self.state()}")
        for family in _metrics.invariant_violations.collect():
            for sample in family.samples:
                if sample.value and sample.name.endswith("_total") and not self.restored:
                    broke("COUNTED", f"{sample.labels}: {self.state()}")
        running = self.truth.running(VM)
        if self.truth.abandoned:
            self._judge_abandoned()
            return
        if self.truth.lost_by_us or self.truth.held_for_a_person():
            if len(running) > 1:
                broke("END", f"{self.state()}")
            return
        if len(running) != 1:
            broke("END", f"{len(running)} guests: {self.state()}")
        at = running[0].host
        record = at.records[VM]
        [(owner, epoch)] = _DISK.execute("SELECT node, epoch FROM vms").fetchall()
        if owner != at.name or epoch < record.epoch_owned or record.role is not Role.RESIDENT:
            broke("END", f"it runs on {at.name}, {record.role}: {self.state()}")
        if running[0].ram.groups != set(range(hosts.GROUPS)):
            broke("I4", f"memory is missing: {self.state()}")
        for other in self.hosts.values():
            theirs = other.records.get(VM)
            if other is not at and theirs and theirs.role not in (Role.GONE, Role.UNKNOWN):
                broke("END", f"{other.name} still has it, {theirs.role}: {self.state()}")
            alive = [each for each in other.vmms.values() if each.now is not VmmState.DEAD]
            if other is not at and alive:
                broke("END", f"a VMM is left on {other.name}")

    def _judge_abandoned(self) -> None:
        """Nothing of the guest is left anywhere; a store put back may name it again."""
        for host_of in self.hosts.values():
            theirs = host_of.records.get(VM)
            if theirs and theirs.role not in (Role.GONE, Role.UNKNOWN) and not self.restored:
                self.truth.broke("END", f"{host_of.name} has an abandoned guest: {self.state()}")
        if self.truth.running(VM):
            self.truth.broke("END", f"an abandoned guest runs: {self.state()}")


Scenario = Callable[[Cluster], Awaitable[None]]


@contextlib.contextmanager
def _machines(cluster: Cluster) -> Iterator[None]:
    """Put the simulated machines under the real code."""
    grpc_like = {"grpc_client": network}
    with contextlib.ExitStack() as stack:

        def put(module: Any, **names: Any) -> None:
            stack.enter_context(mock.patch.multiple(module, **names))

        put(agents, **grpc_like)
        put(fault_agent_service_pb2_grpc, FaultAgentServiceStub=network.Stub)
        put(device_state, **grpc_like)
        put(
            node, Journal=hosts.SimJournal, ObeyedStore=hosts.SimObeyedStore, Images=hosts.SimImages
        )
        put(servicer, Preflight=hosts.SimPreflight)
        put(processes, is_alive=hosts.is_alive, kill=hosts.kill, boot_id=_boot_id)
        put(
            kept_state,
            keep=hosts.keep_state,
            is_kept=hosts.is_kept,
            read=hosts.read_state,
            remove=hosts.remove_state,
        )
        put(arrival_engine, _open_ram=hosts.open_ram)
        put(first_touch, read=lambda *_args: [], keep=lambda *_args: None)
        put(
            arrivals,
            make_ram_file=hosts.make_ram_file,
            has_data=hosts.has_data,
        )
        put(residents, make_ram_file=hosts.make_ram_file, remove_file=hosts.remove_file)
        put(evidence, retained_bytes=_retained_bytes)
        put(host, memory_available_bytes=lambda _directory: 1 << 40, memory_total_bytes=lambda: 0)
        put(main, open_store=cluster.open_store, in_use=lambda _path, *, alone: _nothing())
        put(main, Election=_Leads)
        put(main, Metrics=lambda: _metrics)
        put(main, Context=functools.partial(Context, random=cluster.loop.chance))
        put(progress, time=cluster.loop)  # its monotonic()
        put(telemetry, span=lambda *_args, **_more: _nothing())
        yield


def _nothing() -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


def _boot_id() -> str:
    return hosts.here().boot_id


def _retained_bytes(record: Any, boot_id: str) -> int:
    return 1 if record.role is Role.SEALED and record.ram_path in hosts.here().rams else 0


def play(seed: int, scenario: Scenario) -> Cluster:
    """Play one scenario; what it breaks is raised."""
    chance = random.Random(seed)
    loop = VirtualLoop(chance)
    random.seed(seed)
    _metrics.invariant_violations.clear()
    cluster = Cluster(loop)

    async def run() -> None:
        NETWORK.set(cluster.network)
        CURRENT.set(None)
        try:
            for name in "abo":
                await cluster.start(name)
            await scenario(cluster)
            await cluster.heal()
        finally:
            for process in (*cluster.processes.values(), *cluster.twins):
                process.die()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    with _machines(cluster):
        try:
            loop.run_until_complete(run())
        except BrokenError:
            pass  # the first one is what matters: it may have been met in a process, as an error
        finally:
            loop.close()
    if cluster.truth.broken:
        raise BrokenError(cluster.truth.broken[0])
    return cluster


__all__ = ["VM", "Cluster", "Decision", "departures", "open_store", "play"]
