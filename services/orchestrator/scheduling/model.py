# SPDX-License-Identifier: Apache-2.0
"""What scheduling knows of nodes, VMs and moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum


class Priority(IntEnum):
    """Classes; each is a head start of `Rules.ageing_s` before the one below."""

    BACKGROUND = 0
    MAINTENANCE = 1
    USER = 2
    SYSTEM = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """Where a VM may be, beside what its spec needs."""

    selector: Mapping[str, str] = field(default_factory=dict)
    """Labels that its node must have."""
    tolerations: frozenset[str] = frozenset()
    """Taints of nodes that it may go to nevertheless."""
    apart: str = ""
    """Anti-affinity: no node has two VMs with the same word."""
    near: str = ""
    """Affinity, a wish: better where VMs with the same word are."""
    group: str = ""
    """No more than `LimitSet.group` VMs with the same word move at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmView:
    """A VM, as far as scheduling cares."""

    vm_id: str
    node: str
    """Where it runs."""
    memory_bytes: int
    driver: str = ""
    """The VMM that its node must have; empty: any."""
    cpu: str = ""
    """CPU model that its node must offer; empty: any."""
    page_size_bytes: int = 0
    """Its memory's page size, which its node must offer; 0: any."""
    placing: Placing = field(default_factory=Placing)
    labels: Mapping[str, str] = field(default_factory=dict)
    moved_s: float | None = None
    """When it last arrived somewhere; None: never, or long ago."""


@dataclass(slots=True, kw_only=True)
class NodeView:
    """A node, as far as scheduling cares. Mutable: a schedule books moves on it."""

    name: str
    memory_available_bytes: int
    """That a new guest could take, as its agent said last; less what was booked since."""
    memory_total_bytes: int
    booked_bytes: int = 0
    """Of guests that were admitted to come and are not all there yet."""
    link: str = ""
    """The shared uplink behind which it is, such as its rack's; empty: none."""
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: frozenset[str] = frozenset()
    reachable: bool = True
    draining: bool = False
    """Being emptied, or kept empty: nothing is placed here."""
    drivers: frozenset[str] | None = None
    """None: not known, whatever is asked for; so below."""
    cpus: frozenset[str] | None = None
    page_sizes: frozenset[int] | None = None
    vm_count: int = 0
    apart: Counter[str] = field(default_factory=Counter)
    """How many of its VMs have each word of `Placing.apart`; coming ones count."""
    near: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    """Moves to or from here that failed lately."""
    broken_until_s: float | None = None
    """The circuit breaker is open until then."""

    @property
    def free_bytes(self) -> int:
        """What a further guest could take."""
        return self.memory_available_bytes - self.booked_bytes

    def expect(self, vm: VmView) -> None:
        """A move of `vm` to here was admitted."""
        self.booked_bytes += vm.memory_bytes
        self._count(vm, 1)

    def unexpect(self, vm: VmView) -> None:
        """It did not come."""
        self.booked_bytes -= vm.memory_bytes
        self._count(vm, -1)

    def arrive(self, vm: VmView) -> None:
        """It is here, all of it."""
        self.booked_bytes -= vm.memory_bytes
        self.memory_available_bytes -= vm.memory_bytes

    def leave(self, vm: VmView) -> None:
        """It is gone, and its memory is freed."""
        self.memory_available_bytes += vm.memory_bytes
        self._count(vm, -1)

    def _count(self, vm: VmView, by: int) -> None:
        self.vm_count += by
        if vm.placing.apart:
            self.apart[vm.placing.apart] += by
        if vm.placing.near:
            self.near[vm.placing.near] += by

    def house(self, vm: VmView) -> None:
        """It runs here; the node's memory was told without it."""
        self._count(vm, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A move that waits for admission."""

    request_id: str
    vm: VmView
    created_s: float
    """On the clock of the caller, as all times here."""
    priority: Priority = Priority.USER
    target: str = ""
    """Empty: whichever node is best."""
    avoid: frozenset[str] = frozenset()
    """Nodes that failed it lately; only where nothing else is left."""
    not_before_s: float = 0.0
    """Back-off: it waits until then."""
    unfinished: bool = False
    """Goes on with something that was begun; before all others."""
    paused: str = ""
    """Why it does not go, whatever is free; empty: it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How moves are ordered. Seconds."""

    ageing_s: float = 300.0
    """Waiting so long is worth one class."""
    reserve_after_s: float = 120.0
    """The oldest that has waited so long gets the next token of each limit that it needs."""
    candidates_max: int = 16
    """How many nodes that would do are compared; more cost time and change nothing in any drain of
    the simulator (docs/scale.md)."""
    backfill_max: int = 32
    """How many that cannot go are passed over for those behind them, on each source."""
    cooldown_s: float = 600.0
    """A VM that has just moved is not moved again by a rebalance."""

    def rank(self, request: Request) -> tuple[bool, float, str]:
        """Ascending; the lowest goes first. It never changes while a request waits.

        Priority and waiting are both counted in seconds, so that the order of two requests stays as
        it is: no queue has to be sorted anew as time goes by.
        """
        head_start_s = request.priority * self.ageing_s
        return (not request.unfinished, request.created_s - head_start_s, request.request_id)
