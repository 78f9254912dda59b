# SPDX-License-Identifier: Apache-2.0
"""Memory that flows through shared cards and uplinks: each gets an equal share of each of them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Flow:
    """One move's memory."""

    move_id: str
    pipes: tuple[str, ...]
    left_bytes: float
    rate: float = 0.0
    at_s: float = 0.0
    """When `left_bytes` was true."""
    version: int = 0
    """Of its predicted end: an older prediction is void."""


@dataclass(slots=True)
class Network:
    """Pipes and what flows through them."""

    bytes_per_s: dict[str, float] = field(default_factory=dict)
    down: set[str] = field(default_factory=set)
    _through: dict[str, dict[str, Flow]] = field(default_factory=dict)
    _flows: dict[str, Flow] = field(default_factory=dict)

    def begin(self, flow: Flow, now_s: float) -> list[Flow]:
        """A flow begins; returns those whose end has to be predicted anew."""
        flow.at_s = now_s
        self._flows[flow.move_id] = flow
        for pipe in flow.pipes:
            self._through.setdefault(pipe, {})[flow.move_id] = flow
        return self._share(flow.pipes, now_s)

    def end(self, move_id: str, now_s: float) -> list[Flow]:
        """It is over; returns those that get more now."""
        flow = self._flows.pop(move_id)
        for pipe in flow.pipes:
            del self._through[pipe][move_id]
        return self._share(flow.pipes, now_s)

    def cut(self, pipe: str, now_s: float, *, down: bool) -> list[Flow]:
        """A pipe fails, or is mended."""
        (self.down.add if down else self.down.discard)(pipe)
        return self._share((pipe,), now_s)

    def flow(self, move_id: str) -> Flow | None:
        """One that flows."""
        return self._flows.get(move_id)

    def _share(self, pipes: tuple[str, ...], now_s: float) -> list[Flow]:
        changed: list[Flow] = []
        for flow in {
            each.move_id: each for pipe in pipes for each in self._through.get(pipe, {}).values()
        }.values():
            rate = min(
                0.0 if pipe in self.down else self.bytes_per_s[pipe] / len(self._through[pipe])
                for pipe in flow.pipes
            )
            if rate != flow.rate:
                flow.left_bytes = max(flow.left_bytes - flow.rate * (now_s - flow.at_s), 0.0)
                flow.rate, flow.at_s = rate, now_s
                flow.version += 1
                changed.append(flow)
        return changed
