# SPDX-License-Identifier: Apache-2.0
"""The queue: who goes next, and what holds each of the others.

Waiting moves are kept by source, in order: a source whose outbound tokens are gone costs nothing
however many wait there, and a pass looks at the heads of the others. All tokens of a move are taken
together or none is, so that nobody holds one while it waits for another: there is no deadlock.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from services.orchestrator.scheduling.limits import (
    Kind,
    Ledger,
    LimitSet,
    arrival_keys,
    departure_keys,
    reason_of,
)
from services.orchestrator.scheduling.model import NodeView, Request, Rules
from services.orchestrator.scheduling.placement import Choice, Held, Nowhere, choose, refusal

_Rank = tuple[bool, float, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A move that goes now."""

    request: Request
    target: str
    because: str
    """Why there."""
    keys: tuple[str, ...]
    """The tokens that it holds from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A move that does not, and what holds it."""

    request: Request
    place: int
    """In the queue, from 1."""
    reason: str
    """Stable code: one of limits.REASONS, placement.HINTS, FROZEN, PAUSED, BACK_OFF,
    RESERVED, NEXT."""
    message: str
    hint: str = ""


@dataclass(slots=True)
class _Bucket:
    """What waits on one source."""

    ranks: list[_Rank] = field(default_factory=list)
    requests: dict[str, Request] = field(default_factory=dict)


