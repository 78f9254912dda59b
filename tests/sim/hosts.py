# SPDX-License-Identifier: Apache-2.0
"""Hosts: what outlives an agent (journal, memory, VMMs, images), and the one truth about guests.

Above it runs the fault agent as it is: fence, journal records, departures, arrivals, residents,
recovery, servicer. Below it a VMM obeys and a page core copies groups of pages. `Truth` watches
every act: it knows which guests execute and what each has done, which no agent can know.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from services.common.errors import DataLossError, InvalidArgumentError
from services.common.vm_spec import PAGE_BYTES, VmSpec
from services.fault_agent import journal
from services.fault_agent.drivers.api import (
    ArmTarget,
    Faults,
    Launch,
    LoadFailedError,
    VmmState,
    VmmUnreachableError,
)
from services.fault_agent.images import PageServerUnreachableError, image_message
from services.fault_agent.journal import Export, ExportState, Record, Role
from services.fault_agent.obeyed_store import ObeyedStore
from services.fault_agent.processes import Process
from services.pagecore.api import (
    ArrivalConfig,
    ArrivalPhase,
    ArrivalRegion,
    ArrivalStatus,
    LatencySummary,
)
from tests.sim.machinery import CURRENT, SimProcess, VirtualLoop, effect
from tests.sim.network import Network

MEMORY_BYTES = 64 << 20
PAGE_COUNT = MEMORY_BYTES // PAGE_BYTES
GROUPS = 4
SPEC = VmSpec(vm_id="vm-1", memory_bytes=MEMORY_BYTES, kernel="/boot/vmlinuz")
_NO_LATENCY = LatencySummary(sample_count=0, p50_ns=0, p99_ns=0, p999_ns=0, max_ns=0)


class BrokenError(AssertionError):
    """An invariant broke."""


@dataclass(slots=True)
class Ram:
    """Memory of a guest on a host."""

    groups: set[int]
    """Which parts are there."""
    inode: int
    deeds: int = 0
    """How much the guest had done when this memory was last written by it."""


@dataclass(slots=True)
class PageMap:
    """What outlives a page core."""

    epoch: int
    generation: int = 0


class Truth:
    """What really happens to guests, asserted at each act."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.deeds: dict[str, int] = {}
        """By VM: how much the guest has done, anywhere. Grows with every run."""
        self.runs: list[tuple[str, int]] = []
        """(node, epoch) of every `cont`."""
        self.told: dict[str, set[str]] = {}
        """By migration: decisions on which a node has acted."""
        self.broken: list[str] = []
        self.has_struck = False
        """The test has killed a VMM or a host."""
        self.forced = False
        """An operator has broken the glass."""
        self.returns: list[tuple[str, str, int]] = []
        """(node, migration, epoch) of every RETURNED that a node acted on."""
        self.gave_back: Callable[[str, int], bool] = lambda _migration, _epoch: True
        """Whether the store says that it has; put there by the cluster."""
        self.abandoned = False
        """An operator gave the guest up, and that was admitted: there is none any more."""
        self.lost_by_us = False
        """A VMM that had run the guest was killed by the test: there may be none at the end."""

    def broke(self, invariant: str, what: str) -> None:
        """Note it and stop: the first is what matters."""
        self.broken.append(f"{invariant}: {what}")
        raise BrokenError(self.broken[-1])

    def running(self, vm_id: str) -> list[Vmm]:
        """Who executes the guest's vCPUs."""
        return [
            vmm
            for host in self.hosts.values()
            for vmm in host.vmms.values()
            if vmm.vm_id == vm_id and vmm.now is VmmState.RUNNING
        ]

    def run(self, host: Host, vmm: Vmm) -> None:
        """VCPUs are about to execute."""
        if self.abandoned:
            self.broke("I5", f"{vmm.vm_id} was abandoned, and is let run on {host.name}")
        others = [each.host.name for each in self.running(vmm.vm_id) if each is not vmm]
        if others:
            self.broke("I1", f"{vmm.vm_id} runs on {host.name} and on {others}")
        record = host.records[vmm.vm_id]
        epoch = record.epoch_owned
        if vmm.ram.deeds != self.deeds.get(vmm.vm_id, 0):
            self.broke(
                "I5", f"{vmm.vm_id} runs on {host.name} from a state that is older than the guest"
            )
        last = self.runs[-1] if self.runs else ("", 0)
        if epoch < last[1] or (epoch == last[1] and host.name != last[0]):
            self.broke("I1", f"{vmm.vm_id} runs on {host.name} under {epoch} after {last}")
        rebuilt = vmm.launch.memory_present
        if vmm.arrived and not rebuilt and record.epoch_activating != record.epoch_prepared:
            self.broke("I5", "cont before ACTIVATING was durable")
        left = rebuilt or (not vmm.arrived and vmm.was_paused)
        if left and record.role is not Role.RESIDENT:
            self.broke("I5", f"it runs on {host.name} again as {record.role}")
        if left and epoch <= record.epoch_departing:
            self.broke("I1", f"resumed under {epoch}, {record.epoch_departing} was another's")
        self.runs.append((host.name, epoch))
        vmm.now = VmmState.RUNNING

    def wrote(self, host: Host, before: Record, after: Record) -> None:
        """A journal record was written."""
        if after.epoch_seen < before.epoch_seen:
            self.broke("I1", f"{host.name} forgets epoch {before.epoch_seen}")
        if after.decision is not journal.Decision.NONE:
            told = self.told.setdefault(after.migration_id, set())
            told.add(after.decision.value)
            if len(told - {"returned", "lost"}) > 1 or told > {"aborted"}:
                self.broke("I2", f"migration {after.migration_id} was {sorted(told)}")
        sealed = before.role is Role.SEALED
        returned = after.decision is journal.Decision.RETURNED
        if returned and before.decision is not after.decision:
            self.returns.append((host.name, after.migration_id, after.epoch_seen))
            if not self.gave_back(after.migration_id, after.epoch_seen):
                self.broke("I5", f"{host.name} was told RETURNED before the store was")
        if sealed and after.role not in (Role.SEALED, Role.GONE) and not returned:
            self.broke("I5", f"sealed, and then {after.role.value}")

    def check_unrun(self, epoch: int) -> None:
        """The store has given the guest back that was to run under `epoch` elsewhere."""
        if any(epoch == ran for _node, ran in self.runs):
            self.broke("I5", f"given back, and it had run under {epoch}")
        for host in self.hosts.values():
            for record in host.records.values():
                arrives = record.epoch_prepared == epoch and record.role in (
                    Role.ARRIVING,
                    Role.ARRIVED,
                )
                if arrives and record.epoch_seen <= epoch and not self.forced:
                    self.broke("I5", f"given back, and {host.name} would still obey Activate")

    def struck(self) -> None:
        """The test has killed a VMM or a host: is there enough left for the guest to go on?"""
        self.has_struck = True
        self.lost_by_us |= not any(self._keeps_guest(host) for host in self.hosts.values())

    def abandon(self) -> None:
        """The store has given the guest up: nobody has it, or nobody can prove that he has."""
        if not self.held_for_a_person() and any(map(self._keeps_guest, self.hosts.values())):
            self.broke("I3", "a guest was abandoned that could still be had")
        self.abandoned = True

    def held_for_a_person(self) -> bool:
        """A VMM that the test killed has ACTIVATING: nobody can prove that it did not run."""
        return self.has_struck and any(
            record.role in (Role.ARRIVING, Role.ARRIVED)
            and record.epoch_activating == record.epoch_prepared > 0
            and host.state_of(record) is VmmState.DEAD
            for host in self.hosts.values()
            for record in host.records.values()
        )

    def _keeps_guest(self, host: Host) -> bool:
        record = host.records.get("vm-1")
        if record is None or record.boot_id != host.boot_id:
            return False
        ram = host.rams.get(record.ram_path)
        if ram is None or ram.deeds != self.deeds.get("vm-1", 0):
            return False
        state, arriving = host.state_of(record), record.arriving
        if arriving is not None and record.role in (Role.ARRIVING, Role.ARRIVED):
            elsewhere = any(arriving.image_id in other.images for other in self.hosts.values())
            committed = record.epoch_activating or record.decision is journal.Decision.COMMITTED
            decided = state is VmmState.RUNNING or (committed and state is VmmState.PAUSED)
            return bool(decided and (elsewhere or len(ram.groups) == GROUPS))
        # An arrival that may have run it has taken it away.
        if any(other.may_have_run(record) for other in self.hosts.values() if other is not host):
            return False
        if state is VmmState.RUNNING or state is VmmState.PAUSED:
            return record.role is not Role.SEALED or host.keeps_state(record)
        return record.role in (Role.DEPARTING, Role.SEALED) and host.keeps_state(record)

    def freed(self, host: Host, path: str) -> None:
        """Memory was removed."""
        ram = host.rams.pop(path)
        for other in self.hosts.values():
            for record in other.records.values():
                arriving = record.arriving
                if other is host or arriving is None or record.role is Role.GONE:
                    continue
                ours = (
                    arriving.image_id in host.images and host.images[arriving.image_id][1] == path
                )
                there = other.rams.get(record.ram_path)
                needs = record.epoch_activating and not record.epoch_memory_complete
                over = other.state_of(record) in (VmmState.DEAD, VmmState.GUEST_ENDED)
                if needs and there and not over and (ours or len(ram.groups) == GROUPS):
                    self.broke("I3", f"{host.name} frees memory that {other.name} has not got")


