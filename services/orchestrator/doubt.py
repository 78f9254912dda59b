# SPDX-License-Identifier: Apache-2.0
"""Whether the store may be older than what it has caused (I2), as far as agents can tell.

Three things show it: a node that obeys another store; a node that has seen an epoch that this store
never issued; a node that was told a decision that this store does not have. Each is evidence that
stays true, so doubt is never taken back here: `godwit store rebuild --from-agents` ends it, while
no orchestrator runs.

Found, it freezes at once what would make it worse (admissions, epochs, decisions, starts, stops),
and is then made durable, so that a later start does not need the same node to be there. What was
decided goes on: pages are served, guests activated, sources sealed; the agents refuse it where they
know better.
"""

from __future__ import annotations

import asyncio
import logging

from services.common.errors import GodwitError
from services.orchestrator.metrics import Metrics
from services.orchestrator.store import Store
from services.orchestrator.store.identity import StoreInDoubtError

log = logging.getLogger(__name__)

WRITE_RETRY_S = 1.0


class Doubt:
    """What speaks against the store."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._found = asyncio.Event()
        self.why = store.identity.in_doubt
        """Empty: nothing does."""
        metrics.store_in_doubt.set(bool(self.why))
        if self.why:
            log.error("the store is in doubt: %s", self.why)

    def found(self, why: str) -> None:
        """Something does, by evidence. The first reason stays."""
        if self.why:
            return
        self.why = why
        self._metrics.store_in_doubt.set(1)
        self._metrics.invariant_violations.labels("I2").inc()
        log.error("the store is in doubt from now on: %s", why)
        self._found.set()

    def read_again(self) -> None:
        """What the store itself says may be newer than what this process has found."""
        if why := self._store.identity.in_doubt:
            self.why = self.why or why
            self._metrics.store_in_doubt.set(1)

    def require_none(self) -> None:
        """Refuse what would make it worse.

        Raises:
            StoreInDoubtError: the store is not to be believed.
        """
        if self.why:
            raise StoreInDoubtError(self.why)

    def hear_hello(self, node: str, obeys: str) -> None:
        """A node says which store it obeys; empty: none yet, or it is too old to know."""
        own = self._store.identity.incarnation
        if obeys and obeys != own:
            self.found(f"node {node} obeys store {obeys}, this one is {own}")

    def hear_epoch(self, node: str, vm_id: str, seen: int, issued: int) -> None:
        """A node has seen an epoch; `issued` was read from the store *after* the node was asked."""
        if seen > issued:
            self.found(
                f"node {node} has seen epoch {seen} of {vm_id}, the store has issued {issued}"
            )

    async def keep(self) -> None:
        """Make what is found durable. A task of the process."""
        await self._found.wait()
        while True:
            try:
                await self._store.identity.doubt(self.why)
            except GodwitError:
                log.exception("the doubt about the store could not be written")
                await asyncio.sleep(WRITE_RETRY_S)
            else:
                return
