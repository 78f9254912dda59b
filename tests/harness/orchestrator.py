# SPDX-License-Identifier: Apache-2.0
"""Real orchestrator processes, several of them on one store."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.harness.fake_fleet import eventually

START_S_MAX = 90.0


class Process:
    """An orchestrator. Its name in PostgreSQL is that of its application."""

    def __init__(self, name: str, directory: Path, store: str, nodes: Mapping[str, str]) -> None:
        self.name = name
        self.hooks = directory / f"{name}.hooks"
        self.log = directory / f"{name}.log"
        self._store = store
        self._nodes = nodes
        self._process: asyncio.subprocess.Process | None = None
        self._http: httpx.AsyncClient | None = None

    async def start(self, *, lease_s: float = 2.0) -> None:
        """Start it and wait until it listens."""
        self.hooks.mkdir(exist_ok=True)
        nodes = [word for name, at in self._nodes.items() for word in ("--node", f"{name}={at}")]
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "services.orchestrator", "--store", self._store),
                *("--rest", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--lease", str(lease_s)),
                *nodes,
                env={
                    **os.environ,
                    "GODWIT_HOOKS_DIR": str(self.hooks),
                    "PGAPPNAME": f"orchestrator-{self.name}",
                },
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_S_MAX):
            line = (await self._process.stdout.readline()).decode()
        assert line.startswith("listening rest="), self.log.read_text()
        rest = line.split()[1].removeprefix("rest=")
        self._http = httpx.AsyncClient(base_url=f"http://{rest}", timeout=START_S_MAX)

    @property
    def http(self) -> httpx.AsyncClient:
        """A client of its REST."""
        assert self._http is not None
        return self._http

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """End it; its exit status."""
        if self._process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
        status = await self._process.wait()
        self._process = None
        if self._http is not None:
            await self._http.aclose()
        return status

    async def get(self, path: str) -> Any:
        """GET, which must succeed."""
        response = await self.http.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    async def leads(self) -> None:
        """Wait until it does."""
        await eventually(self._leads, wait_s=START_S_MAX)

    async def stands_by(self, leader: Process) -> None:
        """Wait until it knows that `leader` leads."""
        rest = str(leader.http.base_url).removeprefix("http://")

        async def knows() -> bool:
            ready = await self.get("/readyz")
            return not ready["leads"] and ready["leader_rest"] == rest

        await eventually(knows, wait_s=START_S_MAX)

    async def _leads(self) -> bool:
        return bool((await self.get("/readyz"))["leads"])

    async def ended(self, migration_id: str) -> Any:
        """A migration, as this one says, once it is terminal."""

        async def terminal() -> Any:
            found = await self.get(f"/v1/migrations/{migration_id}")
            return found if found["phase"] in ("succeeded", "failed", "cancelled") else None

        return await eventually(terminal, wait_s=START_S_MAX)