class Vmm:
    """A VMM process; services.fault_agent.drivers.api.Vmm for whoever holds it."""

    def __init__(self, host: Host, launch: Launch, ram: Ram, state: VmmState) -> None:
        self.host = host
        self.vm_id = launch.spec.vm_id
        self.launch = launch
        self.ram = ram
        self.now = state
        self.arrived = state is VmmState.INCOMING and not launch.memory_present
        self.was_paused = False
        self.saved = False
        self.let_go = False
        self.armed = False
        self._process = Process(pid=next(host.pids), start_ticks=1)

    @property
    def process(self) -> Process:
        return self._process

    async def _obey(self) -> None:
        await self.host.pause()
        if self.now is VmmState.DEAD:
            raise VmmUnreachableError(f"{self.vm_id} is gone")

    async def state(self, *, timeout_s: float = 1.0) -> VmmState:
        return self.now

    async def pause(self) -> None:
        await self._obey()
        if self.now is VmmState.RUNNING:
            deeds = self.host.truth.deeds
            deeds[self.vm_id] = self.ram.deeds = deeds.get(self.vm_id, 0) + 1
            self.now, self.was_paused = VmmState.PAUSED, True
        effect()

    async def resume(self) -> None:
        await self._obey()
        if self.now is not VmmState.RUNNING:
            self.host.truth.run(self.host, self)
            self.saved = False
        effect()

    async def announce(self) -> None:
        await self.host.pause()

    async def has_saved(self) -> bool:
        return self.saved

    async def save(self) -> AsyncGenerator[bytes, None]:
        await self._obey()
        yield b"deeds"
        await self._obey()
        self.saved = True
        yield str(self.ram.deeds).encode()

    async def load(self, chunks: AsyncIterator[bytes]) -> None:
        got = [chunk async for chunk in chunks]
        await self._obey()
        if self.now is not VmmState.INCOMING or got[0][:5] != b"deeds":
            raise LoadFailedError(f"{self.vm_id} is {self.now.value}")
        deeds = int(b"".join(got)[5:])
        if self.launch.memory_present and self.ram.deeds != deeds:
            self.host.truth.broke("I5", "a state was loaded beside memory of another moment")
        self.ram.deeds = deeds
        self.now = VmmState.PAUSED
        effect()

    def close(self) -> None:
        """It runs on."""