@dataclass(slots=True)
class Schedule:
    """Nodes, held tokens, and what waits. Everything that is booked is booked here."""

    limits: LimitSet
    rules: Rules = field(default_factory=Rules)
    frozen: bool = False
    """The emergency stop: nothing is admitted. What is under way goes on (I14)."""
    ledger: Ledger = field(init=False)
    nodes: dict[str, NodeView] = field(default_factory=dict)
    _buckets: dict[str, _Bucket] = field(default_factory=dict)
    _sources: dict[str, str] = field(default_factory=dict)
    """Source by request id."""
    _running: dict[str, Admission] = field(default_factory=dict)
    _order: list[NodeView] = field(default_factory=list)
    _cursor: int = 0
    _stuck: dict[str, int] = field(default_factory=dict)
    """Request id → the generation of the fleet in which no node could take it."""
    _generation: int = 0
    _breakers: list[float] = field(default_factory=list)
    """When each open one lets moves through again; a heap."""

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.limits)

    # --- what is there ---

    def add_node(self, node: NodeView) -> None:
        """A node joins."""
        self.nodes[node.name] = node
        self._order.append(node)
        self._generation += 1

    def changed(self) -> None:
        """Something about a node changed: what could go nowhere may be able to go now."""
        self._generation += 1

    def open_breaker(self, node: str, until_s: float) -> None:
        """Nothing is placed on a node until then."""
        self.nodes[node].broken_until_s = until_s
        heapq.heappush(self._breakers, until_s)

    def set_limits(self, limits: LimitSet) -> None:
        """From now on these; who holds more than they allow keeps it."""
        self.limits = self.ledger.limits = limits

    def put(self, request: Request) -> None:
        """A move asks to be admitted."""
        bucket = self._buckets.setdefault(request.vm.node, _Bucket())
        insort(bucket.ranks, self.rules.rank(request))
        bucket.requests[request.request_id] = request
        self._sources[request.request_id] = request.vm.node

    def withdraw(self, request_id: str) -> Request | None:
        """It does not wait any more."""
        source = self._sources.pop(request_id, None)
        if source is None:
            return None
        bucket = self._buckets[source]
        request = bucket.requests.pop(request_id)
        del bucket.ranks[bisect_left(bucket.ranks, self.rules.rank(request))]
        if not bucket.ranks:
            del self._buckets[source]
        self._stuck.pop(request_id, None)
        return request

    def start(self, request: Request, target: str, keys: tuple[str, ...], because: str) -> None:
        """A move is under way: its tokens and its room are taken, whatever the limits say."""
        self.ledger.take(request.request_id, keys)
        if target in self.nodes:
            self.nodes[target].expect(request.vm)
        self._running[request.request_id] = Admission(
            request=request, target=target, because=because, keys=keys
        )

    def end(self, request_id: str, *, moved: bool) -> Admission | None:
        """It is over: every token and booking is given back, on every path."""
        admission = self._running.pop(request_id, None)
        self.ledger.release(request_id)
        if admission is None:
            return None
        vm, target = admission.request.vm, self.nodes.get(admission.target)
        source = self.nodes.get(vm.node)
        if target is not None:
            if moved:
                target.arrive(vm)
            else:
                target.unexpect(vm)
                self._generation += 1
        if moved and source is not None:
            source.leave(vm)
            if not source.draining:
                self._generation += 1
        return admission

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def running(self) -> dict[str, Admission]:
        """What was admitted and is not over."""
        return self._running

    # --- a pass ---

    def admit(self, now_s: float) -> list[Admission]:
        """Everything that can go now, in order; it is booked as going."""
        if self.frozen:
            return []
        while self._breakers and self._breakers[0] <= now_s:
            heapq.heappop(self._breakers)
            self._generation += 1
        admitted: list[Admission] = []
        reserved, first = self._reservation(now_s)
        heads = [
            (bucket.ranks[0], source, 0)
            for source, bucket in self._buckets.items()
            if self.ledger.free(f"{Kind.NODE_OUT}:{source}") > 0
        ]
        heapq.heapify(heads)
        passed_over: dict[str, int] = {}
        taken: list[str] = []
        while heads and self.ledger.free(Kind.CLUSTER) > 0:
            rank, source, index = heapq.heappop(heads)
            bucket = self._buckets[source]
            request = bucket.requests[rank[2]]
            ours = frozenset() if request.request_id == first else reserved
            outcome = self._consider(request, now_s, ours)
            if isinstance(outcome, Admission):
                self.start(outcome.request, outcome.target, outcome.keys, outcome.because)
                admitted.append(outcome)
                taken.append(request.request_id)
            else:
                passed_over[source] = passed_over.get(source, 0) + 1
            if (
                index + 1 < len(bucket.ranks)
                and passed_over.get(source, 0) <= self.rules.backfill_max
                and self.ledger.free(f"{Kind.NODE_OUT}:{source}") > 0
            ):
                heapq.heappush(heads, (bucket.ranks[index + 1], source, index + 1))
        for request_id in taken:
            self.withdraw(request_id)
        return admitted

    def _reservation(self, now_s: float) -> tuple[frozenset[str], str]:
        """Keys of which the last token is kept for the first in the queue, and who that is.

        Without it two limits that are never free at the same moment could starve it.
        """
        heads = [bucket.ranks[0] for bucket in self._buckets.values()]
        if not heads:
            return frozenset(), ""
        rank = min(heads)
        request = self._request(rank[2])
        waited_s = now_s - max(request.created_s, request.not_before_s)
        if waited_s < self.rules.reserve_after_s or request.paused:
            return frozenset(), ""
        if not isinstance(self._consider(request, now_s, frozenset()), Wait):
            return frozenset(), request.request_id
        if self._stuck.get(request.request_id) == self._generation:
            return frozenset(), ""  # no token would help it
        keys = departure_keys(request.vm.node, request.vm.placing.group)
        if request.target in self.nodes:
            keys += self._arrival_keys(request, self.nodes[request.target])
        return frozenset(keys), request.request_id

    def _request(self, request_id: str) -> Request:
        return self._buckets[self._sources[request_id]].requests[request_id]

    def _arrival_keys(self, request: Request, target: NodeView) -> tuple[str, ...]:
        return arrival_keys(target.name, self._link(request.vm.node), target.link)

    def _link(self, node: str) -> str:
        found = self.nodes.get(node)
        return found.link if found else ""

    def _consider(
        self, request: Request, now_s: float, reserved: frozenset[str]
    ) -> Admission | Wait:
        """Whether it could go now. Changes nothing but where the next search begins."""
        if request.paused:
            return self._wait(request, "PAUSED", request.paused)
        if now_s < request.not_before_s:
            left_s = request.not_before_s - now_s
            return self._wait(request, "BACK_OFF", f"tried again in {left_s:.0f} s")
        keys = departure_keys(request.vm.node, request.vm.placing.group)
        if key := self.ledger.lacking(keys, reserved):
            return self._held(request, key)
        if request.target:
            return self._consider_named(request, keys, now_s, reserved)
        if self._stuck.get(request.request_id) == self._generation:
            return self._wait(request, "NO_TARGET", "no node can take it")
        found = choose(
            request.vm,
            self._from_cursor(),
            self.ledger,
            source_link=self._link(request.vm.node),
            now_s=now_s,
            reserved=reserved,
            avoid=request.avoid,
            candidates_max=self.rules.candidates_max,
            passed=self._moved_on,
        )
        match found:
            case Choice():
                node = self.nodes[found.node]
                return Admission(
                    request=request,
                    target=found.node,
                    because=f"best of {found.compared}: {found.because}",
                    keys=keys + self._arrival_keys(request, node),
                )
            case Held():
                return self._wait(request, reason_of(found.key), found.message)
            case Nowhere():
                self._stuck[request.request_id] = self._generation
                return self._wait(request, found.check, found.message, found.hint)

    def _consider_named(
        self, request: Request, keys: tuple[str, ...], now_s: float, reserved: frozenset[str]
    ) -> Admission | Wait:
        node = self.nodes.get(request.target)
        if node is None:
            return self._wait(request, "NODE_UNKNOWN", f"there is no node {request.target}")
        if found := refusal(request.vm, node, now_s):
            return self._wait(request, found.check, found.reason, found.hint)
        arrival = self._arrival_keys(request, node)
        if key := self.ledger.lacking(arrival, reserved):
            return self._held(request, key)
        return Admission(
            request=request, target=node.name, because="asked for", keys=keys + arrival
        )

    def _from_cursor(self) -> Iterator[NodeView]:
        return chain(islice(self._order, self._cursor, None), islice(self._order, self._cursor))

    def _moved_on(self, count: int) -> None:
        if len(self._order) > self.rules.candidates_max:
            self._cursor = (self._cursor + count) % len(self._order)

    def _held(self, request: Request, key: str) -> Wait:
        if self.ledger.free(key) > 0:
            return self._wait(
                request, "RESERVED", f"{self.ledger.say(key)}, the next for whom waits longest"
            )
        return self._wait(request, reason_of(key), self.ledger.say(key))

    @staticmethod
    def _wait(request: Request, reason: str, message: str, hint: str = "") -> Wait:
        return Wait(request=request, place=0, reason=reason, message=message, hint=hint)

    # --- for people ---

    def requests(self) -> list[Request]:
        """Everything that waits, in order."""
        everything = heapq.merge(*(bucket.ranks for bucket in self._buckets.values()))
        return [self._request(rank[2]) for rank in everything]

    def waiting(self, now_s: float) -> list[Wait]:
        """Everything that waits, in order, each with its place and with what holds it."""
        return [
            self._explain(request, place, now_s)
            for place, request in enumerate(self.requests(), start=1)
        ]

    def _explain(self, request: Request, place: int, now_s: float) -> Wait:
        if self.frozen:
            found = self._wait(request, "FROZEN", "admissions are frozen", "godwit queue resume")
        else:
            self._stuck.pop(request.request_id, None)  # told in full
            cursor = self._cursor
            outcome = self._consider(request, now_s, frozenset())
            self._cursor = cursor
            if isinstance(outcome, Admission):
                found = self._wait(request, "NEXT", "goes at the next look at the queue")
            else:
                found = outcome
        return Wait(
            request=request,
            place=place,
            reason=found.reason,
            message=found.message,
            hint=found.hint,
        )
