# SPDX-License-Identifier: Apache-2.0
"""What an agent may say in a progress stream: nothing left out, and not too much. Sans-IO.

A delta that is lost is healed by ending the stream: the next one begins with the bitmap whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2

from services.common.errors import ResourceExhaustedError, UnavailableError

MESSAGES_PER_S = 200.0
"""Of one arrival, for as long as it lasts. An agent is asked for four, and sends 50 at most."""
MESSAGES_BURST = 1_000.0
RUNS_PER_S = 1e6
RUNS_BURST = 2e7
"""A bitmap that is told whole: of 64 GiB with every second page absent it has 8e6."""


@dataclass(slots=True)
class Bucket:
    """So much a second, and `burst` at once."""

    per_s: float
    burst: float
    left: float
    at_s: float

    @classmethod
    def full(cls, per_s: float, burst: float, now_s: float) -> Bucket:
        """As it is at first."""
        return cls(per_s=per_s, burst=burst, left=burst, at_s=now_s)

    def take(self, amount: float, now_s: float) -> bool:
        """False: it is not there; then nothing is taken."""
        self.left = min(self.burst, self.left + (now_s - self.at_s) * self.per_s)
        self.at_s = now_s
        if amount > self.left:
            return False
        self.left -= amount
        return True


class ProgressGuard:
    """Of one arrival, over all its streams: who floods in one has not more in the next."""

    def __init__(self, node: str, now_s: float) -> None:
        self._node = node
        self._messages = Bucket.full(MESSAGES_PER_S, MESSAGES_BURST, now_s)
        self._runs = Bucket.full(RUNS_PER_S, RUNS_BURST, now_s)
        self._last = 0

    def begin(self) -> None:
        """A new stream."""
        self._last = 0

    def check(self, message: agent_pb2.WatchProgressResponse, now_s: float) -> None:
        """Let a message through.

        Raises:
            UnavailableError: DELTA_LOST: begin anew.
            ResourceExhaustedError: AGENT_FLOODS: begin anew, later.
        """
        delta = message.bitmap_delta
        runs = len(delta.absent_runs) + len(delta.resident_runs)
        if not (self._messages.take(1, now_s) and self._runs.take(runs, now_s)):
            raise ResourceExhaustedError(
                "AGENT_FLOODS",
                f"{self._node} says more of an arrival than {MESSAGES_PER_S:g} messages or"
                f" {RUNS_PER_S:g} runs a second",
                hint=f"look at the agent of {self._node}: is it ours, and of this version?",
            )
        if message.sequence != self._last + 1 or (message.sequence == 1) != delta.whole:
            raise UnavailableError(
                "DELTA_LOST",
                f"{self._node} has sent message {message.sequence} after {self._last}",
            )
        self._last = message.sequence