class Host:
    """A node's disk, memory and processes."""

    def __init__(self, name: str, truth: Truth, loop: VirtualLoop, network: Network) -> None:
        self.name = name
        self.truth = truth
        self.loop = loop
        self.network = network
        self.address = f"10.0.0.{ord(name)}:1"
        self.page_address = f"10.0.0.{ord(name)}:2"
        self.records: dict[str, Record] = {}
        self.synced: dict[str, Record] = {}
        """What a power cut leaves."""
        self.obeys = ""
        self.rams: dict[str, Ram] = {}
        self.maps: dict[str, PageMap] = {}
        self.vmms: dict[int, Vmm] = {}
        self.images: dict[str, tuple[Export, str]] = {}
        self.states: dict[str, tuple[int, int, bytes]] = {}
        """Kept device states by RAM path: destination's epoch, generation, state."""
        self.boot_id = f"boot-{name}"
        self.boots = itertools.count(2)
        self.page_server_up = True
        self.pids = itertools.count(ord(name) * 1000)
        truth.hosts[name] = self
        network.names[self.address] = name

    async def pause(self) -> None:
        """Something takes its time; whoever waits may die before it and after."""
        effect()
        await asyncio.sleep(self.loop.chance.uniform(0, 0.004))
        effect()

    def reboot(self) -> None:
        """The power is cut: processes and memory are gone, what was synced stays."""
        for pid in tuple(self.vmms):
            self.kill_vmm(pid)
        self.rams.clear()
        self.maps.clear()
        self.images.clear()
        self.states.clear()
        self.records = dict(self.synced)
        self.boot_id = f"boot-{self.name}-{next(self.boots)}"
        self.truth.struck()

    def strike(self, vmm: Vmm) -> None:
        """The test kills a VMM."""
        self.kill_vmm(vmm.process.pid)
        self.truth.struck()

    def may_have_run(self, departing: Record) -> bool:
        """ACTIVATING is durable for what departs there."""
        record = self.records.get(departing.vm_id)
        return record is not None and record.epoch_activating >= departing.epoch_departing > 0

    def keeps_state(self, record: Record) -> bool:
        """The device state of its departure is kept."""
        export = record.export
        if export is None or export.state is not ExportState.FROZEN:
            return False
        kept = self.states.get(record.ram_path, (0, 0, b""))
        return record.ram_path in self.rams and kept[:2] == (
            record.epoch_departing,
            export.generation,
        )

    def state_of(self, record: Record) -> VmmState:
        """What the VMM of a record does."""
        vmm = self.vmms.get(record.process.pid) if record.process else None
        return vmm.now if vmm else VmmState.DEAD

    def kill_vmm(self, pid: int) -> None:
        """SIGKILL to a VMM."""
        if vmm := self.vmms.get(pid):
            if vmm.now is VmmState.RUNNING:
                # It has done something since.
                self.truth.deeds[vmm.vm_id] = self.truth.deeds.get(vmm.vm_id, 0) + 1
            vmm.now = VmmState.DEAD

    def source_of(self, address: str) -> Host:
        """Whose page server listens there."""
        return next(each for each in self.truth.hosts.values() if each.page_address == address)


