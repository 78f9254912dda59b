# SPDX-License-Identifier: Apache-2.0
"""The fleet on a virtual clock. Who goes when and where is the orchestrator's own schedule."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from services.orchestrator.scheduling.breaker import Caution, Outcome, trouble
from services.orchestrator.scheduling.limits import LimitSet
from services.orchestrator.scheduling.model import (
    NodeView,
    Placing,
    Priority,
    Request,
    VmView,
)
from services.orchestrator.scheduling.schedule import Admission, Schedule
from services.simulator.events import (
    Asked,
    Ended,
    Frozen,
    GaveUp,
    LimitsSet,
    Log,
    NodeClosed,
    NodeSeen,
    VmSeen,
    Went,
)
from services.simulator.flows import Flow, Network
from services.simulator.scenario import Scenario

GIB = 1 << 30
_GBIT = 1e9 / 8


@dataclass(slots=True)
class World:
    """Everything that there is, and the clock."""

    scenario: Scenario
    log: Log = field(default_factory=Log)
    now_s: float = 0.0
    schedule: Schedule = field(init=False)
    network: Network = field(default_factory=Network)
    vms: dict[str, VmView] = field(default_factory=dict)
    on_node: dict[str, dict[str, None]] = field(default_factory=dict)
    """VM ids by node, in order."""
    moving: dict[str, str] = field(default_factory=dict)
    """Move id by VM."""
    admitting_s: float = 0.0
    """Real time spent in the schedule."""
    admissions: int = 0
    _random: random.Random = field(init=False)
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _sequence: int = 0
    _ended: dict[str, Callable[[str, bool], None]] = field(default_factory=dict)
    _failed: dict[str, list[Outcome]] = field(default_factory=dict)
    _asked_s: dict[str, float] = field(default_factory=dict)
    _look: bool = False

    def __post_init__(self) -> None:
        self._random = random.Random(self.scenario.seed)  # noqa: S311 - repeatable, not secret
        limits = LimitSet().with_values(dict(self.scenario.limits))
        self.schedule = Schedule(limits)
        self.log.add(LimitsSet(at_s=0, values=limits.values()))
        self._build()

    # --- making it ---

    def _build(self) -> None:
        shape = self.scenario.fleet
        placings = [Placing(group=f"g{index}") for index in range(shape.groups)]
        plain = Placing()
        for rack in range(shape.racks):
            link = f"r{rack}"
            self.network.bytes_per_s[f"link {link}"] = shape.uplink_gbit_s * _GBIT
            for index in range(shape.nodes_per_rack):
                self._add_node(f"r{rack}-n{index}", link)
        memories = [each * GIB for each in shape.vm_memory_gib]
        for name in list(self.schedule.nodes):
            for _ in range(shape.vms_per_node):
                vm_id = f"vm-{len(self.vms)}"
                placing = placings[len(self.vms) % len(placings)] if placings else plain
                memory_bytes = self._random.choice(memories)
                vm = VmView(vm_id=vm_id, node=name, memory_bytes=memory_bytes, placing=placing)
                self._house(vm)

    def _add_node(self, name: str, link: str) -> None:
        shape = self.scenario.fleet.node
        memory_bytes = shape.memory_gib * GIB
        self.schedule.add_node(
            NodeView(
                name=name,
                link=link,
                memory_available_bytes=memory_bytes,
                memory_total_bytes=memory_bytes,
            )
        )
        self.on_node[name] = {}
        for way in ("out", "in"):
            self.network.bytes_per_s[f"{way} {name}"] = shape.bandwidth_gbit_s * _GBIT
        self.log.add(NodeSeen(at_s=0, node=name, link=link, memory_bytes=memory_bytes))

    def _house(self, vm: VmView) -> None:
        node = self.schedule.nodes[vm.node]
        node.memory_available_bytes -= vm.memory_bytes
        node.house(vm)
        self.vms[vm.vm_id] = vm
        self.on_node[vm.node][vm.vm_id] = None
        self.log.add(
            VmSeen(
                at_s=0,
                vm_id=vm.vm_id,
                node=vm.node,
                memory_bytes=vm.memory_bytes,
                group=vm.placing.group,
            )
        )

    # --- time ---

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        """Do it then."""
        self._sequence += 1
        heapq.heappush(self._due, (when_s, self._sequence, act))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._due and self._due[0][0] <= self.scenario.until_s:
            self.now_s = self._due[0][0]
            while self._due and self._due[0][0] == self.now_s:
                heapq.heappop(self._due)[2]()
            if self._look:
                self._look = False
                self._admit()
        for wait in self.schedule.waiting(self.now_s):
            move_id, reason = wait.request.request_id, wait.reason
            self.log.add(GaveUp(at_s=self.now_s, move_id=move_id, reason=reason))

    # --- what operators do ---

    def close(self, nodes: Iterable[str], *, closed: bool) -> None:
        """Nothing is placed on them any more, or again."""
        for name in nodes:
            self.schedule.nodes[name].draining = closed
            self.log.add(NodeClosed(at_s=self.now_s, node=name, closed=closed))
        if not closed:
            self.schedule.changed()
        self._look = True

    def ask(
        self,
        vm_id: str,
        happening: int,
        *,
        priority: Priority = Priority.MAINTENANCE,
        ended: Callable[[str, bool], None] = lambda _vm_id, _moved: None,
    ) -> bool:
        """A VM shall move; `ended` hears (VM, whether it moved). False: it is being moved."""
        if vm_id in self.moving:
            return False
        move_id = f"{happening}.{vm_id}.{self._sequence}"
        self._sequence += 1
        self.moving[vm_id] = move_id
        self._asked_s[move_id] = self.now_s
        self._ended[move_id] = ended
        self.log.add(Asked(at_s=self.now_s, move_id=move_id, vm_id=vm_id, happening=happening))
        self._put(move_id, vm_id, priority)
        return True

    def _put(self, move_id: str, vm_id: str, priority: Priority) -> None:
        caution = trouble(self._failed.get(vm_id, ()), self.now_s, Caution())
        not_before_s = caution.not_before_s.get(vm_id, 0.0)
        self.schedule.put(
            Request(
                request_id=move_id,
                vm=self.vms[vm_id],
                created_s=self._asked_s[move_id],
                priority=priority,
                not_before_s=not_before_s,
                avoid=caution.avoid.get(vm_id, frozenset()),
            )
        )
        self._look = True
        if not_before_s > self.now_s:
            self.at(not_before_s, self._look_again)

    def _look_again(self) -> None:
        self._look = True

    def freeze(self, *, frozen: bool) -> None:
        """The emergency stop, or its end."""
        self.schedule.frozen = frozen
        self.log.add(Frozen(at_s=self.now_s, frozen=frozen))
        self._look = True

    def set_limits(self, values: dict[str, int]) -> None:
        """Change limits."""
        limits = self.schedule.limits.with_values(dict(values))
        self.schedule.set_limits(limits)
        self.log.add(LimitsSet(at_s=self.now_s, values=values))
        self._look = True

    def cut(self, rack: int, *, down: bool) -> None:
        """An uplink fails, or is mended. What flows through it waits."""
        for flow in self.network.cut(f"link r{rack}", self.now_s, down=down):
            self._predict(flow)

    # --- moves ---

    def _admit(self) -> None:
        began = time.perf_counter()
        admitted = self.schedule.admit(self.now_s)
        self.admitting_s += time.perf_counter() - began
        self.admissions += len(admitted)
        for each in admitted:
            self._go(each)

    def _go(self, admission: Admission) -> None:
        request = admission.request
        move_id = request.request_id
        self.log.add(Went(at_s=self.now_s, move_id=move_id, target=admission.target))
        fails = self._random.random() < self.scenario.fail_share
        ready_s = self.now_s + self.scenario.overhead_s
        self.at(ready_s, lambda: self._fail(admission) if fails else self._flow(admission))

    def _flow(self, admission: Admission) -> None:
        vm, nodes = admission.request.vm, self.schedule.nodes
        here, there = nodes[vm.node], nodes[admission.target]
        pipes = [f"out {here.name}", f"in {there.name}"]
        if here.link != there.link:
            pipes += [f"link {here.link}", f"link {there.link}"]
        flow = Flow(admission.request.request_id, tuple(pipes), float(vm.memory_bytes))
        for each in self.network.begin(flow, self.now_s):
            self._predict(each)

    def _predict(self, flow: Flow) -> None:
        if flow.rate > 0:
            move_id, version = flow.move_id, flow.version
            self.at(self.now_s + flow.left_bytes / flow.rate, lambda: self._there(move_id, version))

    def _there(self, move_id: str, version: int) -> None:
        flow = self.network.flow(move_id)
        if flow is None or flow.version != version:
            return
        for each in self.network.end(move_id, self.now_s):
            self._predict(each)
        self.log.add(Ended(at_s=self.now_s, move_id=move_id, moved=True))
        admission = self.schedule.end(move_id, moved=True)
        assert admission is not None
        vm = admission.request.vm
        moved = VmView(
            vm_id=vm.vm_id,
            node=admission.target,
            memory_bytes=vm.memory_bytes,
            placing=vm.placing,
            moved_s=self.now_s,
        )
        self.vms[vm.vm_id] = moved
        del self.on_node[vm.node][vm.vm_id]
        self.on_node[moved.node][vm.vm_id] = None
        del self.moving[vm.vm_id], self._asked_s[move_id]
        self._failed.pop(vm.vm_id, None)
        self._look = True
        self._ended.pop(move_id)(vm.vm_id, True)

    def _fail(self, admission: Admission) -> None:
        request = admission.request
        vm = request.vm
        self.log.add(Ended(at_s=self.now_s, move_id=request.request_id, moved=False))
        self.schedule.end(request.request_id, moved=False)
        self._failed.setdefault(vm.vm_id, []).append(
            Outcome(
                vm_id=vm.vm_id,
                source=vm.node,
                target=admission.target,
                ended_s=self.now_s,
                ok=False,
            )
        )
        self._put(request.request_id, vm.vm_id, request.priority)
