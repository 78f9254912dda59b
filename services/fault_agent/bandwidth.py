# SPDX-License-Identifier: Apache-2.0
"""What guests that arrive from one host have of the bandwidth between it and us, by weight.

One pacer a host; whoever has nothing to ask for leaves its share to the others. Demand is never
paced.
"""

from __future__ import annotations

import contextlib

from services.pagecore.api import Arrival, Pacer, PageCore


class Bandwidth:
    """The pacers of a node's arrivals. One event loop."""

    def __init__(self, pagecore: PageCore, bytes_per_s_max: int) -> None:
        """`bytes_per_s_max`: of bulk from one host, all its guests together; 0: no limit."""
        self._pagecore = pagecore
        self._bytes_per_s_max = bytes_per_s_max
        self._pacers: dict[str, Pacer] = {}
        """By numeric address of the page server. Hosts are few, so none is ever forgotten."""

    def share(self, arrival: Arrival, host: str, weight: int) -> None:
        """Have an arrival from `host` join the others, before it starts.

        One that is sent to another page server later stays with those it began with.

        Raises:
            OSError: EINVAL: weight.
        """
        # Without a limit there is nothing to deal out: the network does.
        if self._bytes_per_s_max == 0:
            return
        pacer = self._pacers.get(host)
        if pacer is None:
            pacer = self._pacers[host] = self._pagecore.create_pacer(self._bytes_per_s_max)
        arrival.share(pacer, weight)

    def close(self) -> None:
        """Let go of them; arrivals go on under their last share. Idempotent."""
        with contextlib.ExitStack() as stack:
            while self._pacers:
                stack.callback(self._pacers.popitem()[1].close)
