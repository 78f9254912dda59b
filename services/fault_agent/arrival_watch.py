# SPDX-License-Identifier: Apache-2.0
"""Follows one arrival engine from the event loop.

The engine needs nobody: it fetches, installs, reconnects in its own threads. Here its changes of
phase are noticed (an eventfd), its counters cached for whoever asks, and the last page turned into
MEMORY_COMPLETE by a callback.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from services.fault_agent.evidence import final_counters
from services.fault_agent.journal import Counters
from services.pagecore.api import Arrival, ArrivalPhase, ArrivalStatus, Hold

log = logging.getLogger(__name__)

UP = frozenset(
    {
        ArrivalPhase.ARMED,
        ArrivalPhase.FETCHING,
        ArrivalPhase.NO_MEMORY,
        ArrivalPhase.COMPLETE,
    }
)
"""Phases in which both lanes were up."""
STUCK = frozenset({ArrivalPhase.REFUSED, ArrivalPhase.VIOLATION, ArrivalPhase.ENDED})
"""Phases that the engine does not leave by itself."""


class ArrivalWatch:
    """One engine, watched. Made inside the running loop."""

    def __init__(
        self,
        arrival: Arrival,
        *,
        epoch: int,
        on_change: Callable[[ArrivalStatus], None],
        holds_seen: int = 0,
        adopted: bool = False,
    ) -> None:
        """`holds_seen`: how many outages a predecessor has accounted for already.

        `adopted`: it is a predecessor's arrival, so its beginning was seen by nobody here.
        """
        self.adopted = adopted
        self._holds_seen = holds_seen
        self.arrival = arrival
        self.epoch = epoch
        self._on_change = on_change
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._fd = arrival.fileno()
        self._closed = False
        self.status = arrival.status()
        """As of the last change or `refresh`."""
        self._loop.add_reader(self._fd, self._on_event)

    @property
    def closed(self) -> bool:
        """The engine is gone."""
        return self._closed

    @property
    def counters(self) -> Counters:
        """The cached ones."""
        return final_counters(self.status)

    def new_holds(self) -> list[Hold]:
        """Outages that are over and were not told of before: each once."""
        new = [hold for hold in self.status.holds if hold.number > self._holds_seen]
        self._holds_seen = max(self._holds_seen, self.status.hold_count)
        return new

    def refresh(self) -> ArrivalStatus:
        """Look at the engine now; after `close`, what was seen last."""
        if not self._closed:
            self.status = self.arrival.status()
        return self.status

    def wake(self) -> None:
        """Let everybody in `wait_change` look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_change(self, timeout_s: float | None = None) -> None:
        """Return after the next change of phase, or after `timeout_s`."""
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await changed.wait()

    async def wait_up(self, timeout_s: float) -> ArrivalStatus:
        """Return once both lanes are up, or the engine is stuck, or `timeout_s` is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.refresh().phase not in UP | STUCK:
                    await self.wait_change()
        return self.refresh()

    async def close(self) -> None:
        """Stop the engine. The guest stays blocked on what is absent. Idempotent."""
        if self._closed:
            return
        self.refresh()
        self._closed = True
        self._loop.remove_reader(self._fd)
        await asyncio.to_thread(self.arrival.close)
        self.wake()

    def _on_event(self) -> None:
        self.arrival.drain_events()
        status = self.refresh()
        self.wake()
        self._on_change(status)
