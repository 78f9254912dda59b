# SPDX-License-Identifier: Apache-2.0
"""How long moving a set of VMs away must take at least, whatever the order and the targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A VM that has to leave."""

    node: str
    link: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What the fleet offers."""

    limit: Callable[[str], int]
    """Tokens by key."""
    overhead_s: float
    node_bytes_per_s: float
    link_bytes_per_s: float
    targets: Collection[str]
    """Nodes that may be moved to."""
    target_links: Collection[str]
    """Their uplinks."""


def lower_bound_s(loads: Collection[Load], capacity: Capacity) -> float:
    """The largest of several bounds, each of which ignores all others."""
    if not loads:
        return 0.0
    took = {load: _alone_s(load, capacity) for load in set(loads)}
    bounds = [max(took.values())]
    total_s = sum(took[load] for load in loads)
    bounds.append(total_s / max(capacity.limit("cluster"), 1))
    inbound = sum(capacity.limit(f"node-in:{name}") for name in capacity.targets)
    bounds.append(total_s / max(inbound, 1))
    total_bytes = sum(load.memory_bytes for load in loads)
    bounds.append(total_bytes / (capacity.node_bytes_per_s * max(len(capacity.targets), 1)))
    for name, of_node in _by(loads, lambda load: load.node).items():
        bounds.append(
            sum(took[each] for each in of_node) / max(capacity.limit(f"node-out:{name}"), 1)
        )
        bounds.append(
            capacity.overhead_s
            + sum(each.memory_bytes for each in of_node) / capacity.node_bytes_per_s
        )
    for link, of_link in _by(loads, lambda load: load.link).items():
        if not link or link in capacity.target_links:
            continue  # they can stay behind it
        bounds.append(sum(took[each] for each in of_link) / max(capacity.limit(f"link:{link}"), 1))
        bounds.append(
            capacity.overhead_s
            + sum(each.memory_bytes for each in of_link) / capacity.link_bytes_per_s
        )
    return max(bounds)


def _alone_s(load: Load, capacity: Capacity) -> float:
    return capacity.overhead_s + load.memory_bytes / capacity.node_bytes_per_s


def _by(loads: Collection[Load], key: Callable[[Load], str]) -> Mapping[str, list[Load]]:
    found: dict[str, list[Load]] = defaultdict(list)
    for load in loads:
        found[key(load)].append(load)
    return found
