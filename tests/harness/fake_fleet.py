# SPDX-License-Identifier: Apache-2.0
"""An orchestrator, as it is, over fake agents, all in one process and over real connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pydantic
import sqlalchemy as sa

from services.common.listen import Address
from services.orchestrator import rest_models
from services.orchestrator.agents import Deadlines
from services.orchestrator.auth.settings import AuthSettings
from services.orchestrator.main import Core, Settings, orchestrating, working
from services.orchestrator.move import Limits
from services.orchestrator.store import schema
from tests.harness.fake_agent import FakeAgent, World, spec_json
from tests.harness.stores import Place

VM = "vm-1"
LOOPBACK = Address(host="127.0.0.1", port=0)
LIMITS = Limits(
    validating_s=20,
    preparing_s=20,
    patience_s=0.5,
    switchover_s=3,
    doubt_s=0.3,
    destination_proof_s=0.3,
    alarm_s=0.5,
    retry_s_min=0.01,
    retry_s_max=0.1,
    progress_ms=10,
    progress_write_s=0.02,
    source_check_s=0.05,
    poll_s=0.5,
    settle_s=0.2,
    drain_s=0,
)
DEADLINES = Deadlines(
    hello_s=5,
    describe_s=3,
    pause_s=1,
    transfer_s=2,
    activate_s=1,
    seal_s=1,
    undo_s=1,
    release_s=1,
    connect_s=0.7,
)
WAIT_S = 20.0
"""A test that waits longer has hung. Never part of what a test asserts."""


POLL_S = 0.01


async def eventually(
    what: Callable[[], Awaitable[Any]] | Callable[[], Any], *, wait_s: float = WAIT_S
) -> Any:
    """Wait until `what` is true and return it."""
    async with asyncio.timeout(wait_s):
        while True:
            answer = what()
            if isinstance(answer, Awaitable):
                answer = await answer
            if answer:
                return answer
            await asyncio.sleep(POLL_S)


class FakeFleet:
    """Agents a, b and c, and an orchestrator that can be crashed and started again."""

    def __init__(
        self,
        directory: Path,
        *,
        limits: Limits = LIMITS,
        listening: bool = False,
        server: str = "",
        auth: AuthSettings | None = None,
    ) -> None:
        """Not `listening`: REST is called in process, gRPC not at all. `server`: of the store."""
        self._auth = auth or AuthSettings()
        self.world = World()
        self.agents = {name: FakeAgent(name, self.world) for name in "abc"}
        self.store = directory / "godwit.db"
        self.server = server
        """URL of the store if it is on PostgreSQL."""
        self.limits = limits
        self.deadlines = DEADLINES
        self.grpc: Address | None = None
        """Where gRPC is served, if it is."""
        self._listening = listening
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._core: Core | None = None
        self._http: httpx.AsyncClient | None = None

    @property
    def place(self) -> Place:
        """What `--store` names."""
        return self.server or self.store

    @property
    def a(self) -> FakeAgent:
        """The source in most tests."""
        return self.agents["a"]

    @property
    def b(self) -> FakeAgent:
        """The destination in most tests."""
        return self.agents["b"]

    @property
    def core(self) -> Core:
        """The orchestrator that runs."""
        assert self._core is not None
        return self._core

    @property
    def http(self) -> httpx.AsyncClient:
        """A client of its REST."""
        if self._http is None:
            app = self.core.build_app()
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            self._http = httpx.AsyncClient(base_url="http://fleet", transport=transport)
        return self._http

    async def start(self) -> None:
        """Start an orchestrator on the store."""
        started: asyncio.Future[Core] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._serve(started, self._stop))
        waiting: set[asyncio.Future[Any]] = {self._task, started}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            await self._task
        self._core = started.result()

    async def _serve(self, started: asyncio.Future[Core], stop: asyncio.Event) -> None:
        settings = Settings(
            store=self.place,
            rest=LOOPBACK,
            grpc=LOOPBACK,
            nodes=tuple((name, str(agent.address)) for name, agent in self.agents.items()),
            limits=self.limits,
            deadlines=self.deadlines,
            auth=self._auth,
        )
        async with contextlib.AsyncExitStack() as stack:
            if self._listening:
                running = await stack.enter_async_context(orchestrating(settings))
                self.grpc, core = running.grpc, running.core
                url = f"http://{running.rest}"
                client = httpx.AsyncClient(base_url=url, timeout=WAIT_S)
                self._http = await stack.enter_async_context(client)
            else:
                core = await stack.enter_async_context(working(settings))
            started.set_result(core)
            await stop.wait()

    async def stop(self) -> None:
        """End the orchestrator: every task is cancelled where it stands; nothing is written."""
        if self._task:
            self._stop.set()
            await self._task
            self._task = self._core = self._http = None

    async def be_patient(self) -> None:
        """No move fails from now on because the machine is busy: for tests where nothing is lost.

        The next orchestrator knows it, so that there is one.
        """
        self.limits = replace(self.limits, patience_s=WAIT_S, switchover_s=WAIT_S)
        self.deadlines = replace(
            DEADLINES,
            **dict.fromkeys(("pause_s", "transfer_s", "activate_s", "seal_s"), WAIT_S),
            **dict.fromkeys(("undo_s", "release_s", "connect_s", "describe_s"), WAIT_S),
        )
        await self.restart()

    async def restart(self) -> None:
        """Another orchestrator takes over the same store."""
        await self.stop()
        await self.start()

    async def get(self, path: str) -> Any:
        """GET, which must succeed."""
        response = await self.http.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """POST."""
        return await self.http.post(path, json=body, headers=headers)

    async def start_vm(self, vm_id: str = VM, node: str = "a") -> None:
        """Start a VM."""
        await self.core.fleet.start_vm(node, spec_json(vm_id))

    async def reachable(self, node: str) -> None:
        """Wait until a node that came back was seen."""

        async def look() -> bool:
            return (await self.core.fleet.get_node(node)).reachable

        await eventually(look)

    # What follows asks the service layer itself, in REST's words: hundreds of tests wait with it.

    async def migrate(self, to: str = "b", vm_id: str = VM) -> str:
        """Ask for a move; its id."""
        return (await self.core.fleet.create_migration(vm_id, to)).migration_id

    async def cancel(self, migration_id: str) -> Any:
        """Ask for a cancel."""
        return _json(rest_models.Migration.of(await self.core.fleet.cancel_migration(migration_id)))

    async def vm(self, vm_id: str = VM) -> Any:
        """A VM."""
        return _json(rest_models.Vm.of(await self.core.fleet.get_vm(vm_id)))

    async def bitmap(self, vm_id: str = VM) -> Any:
        """A VM's userfault bitmap."""
        found = await self.core.fleet.userfault_bitmap(vm_id)
        return _json(rest_models.UserfaultBitmap.of(found))

    async def migration(self, migration_id: str) -> Any:
        """A migration."""
        return _json(rest_models.Migration.of(await self.core.fleet.get_migration(migration_id)))

    async def until_queued(self, count: int) -> None:
        """Wait until so many migrations wait for admission."""

        async def look() -> bool:
            return len((await self.get("/v1/queue"))["entries"]) == count

        await eventually(look)

    async def ended(self, migration_id: str) -> Any:
        """A migration once it is terminal."""
        return await self.until(migration_id, lambda each: each["phase"] in _TERMINAL)

    async def in_phase(self, migration_id: str, phase: str) -> Any:
        """A migration once it is in a phase."""
        return await self.until(migration_id, lambda each: each["phase"] == phase)

    async def until(self, migration_id: str, holds: Callable[[Any], bool]) -> Any:
        """A migration once something holds of it."""
        changes = self.core.context.changes
        async with asyncio.timeout(WAIT_S):
            with changes.subscribe(migration_id) as changed:
                while True:
                    changed.clear()
                    found = await self.migration(migration_id)
                    if holds(found):
                        return found
                    await changed.wait()

    async def dump(self) -> list[str]:
        """Every row of the store but the leader's, which is renewed: proof of no change."""

        def work(connection: sa.Connection) -> list[str]:
            return [
                f"{table.name}: {row}"
                for table in schema.metadata.sorted_tables
                if table is not schema.leadership
                for row in sorted(map(repr, connection.execute(sa.select(table))))
            ]

        return await self.core.context.store.database.read(work)


_TERMINAL = ("succeeded", "failed", "cancelled", "lost", "returned")


def _json(model: pydantic.BaseModel) -> Any:
    return model.model_dump(mode="json")


@contextlib.asynccontextmanager
async def fake_fleet(
    directory: Path,
    *,
    limits: Limits = LIMITS,
    listening: bool = False,
    server: str = "",
    auth: AuthSettings | None = None,
) -> AsyncIterator[FakeFleet]:
    """A fleet with a running orchestrator and VM `vm-1` on node a."""
    fleet = FakeFleet(directory, limits=limits, listening=listening, server=server, auth=auth)
    try:
        for agent in fleet.agents.values():
            await agent.start()
        await fleet.start()
        await fleet.start_vm()
        yield fleet
    finally:
        await fleet.stop()
        for agent in fleet.agents.values():
            await agent.kill()