def here() -> Host:
    """The host of the process that runs now."""
    process = CURRENT.get()
    assert process is not None
    return HOSTS[id(process)]


HOSTS: dict[int, Host] = {}
"""By process; cleared for each example."""


# --- what the agent's modules are given in place of the machine ---


class SimJournal:
    """services.fault_agent.journal.Journal on a disk that always says the truth."""

    def __init__(self, state_dir: Path) -> None:
        self._host = here()

    def vm_dir(self, vm_id: str) -> Path:
        return Path("/sim") / self._host.name / vm_id

    def read_all(self) -> tuple[list[Record], dict[str, Any]]:
        path = Path("/sim/vm-1/journal")
        # Through its form on disk, as a restart does.
        return [
            journal.decode(journal.encode(record), path) for record in self._host.records.values()
        ], {}

    async def write(self, record: Record, *, durable: bool = True) -> None:
        effect()
        if durable:
            await asyncio.sleep(self._host.loop.chance.uniform(0, 0.004))
            effect()
        before = self._host.records.get(record.vm_id, record)
        self._host.truth.wrote(self._host, before, record)
        self._host.records[record.vm_id] = record
        if durable:
            self._host.synced[record.vm_id] = record
        effect()


class SimObeyedStore(ObeyedStore):
    """The real rules over a file of the simulated host."""

    def __init__(self, state_dir: Path) -> None:
        self._host = here()
        super().__init__(state_dir)

    def _read(self) -> str:
        return self._host.obeys

    def _replace(self, text: str) -> None:
        effect()
        self._host.obeys = text.rsplit(maxsplit=1)[-1]
        effect()


