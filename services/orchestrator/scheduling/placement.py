# SPDX-License-Identifier: Apache-2.0
"""Where a VM can go, where best, and in words why nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.orchestrator.scheduling.limits import Ledger, arrival_keys
from services.orchestrator.scheduling.model import NodeView, VmView

HINTS = {
    "SAME_NODE": "it is there already",
    "NODE_UNREACHABLE": "start the agent on that node",
    "NODE_DRAINING": "undrain that node, or choose another",
    "BREAKER_OPEN": "moves of this node failed in a row; look at why, or wait",
    "DRIVER_MISSING": "install the VMM on that node",
    "CPU_MISMATCH": "choose a node whose processors offer the guest's CPU model",
    "PAGE_SIZE_MISMATCH": "choose a node that offers the guest's page size",
    "SELECTOR_MISMATCH": "label a node so, or change the VM's selector",
    "TAINTED": "let the VM tolerate the taint, or remove it from the node",
    "APART": "a VM that must be apart from this one is there",
    "MEMORY_SHORT": "free memory, or add a node",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a node cannot take a VM, however long one waits for tokens."""

    node: str
    check: str
    """One of HINTS."""
    reason: str
    """With the values."""

    @property
    def hint(self) -> str:
        """What can be done about it."""
        return HINTS[self.check]


def refusal(vm: VmView, node: NodeView, now_s: float) -> Refusal | None:
    """The first hard filter that a node does not pass."""
    found = _refused(vm, node, now_s)
    return Refusal(node=node.name, check=found[0], reason=found[1]) if found else None


def _refused(vm: VmView, node: NodeView, now_s: float) -> tuple[str, str] | None:
    placing = vm.placing
    if node.name == vm.node:
        return "SAME_NODE", f"{vm.vm_id} runs on {node.name}"
    if node.draining:
        return "NODE_DRAINING", f"{node.name} is being emptied"
    if not node.reachable:
        return "NODE_UNREACHABLE", f"the agent of {node.name} does not answer"
    if node.broken_until_s is not None and now_s < node.broken_until_s:
        return "BREAKER_OPEN", f"{node.failures} moves of {node.name} failed lately"
    if node.free_bytes < vm.memory_bytes:
        return (
            "MEMORY_SHORT",
            f"{node.name} has {node.free_bytes} bytes unbooked for {vm.memory_bytes}",
        )
    if node.taints and (taints := node.taints - placing.tolerations):
        return "TAINTED", f"{node.name} is tainted {', '.join(sorted(taints))}"
    if placing.apart and node.apart[placing.apart] > 0:
        return "APART", f"{node.name} has a VM of {placing.apart!r}"
    if placing.selector:
        for key, value in placing.selector.items():
            if node.labels.get(key) != value:
                return "SELECTOR_MISMATCH", f"{node.name} is not labelled {key}={value}"
    return _incapable(vm, node)


def _incapable(vm: VmView, node: NodeView) -> tuple[str, str] | None:
    if vm.driver and node.drivers is not None and vm.driver not in node.drivers:
        return "DRIVER_MISSING", f"{node.name} has no {vm.driver}"
    if vm.cpu and node.cpus is not None and vm.cpu not in node.cpus:
        return "CPU_MISMATCH", f"{node.name} does not offer CPU {vm.cpu}"
    wanted = vm.page_size_bytes
    if wanted and node.page_sizes is not None and wanted not in node.page_sizes:
        return "PAGE_SIZE_MISMATCH", f"{node.name} has no pages of {wanted} bytes"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The node chosen."""

    node: str
    score: float
    """Compared among candidates; higher is better."""
    because: str
    """Its parts in words."""
    compared: int
    """How many nodes could have taken it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Nodes could take it, and a limit holds each of them now."""

    key: str
    """Of the limit: of the first such node."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Nowhere:
    """No node can take it."""

    check: str
    """What refused most nodes."""
    message: str
    hint: str


def _parts(vm: VmView, node: NodeView, ledger: Ledger, source_link: str) -> tuple[float, ...]:
    """Free memory after it, inbound tokens left, same link, company, crowd, failures."""
    total = node.memory_total_bytes or 1
    key = f"node-in:{node.name}"
    near = vm.placing.near
    return (
        4.0 * (node.free_bytes - vm.memory_bytes) / total,
        2.0 * ledger.free(key) / (ledger.limits.of(key) or 1),
        0.5 if node.link == source_link else 0.0,
        1.0 if near and node.near[near] > 0 else 0.0,
        -0.02 * node.vm_count,
        -1.0 * node.failures,
    )


_PART_NAMES = ("memory left", "inbound free", "same link", "near", "VMs there", "failures")


def choose(
    vm: VmView,
    nodes: Iterable[NodeView],
    ledger: Ledger,
    *,
    source_link: str,
    now_s: float,
    reserved: frozenset[str] = frozenset(),
    avoid: frozenset[str] = frozenset(),
    candidates_max: int = 16,
    passed: Callable[[int], None] = lambda _count: None,
) -> Choice | Held | Nowhere:
    """The best of the first `candidates_max` nodes that could take it at once.

    Nodes to avoid are taken only if there is no other. `passed` hears how many nodes were looked
    at, so that the next search can begin behind them.
    """
    best: tuple[bool, float, str] | None = None
    chosen: NodeView | None = None
    held, held_by, seen, fit = "", 0, 0, 0
    refused: Counter[str] = Counter()
    for node in nodes:
        seen += 1
        if found := _refused(vm, node, now_s):
            refused[found[0]] += 1
            continue
        keys = arrival_keys(node.name, source_link, node.link)
        if key := ledger.lacking(keys, reserved):
            held, held_by = held or key, held_by + 1
            continue
        fit += 1
        rank = (node.name not in avoid, sum(_parts(vm, node, ledger, source_link)), node.name)
        if best is None or rank > best:
            best, chosen = rank, node
        if fit >= candidates_max:
            break
    passed(seen)
    if chosen is not None and best is not None:
        parts = zip(_PART_NAMES, _parts(vm, chosen, ledger, source_link), strict=True)
        because = ", ".join(f"{name} {value:+.2f}" for name, value in parts if value)
        return Choice(node=chosen.name, score=best[1], because=because, compared=fit)
    if held:
        others = f", and {held_by - 1} other nodes" if held_by > 1 else ""
        return Held(key=held, message=f"{ledger.say(held)}{others}")
    return _nowhere(vm, refused)


def _nowhere(vm: VmView, refused: Counter[str]) -> Nowhere:
    refused.pop("SAME_NODE", None)
    if not refused:
        return Nowhere(
            check="NO_OTHER_NODE",
            message=f"there is no node but the one where {vm.vm_id} runs",
            hint="add a node",
        )
    # What can be mended comes before what is meant: most often memory before draining.
    check = max(refused, key=lambda each: (each != "NODE_DRAINING", refused[each], each))
    counts = ", ".join(f"{count} {name}" for name, count in refused.most_common())
    return Nowhere(check=check, message=f"no node can take {vm.vm_id}: {counts}", hint=HINTS[check])
