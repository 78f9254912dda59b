# SPDX-License-Identifier: Apache-2.0
"""Which of several orchestrators leads. Liveness only: what is safe is safe without it (I13).

On PostgreSQL by a lease in the store, measured by the server's clock and renewed by the leader. It
runs out if the leader is gone, stopped or cut off; the next candidate raises the term, and from
then on the store refuses every write of the former one, whatever that one believes. A leader that
could not renew for the length of a lease by its own clock, which goes on while a process is
stopped, ceases by itself.

On a file, by a lock that the kernel gives back when its holder ends: nobody waits for a lease after
a crash, and nobody takes over from a process that is merely stopped: on one host that is the
operator's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import sqlalchemy as sa
from ulid import ULID

from services.common.errors import FailedPreconditionError
from services.orchestrator.store import Store, StoreError, identity, leadership
from services.orchestrator.store.leadership import NOBODY, STANDBY, Leader, NotLeaderError

log = logging.getLogger(__name__)

LEASE_S = 5.0
"""A guest that stands still when the leader dies waits for so long."""
RENEWALS = 4
"""How often a lease is renewed in its length."""
POLL_S_MAX = 1.0
RESIGN_S_MAX = 1.0
"""A store that does not answer is not told; the lease runs out by itself."""


class StoreChangedError(FailedPreconditionError):
    """The store became another one while this process stood by."""

    def __init__(self, was: str, now: str) -> None:
        super().__init__(
            "STORE_CHANGED",
            f"the store was {was} when it was opened and is {now}: it was rebuilt or restored",
            hint="start this orchestrator again",
        )


class StoreNotDurableError(StoreError):
    """What is decided here might be forgotten (I2): nobody leads."""

    def __init__(self, why: str) -> None:
        super().__init__(
            "STORE_NOT_DURABLE",
            why,
            hint="docs/design/store.md, Synchronous standbys",
        )


class Role:
    """What this process is, for whoever asks. A process without an election leads."""

    def __init__(self, name: str = "", *, rest: str = "", grpc: str = "") -> None:
        self.name = name
        self.rest = rest
        self.grpc = grpc
        """Where this process is called, as far as it is known yet."""
        self.leads = True
        self.leader = NOBODY
        self.hindrance = ""
        """Why nobody can lead, as far as this process sees."""
        self.watch: list[Callable[[bool], None]] = []
        """Told of each change."""

    def require(self) -> None:
        """Refuse a change.

        Raises:
            NotLeaderError: this process stands by.
        """
        if not self.leads:
            raise NotLeaderError(self.leader)

    def hindered_by(self, why: str) -> None:
        """Nobody can lead."""
        self.leader, self.hindrance = NOBODY, why

    def become(self, leader: Leader, *, leads: bool) -> None:
        """Who leads now."""
        changed = leads is not self.leads
        self.leader, self.leads, self.hindrance = leader, leads, ""
        if changed:
            for told in self.watch:
                told(leads)


class Election:
    """Stands by, and leads whenever nobody else does. `run` is its life."""

    def __init__(
        self, store: Store, role: Role, *, lease_s: float = LEASE_S, file: Path | None = None
    ) -> None:
        """`file`: of the store, if it is one."""
        self._store = store
        self._role = role
        self._lease_s = lease_s
        self._file = file
        self._until = 0.0
        store.database.term = STANDBY
        role.become(NOBODY, leads=False)

    async def run(
        self, lead: Callable[[], AbstractAsyncContextManager[None]], settled: Callable[[], None]
    ) -> None:
        """For ever. `settled` is called once it is known, at first, whether this process leads.

        Raises:
            StoreChangedError: start again.
        """
        while True:
            with self._seat() as free:
                if free and await self.claim():
                    await self._lead(lead, settled)
                    continue
            settled()
            await asyncio.sleep(min(POLL_S_MAX, self._lease_s / RENEWALS))

    async def _lead(
        self, lead: Callable[[], AbstractAsyncContextManager[None]], settled: Callable[[], None]
    ) -> None:
        """Until somebody else leads, or might. The lease is kept while `lead` comes to its end."""
        async with self.kept() as lost, lead():
            if not lost.is_set():
                self._role.become(self._role.leader, leads=True)
            settled()
            await lost.wait()

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[asyncio.Event]:
        """Renew the lease for the length of the block, then give it back. The event: it is lost."""
        lost = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                keeping = group.create_task(self._keep(lost))
                try:
                    yield lost
                finally:
                    keeping.cancel()
        finally:
            await self._resign()

    @contextlib.contextmanager
    def _seat(self) -> Iterator[bool]:
        """The lock of a file, while it is had. True: it is worth trying."""
        if self._file is None:
            yield True
            return
        fd = os.open(f"{self._file}.leader", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(fd)

    async def claim(self) -> bool:
        """Lead, if nobody else does.

        Raises:
            StoreError: of a file: nobody else will mend that.
            StoreChangedError: start again.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            leader = await self._store.database.read(leadership.read)
            if self._file is not None or not await self._is_led(leader):
                leader = await self._store.database.claim(self._take)
            if leader.holder != self._role.name:
                self._role.become(leader, leads=False)
                return False
            self._store.database.term = leader.term
            self._until = began + self._lease_s
            await self._look_at_store()
        except StoreError as error:
            if self._file is not None:
                raise
            log.warning("nobody can be elected: %s", error)
            self._role.hindered_by(str(error))
            self._store.database.term = STANDBY
            return False
        log.info("%s leads in term %d", self._role.name, leader.term)
        self._role.become(leader, leads=False)  # nothing is admitted before it can be moved
        return True

    def _take(self, connection: sa.Connection) -> Leader:
        self._require_durable(connection)
        return leadership.claim(
            connection,
            holder=self._role.name,
            rest=self._role.rest,
            grpc=self._role.grpc,
            lease_ns=int(self._lease_s * 1e9),
            alone=self._file is not None,
        )

    def _require_durable(self, connection: sa.Connection) -> None:
        if why := self._store.database.hindrance(connection):
            raise StoreNotDurableError(why)

    async def _is_led(self, leader: Leader) -> bool:
        now_ns = await self._store.database.read(leadership.now_ns)
        return leader.expires_at_ns > now_ns

    async def _look_at_store(self) -> None:
        """It may have become another one since it was opened."""
        known = await self._store.database.read(identity.read)
        if known[identity.INCARNATION] != self._store.incarnation:
            raise StoreChangedError(self._store.incarnation, known[identity.INCARNATION])
        self._store.identity.in_doubt = known.get(identity.IN_DOUBT, "")

    async def _keep(self, lost: asyncio.Event) -> None:
        if self._file is not None:
            await asyncio.Event().wait()
        while await self._renewed():  # noqa: ASYNC110 - there is nothing to wait for
            await asyncio.sleep(self._lease_s / RENEWALS)
        self._role.become(NOBODY, leads=False)
        lost.set()

    async def _resign(self) -> None:
        leader = self._mine()
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(RESIGN_S_MAX):
                await self._store.database.write(
                    lambda connection: leadership.release(connection, leader)
                )
        self._store.database.term = STANDBY
        self._role.become(NOBODY, leads=False)

    async def _renewed(self) -> bool:
        loop, lease_ns = asyncio.get_running_loop(), int(self._lease_s * 1e9)

        def renew(connection: sa.Connection) -> None:
            self._require_durable(connection)
            leadership.renew(connection, leader, lease_ns=lease_ns)

        began = loop.time()
        leader = self._mine()
        if began >= self._until:
            log.error("%s leads no more: no renewal for %s s", leader.holder, self._lease_s)
            return False
        try:
            async with asyncio.timeout_at(self._until):
                await self._store.database.write(renew)
        except (NotLeaderError, StoreNotDurableError) as error:
            log.error("%s leads no more: %s", leader.holder, error)
            return False
        except (StoreError, TimeoutError) as error:
            log.warning("the lease was not renewed: %s", error)
        else:
            self._until = began + self._lease_s
            self._role.leader = leader
        return True

    def _mine(self) -> Leader:
        role = self._role
        return Leader(
            term=self._store.database.term or 0,
            holder=role.name,
            rest=role.rest,
            grpc=role.grpc,
            expires_at_ns=0,
        )


@contextlib.asynccontextmanager
async def alone(store: Store, *, lease_s: float = LEASE_S) -> AsyncIterator[None]:
    """Lead for the length of the block, as a tool does on PostgreSQL: nobody else does meanwhile.

    Raises:
        FailedPreconditionError: STORE_IN_USE.
    """
    role = Role(f"{socket.gethostname()}/{ULID()}")
    election = Election(store, role, lease_s=lease_s)
    if not await election.claim():
        raise FailedPreconditionError(
            "STORE_IN_USE",
            f"{role.leader.holder or 'somebody'} leads",
            hint="stop the orchestrators first; VMs run on and pages are served without them",
        )
    async with election.kept():
        yield
