# SPDX-License-Identifier: Apache-2.0
"""Which VMs to move so that nodes are filled alike, and no more of them than it takes."""

from __future__ import annotations

from collections.abc import Iterable

from services.orchestrator.scheduling.model import NodeView, VmView
from services.orchestrator.scheduling.placement import refusal

MOVES_MAX = 1000


def rebalance(
    nodes: Iterable[NodeView],
    vms: Iterable[VmView],
    *,
    spread_max: float,
    now_s: float,
    cooldown_s: float,
) -> list[tuple[VmView, str]]:
    """(VM, target), in order. The nodes are used up: what is chosen is booked on them.

    From the fullest node to the emptiest one that can take it, the VM that evens them best, until
    they differ by less than `spread_max` of their memory or nothing helps any more. Each VM moves
    at most once; one that moved within `cooldown_s` stays: no ping-pong.
    """
    known = {node.name: node for node in nodes if node.reachable and not node.draining}
    on_node: dict[str, list[VmView]] = {name: [] for name in known}
    for vm in vms:
        cold = vm.moved_s is None or now_s - vm.moved_s >= cooldown_s
        if vm.node in on_node and cold:
            on_node[vm.node].append(vm)
    chosen: list[tuple[VmView, str]] = []
    while len(chosen) < MOVES_MAX:
        found = _best(known, on_node, spread_max, now_s)
        if found is None:
            return chosen
        vm, target = found
        on_node[vm.node].remove(vm)
        known[target.name].expect(vm)
        known[vm.node].leave(vm)
        chosen.append((vm, target.name))
    return chosen


def _used(node: NodeView) -> float:
    """Share of its memory that is in use or promised."""
    return 1.0 - node.free_bytes / (node.memory_total_bytes or 1)


def _best(
    known: dict[str, NodeView],
    on_node: dict[str, list[VmView]],
    spread_max: float,
    now_s: float,
) -> tuple[VmView, NodeView] | None:
    ordered = sorted(known.values(), key=lambda node: (_used(node), node.name))
    for source in reversed(ordered):
        for target in ordered:
            gap = _used(source) - _used(target)
            if gap <= spread_max:
                break
            fitting = [
                vm
                for vm in on_node[source.name]
                # Beyond the middle it would only swap which of them is the fuller one.
                if vm.memory_bytes / (source.memory_total_bytes or 1) < gap
                and refusal(vm, target, now_s) is None
            ]
            if fitting:
                best = max(fitting, key=lambda vm: (-_after(vm, source, target), vm.vm_id))
                return best, target
    return None


def _after(vm: VmView, source: NodeView, target: NodeView) -> float:
    """How far apart the two are once it has moved."""
    leaves = vm.memory_bytes / (source.memory_total_bytes or 1)
    comes = vm.memory_bytes / (target.memory_total_bytes or 1)
    return abs((_used(source) - leaves) - (_used(target) + comes))
