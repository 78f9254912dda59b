# SPDX-License-Identifier: Apache-2.0
"""How many moves may be under way, and who holds which token. All tokens or none (I9)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from services.common.errors import InvalidArgumentError

TOKENS_MAX = 10_000


class Kind(StrEnum):
    """What a limit is about; the key of a token is the kind, or `kind:name`."""

    CLUSTER = "cluster"
    NODE_OUT = "node-out"
    NODE_IN = "node-in"
    LINK = "link"
    GROUP = "group"


REASONS: dict[Kind, str] = {
    Kind.CLUSTER: "CLUSTER_LIMIT",
    Kind.NODE_OUT: "NODE_OUTBOUND_LIMIT",
    Kind.NODE_IN: "NODE_INBOUND_LIMIT",
    Kind.LINK: "LINK_LIMIT",
    Kind.GROUP: "GROUP_LIMIT",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSet:
    """Moves at a time. Unlimited is not on offer: a storm of moves is what limits are for."""

    cluster: int = 64
    node_out: int = 2
    node_in: int = 2
    link: int = 16
    """Through one shared uplink, both ways together."""
    group: int = 1
    overrides: Mapping[str, int] = field(default_factory=dict)
    """For one node, link or group, by token key such as `node-in:b`. 0 closes it."""

    def of(self, key: str) -> int:
        """How many tokens of a key there are."""
        found = self.overrides.get(key)
        if found is not None:
            return found
        return int(getattr(self, key.partition(":")[0].replace("-", "_")))

    def with_values(self, values: Mapping[str, int | None]) -> LimitSet:
        """These limits, some changed. A kind sets its default; a key of its own, None removes it.

        Raises:
            InvalidArgumentError: LIMIT_INVALID.
        """
        changed: dict[str, int] = {}
        overrides = dict(self.overrides)
        for key, value in values.items():
            kind, colon, name = key.partition(":")
            if kind not in set(Kind) or (colon and (not name or kind == Kind.CLUSTER)):
                raise _invalid(key, f"name a limit as one of {', '.join(Kind)}, or KIND:NAME")
            if value is not None and not 0 <= value <= TOKENS_MAX:
                raise _invalid(key, f"must be 0..{TOKENS_MAX}, got {value}")
            if colon:
                overrides.pop(key, None)
                if value is not None:
                    overrides[key] = value
            elif value is None:
                raise _invalid(key, "only a limit of one node, link or group can be removed")
            else:
                changed[kind.replace("-", "_")] = value
        return replace(self, **changed, overrides=overrides)

    def values(self) -> dict[str, int]:
        """By key; what `with_values` takes."""
        return {kind: self.of(kind) for kind in Kind} | dict(sorted(self.overrides.items()))


def _invalid(key: str, why: str) -> InvalidArgumentError:
    return InvalidArgumentError("LIMIT_INVALID", f"{key}: {why}", metadata={"limit": key})


def departure_keys(source: str, group: str) -> tuple[str, ...]:
    """Tokens of a move that do not depend on where it goes."""
    keys = (Kind.CLUSTER.value, f"{Kind.NODE_OUT}:{source}")
    return (*keys, f"{Kind.GROUP}:{group}") if group else keys


def arrival_keys(target: str, source_link: str, target_link: str) -> tuple[str, ...]:
    """Tokens of a move that depend on it: an uplink is used by what leaves the rack behind it."""
    inbound = f"{Kind.NODE_IN}:{target}"
    if source_link == target_link:
        return (inbound,)
    return (inbound, *(f"{Kind.LINK}:{link}" for link in (source_link, target_link) if link))


class Ledger:
    """Tokens that are held, by whom."""

    def __init__(self, limits: LimitSet) -> None:
        self.limits = limits
        self._used: Counter[str] = Counter()
        self._held: dict[str, tuple[str, ...]] = {}

    def used(self, key: str) -> int:
        """How many are held."""
        return self._used[key]

    def free(self, key: str) -> int:
        """How many are left; negative after a limit was lowered."""
        return self.limits.of(key) - self._used[key]

    def lacking(self, keys: Iterable[str], reserved: frozenset[str] = frozenset()) -> str:
        """The first key of which no token is left, or "". One of each `reserved` is not ours."""
        for key in keys:
            if self.free(key) <= (key in reserved):
                return key
        return ""

    def take(self, holder: str, keys: tuple[str, ...]) -> None:
        """Take one token of each key. The caller has looked that they are there."""
        assert holder not in self._held
        self._held[holder] = keys
        self._used.update(keys)

    def release(self, holder: str) -> None:
        """Give back what a holder has; nothing if it has nothing."""
        for key in self._held.pop(holder, ()):
            self._used[key] -= 1

    def holders(self) -> Mapping[str, tuple[str, ...]]:
        """Who holds what."""
        return self._held

    def say(self, key: str) -> str:
        """A limit for people: `node-in:b 2/2`."""
        return f"{key} {self._used[key]}/{self.limits.of(key)}"


def reason_of(key: str) -> str:
    """The stable code of waiting for a token of `key`."""
    return REASONS[Kind(key.partition(":")[0])]