class SimImages:
    """services.fault_agent.images.Images; the page server reads what is there."""

    def __init__(self, directory: Path, control: str, tls: object = None) -> None:
        self._host = here()
        self.page_address = self._host.page_address

    async def close(self) -> None:
        """Nothing to close."""

    async def publish(self, record: Record, export: Export, regions: Any) -> Any:
        effect()
        self._host.images[export.image_id] = (export, record.ram_path)
        await self.reload()
        return image_message(record, export, regions)

    async def withdraw(self, image_id: str) -> bool:
        effect()
        self._host.images.pop(image_id, None)
        return True

    async def reload(self, *, timeout_s: float = 5.0) -> None:
        await self._host.pause()
        if not self._host.page_server_up:
            raise PageServerUnreachableError("it is down")


class SimPreflight:
    """Everything can go."""

    def __init__(self, node: Any) -> None:
        pass

    async def source(self, vm: Any) -> list[Any]:
        return []

    async def destination(self, spec: VmSpec, peer: Any) -> list[Any]:
        return []

    async def require_start(self, spec: VmSpec) -> None:
        """It can."""

    async def require_arrival(self, spec: VmSpec) -> None:
        """It can."""


@dataclass(slots=True)
class SimArmed:
    """services.fault_agent.drivers.api.Armed."""

    vmm: Vmm
    faults: Faults = field(
        default_factory=lambda: Faults(
            backend="uffd",
            backend_reason="",
            regions=(ArrivalRegion(offset=0, host_addr=1 << 20, len_bytes=MEMORY_BYTES),),
            uffds=(3,),
            remote_fd=5,
        )
    )

    def close_fds(self) -> None:
        """Nothing to close."""

    async def let_go(self) -> None:
        self.vmm.let_go = True

    def close(self) -> None:
        """The guest stays blocked."""


class SimDriver:
    """services.fault_agent.drivers.api.Driver."""

    name = "qemu"

    def __init__(self, host: Host) -> None:
        self._host = host

    async def version(self) -> str:
        return "sim"

    async def start(self, launch: Launch) -> Vmm:
        return await self._spawn(launch, VmmState.PAUSED)

    async def start_incoming(self, launch: Launch) -> Vmm:
        return await self._spawn(launch, VmmState.INCOMING)

    async def _spawn(self, launch: Launch, state: VmmState) -> Vmm:
        await self._host.pause()
        ram = self._host.rams[str(launch.ram_path)]
        if state is VmmState.PAUSED:
            ram.groups = set(range(GROUPS))
            ram.deeds = self._host.truth.deeds.get(launch.spec.vm_id, 0)
        vmm = Vmm(self._host, launch, ram, state)
        self._host.vmms[vmm.process.pid] = vmm
        effect()
        await launch.on_spawned(vmm.process)
        await self._host.pause()
        return vmm

    async def adopt(self, process: Process, directory: Path) -> Vmm:
        await self._host.pause()
        vmm = self._host.vmms.get(process.pid)
        if vmm is None or vmm.now is VmmState.DEAD:
            raise VmmUnreachableError("it is gone")
        return vmm

    async def arm(self, core: Any, target: ArmTarget) -> SimArmed:
        await self._host.pause()
        vmm = self._host.vmms[target.process.pid]
        vmm.armed = True
        return SimArmed(vmm)

    async def take(self, core: Any, target: ArmTarget) -> SimArmed | None:
        await self._host.pause()
        vmm = self._host.vmms[target.process.pid]
        return None if vmm.let_go else SimArmed(vmm)

    def find_orphan(self, directory: Path, ram_path: str) -> Process | None:
        for vmm in self._host.vmms.values():
            if str(vmm.launch.ram_path) == ram_path and vmm.now is not VmmState.DEAD:
                return vmm.process
        return None


