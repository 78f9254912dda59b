# SPDX-License-Identifier: Apache-2.0
"""Whom to ask, of several orchestrators of which one leads: sans-IO, for both clients.

One that stands by answers what is asked and refuses every change with NOT_LEADER, which says that
nothing was done, and often who leads. So another may be asked: the one that was named, then the
others, each at most once, and all of them once more after a while, in which they may elect one. It
is the same where no connection came about. Whatever else fails is not tried elsewhere: it may have
been done.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

PAUSE_S = 1.0
"""Before everybody is asked once more."""
ROUNDS = 2
HINTS_MAX = 3
"""Orchestrators that name each other in a circle are not followed for ever."""


def split_urls(url: str | Sequence[str]) -> tuple[str, ...]:
    """URLs, or one text with commas between them, without what stands twice."""
    texts = url.split(",") if isinstance(url, str) else url
    return tuple(dict.fromkeys(text.strip().rstrip("/") for text in texts if text.strip()))


class Route:
    """The orchestrators. `url` is asked first: it answered last."""

    def __init__(self, urls: Sequence[str]) -> None:
        """`urls`: at least one.

        Raises:
            ValueError: there is none.
        """
        self.urls = tuple(urls)
        if not self.urls:
            raise ValueError("no orchestrator's URL is given")
        self.url = self.urls[0]

    def attempts(self) -> Attempts:
        """Of one request."""
        return Attempts(self)

    def lost(self, url: str) -> None:
        """The stream from there broke: the next one is taken up from the next orchestrator."""
        if url == self.url:
            there = self.urls.index(url) if url in self.urls else -1
            self.url = self.urls[(there + 1) % len(self.urls)]


class Attempts:
    """One request, asked of one orchestrator after another."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._left: list[str] = []
        self._rounds = 0
        self._hints = 0
        self._refill()

    def _refill(self) -> None:
        self._rounds += 1
        self._left = list(dict.fromkeys((self._route.url, *self._route.urls)))

    def take(self) -> str:
        """Whom to ask now. There is one at the beginning, and after `goes_on`."""
        return self._left.pop(0)

    def answered(self, url: str) -> None:
        """It has done it, or refuses for good."""
        self._route.url = url

    def goes_on(self, url: str, named: str = "") -> float | None:
        """`url` has not done it. Seconds until the next one is asked; None: that is all.

        `named`: HOST:PORT of the leader, as `url` says.
        """
        if named and self._hints < HINTS_MAX:
            self._hints += 1
            leader = f"{urlsplit(url).scheme}://{named}"
            if leader != url:
                self._left = [leader, *(each for each in self._left if each != leader)]
        if self._left:
            return 0.0
        if self._rounds == ROUNDS or (len(self._route.urls) == 1 and not self._hints):
            return None
        self._refill()
        return PAUSE_S