class SimArrival:
    """services.pagecore.api.Arrival: four groups of pages; lives and dies with its agent."""

    fds = itertools.count(100)

    def __init__(self, host: Host, config: ArrivalConfig) -> None:
        self._host = host
        self._config = config
        self._process = CURRENT.get()
        self._ram = host.rams[config.page_map_path.removesuffix(".map") + ".ram"]
        if config.adopt:
            self._map = host.maps[config.page_map_path]
        else:
            self._map = host.maps[config.page_map_path] = PageMap(config.epoch)
        self._fd = next(self.fds)
        self._phase = ArrivalPhase.CONNECTING
        self._bulk = False
        self._closed = False
        self._address = (config.page_host, config.page_port)

    def set_order(self, runs: object) -> None:
        """Pages come in no order here."""

    def start(self) -> None:
        assert self._process is not None
        self._process.spawn(self._engine(self._process))

    async def _engine(self, process: SimProcess) -> None:
        while not self._closed and process.alive:
            self._enter(self._look())
            await asyncio.sleep(self._host.loop.chance.uniform(0.002, 0.05))

    def _enter(self, phase: ArrivalPhase) -> None:
        if phase != self._phase:
            self._phase = phase
            self._host.loop.readable(self._fd)

    def _look(self) -> ArrivalPhase:
        absent = set(range(GROUPS)) - self._ram.groups
        if not absent:
            return ArrivalPhase.COMPLETE
        host, network = self._host, self._host.network
        source = host.source_of(f"{self._address[0]}:{self._address[1]}")
        ways = network.up(host.name, source.name) and network.up(source.name, host.name)
        if not ways or not source.page_server_up:
            return ArrivalPhase.CONNECTING if not self._map.generation else ArrivalPhase.LINK_LOST
        if not self._map.generation:
            return ArrivalPhase.ARMED
        image = source.images.get(self._config.image_id)
        if image is None:
            return ArrivalPhase.REFUSED
        export, path = image
        if export.state is not ExportState.FROZEN or export.generation != self._map.generation:
            return ArrivalPhase.REFUSED
        memory = source.rams.get(path)
        if memory is None:
            return ArrivalPhase.REFUSED
        if self._bulk:
            group = min(absent)
            if group not in memory.groups:
                host.truth.broke("I4", "a page was served that is absent at its source")
            if self._ram.deeds and memory.deeds != self._ram.deeds and absent == set(range(GROUPS)):
                host.truth.broke("I10", "pages of another moment than the device state")
            self._ram.groups.add(group)
        return ArrivalPhase.FETCHING

    def open_gate(self, generation: int) -> None:
        effect()
        assert self._map.generation in (0, generation), "a gate opens once"
        self._map.generation = generation

    def start_bulk(self) -> None:
        effect()
        self._bulk = True

    def set_bulk_rate(self, bytes_per_s_max: int) -> None:
        """It has none."""

    def set_page_server(self, host: str, port: int) -> None:
        self._address = (host, port)

    def fileno(self) -> int:
        return self._fd

    def drain_events(self) -> None:
        """Nothing to drain."""

    def status(self) -> ArrivalStatus:
        absent = PAGE_COUNT - PAGE_COUNT // GROUPS * len(self._ram.groups)
        return ArrivalStatus(
            phase=self._phase,
            bulk_done=not absent,
            grpc_status=0,
            page_count=PAGE_COUNT,
            absent_count=absent,
            demand_page_count=0,
            bulk_page_count=PAGE_COUNT - absent,
            zero_page_count=0,
            removed_page_count=0,
            fault_count=0,
            held_fault_count=0,
            received_bytes=0,
            checksum_error_count=0,
            reconnect_count=0,
            violation_count=0,
            link_lost_ns=0,
            fault_latency=_NO_LATENCY,
            reason="" if self._phase is not ArrivalPhase.LINK_LOST else "cut",
        )

    def bitmap(self) -> bytes:
        size = PAGE_COUNT // GROUPS // 8
        return b"".join(
            (b"\0" if group in self._ram.groups else b"\xff") * size for group in range(GROUPS)
        )

    def generation(self) -> int:
        return self._map.generation

    def finish(self) -> None:
        assert self._phase is ArrivalPhase.COMPLETE

    def close(self) -> None:
        self._closed = True


class SimPageCore:
    """services.pagecore.api.PageCore."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def create_arrival(self, config: ArrivalConfig) -> SimArrival:
        return SimArrival(self._host, config)

    def uffd_features(self) -> tuple[str, ...]:
        return ()


# --- functions ---


def make_ram_file(path: Path, size_bytes: int) -> int:
    """residents.make_ram_file."""
    effect()
    if str(path) in here().rams:
        raise FileExistsError(str(path))
    inode = next(here().pids)
    here().rams[str(path)] = Ram(set(), inode)
    return inode


def has_data(path: Path) -> bool:
    """residents.has_data."""
    return bool(here().rams[str(path)].groups)


def remove_file(path: str) -> None:
    """residents.remove_file."""
    effect()
    if path in here().rams:
        here().truth.freed(here(), path)
    here().maps.pop(path, None)


def keep_state(record: Record, state: bytes) -> None:
    """kept_state.keep."""
    export = record.export
    assert export is not None
    here().states[record.ram_path] = (record.epoch_departing, export.generation, state)


def is_kept(record: Record) -> bool:
    """kept_state.is_kept."""
    return here().keeps_state(record)


def read_state(record: Record) -> bytes:
    """kept_state.read."""
    if not is_kept(record):
        raise DataLossError("STATE_CORRUPT", record.vm_id)
    return here().states[record.ram_path][2]


def remove_state(ram_path: str) -> None:
    """kept_state.remove."""
    effect()
    here().states.pop(ram_path, None)


def is_alive(process: Process) -> bool:
    """processes.is_alive."""
    vmm = here().vmms.get(process.pid)
    return vmm is not None and vmm.now is not VmmState.DEAD


async def kill(process: Process) -> None:
    """processes.kill."""
    host = here()
    await host.pause()
    host.kill_vmm(process.pid)
    effect()


@contextlib.contextmanager
def open_ram(path: str) -> Iterator[int]:
    """arrival_engine._open_ram."""
    if path not in here().rams:
        raise InvalidArgumentError("RAM_GONE", path)
    yield 9


def first_record(host: Host) -> None:
    """A guest that lives on `host` under epoch 1."""
    path = f"/sim/{host.name}/vm-1.1.ram"
    ram = host.rams[path] = Ram(set(range(GROUPS)), 7)

    async def nobody(process: Process) -> None:
        raise AssertionError

    launch = Launch(
        spec=SPEC,
        node=host.name,
        epoch=1,
        directory=Path("/sim"),
        ram_path=Path(path),
        on_spawned=nobody,
    )
    vmm = Vmm(host, launch, ram, VmmState.PAUSED)
    host.vmms[vmm.process.pid] = vmm
    host.records["vm-1"] = replace(
        Record(vm_id="vm-1", boot_id=host.boot_id),
        role=Role.RESIDENT,
        epoch_seen=1,
        epoch_owned=1,
        spec_json=SPEC.canonical_json(),
        process=vmm.process,
        ram_path=path,
        ram_inode=7,
    )
    host.synced = dict(host.records)
    host.truth.run(host, vmm)
