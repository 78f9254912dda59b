# SPDX-License-Identifier: Apache-2.0
"""A thousand watchers of an orchestrator with years of history: `make bench-watchers`.

A real orchestrator process on one core, over real sockets, on SQLite and on PostgreSQL, with
200 000 migrations that have ended. On the other core: the watchers, an agent for each of two nodes,
and a process that lists. Changes are migrations that are asked for and cancelled while admissions
are frozen. The delay of an event is from before its request is sent until a watcher has its bytes:
the request, the commit and the watchers' own reading are in it. The bars are that every watcher
hears of every change, that nobody is cut, and that lists are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from services.orchestrator.store import open_store
from tests.bench import lister
from tests.bench.store import HISTORY, Sample, directory, make_history, status_kib, sync_ms
from tests.harness import postgres
from tests.harness.fake_agent import FakeAgent, World, spec

WATCHERS = 1000
VMS = 40
HEARD_S_MAX = 20.0
START_S_MAX = 120.0
CONNECT_AT_ONCE = 50
_PENDING = re.compile(
    rb'event: migration\ndata: {"migration_id":"[^"]+","vm_id":"([^"]+)"[^\n]*?"phase":"pending"'
    rb'[^\n]*?"version":1,'
)
_LAST = b"\n\n"


@dataclass(slots=True)
class Heard:
    """What the watchers hear."""

    vm_id: bytes = b""
    """Of the change that is listened for."""
    began: float = 0.0
    delays_s: list[float] = field(default_factory=list)
    left: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)
    lost: int = 0
    """Streams that ended."""
    received_bytes: int = 0

    def listen(self, vm_id: str, watchers: int) -> None:
        """For the first event of a VM's migration, from now on."""
        self.vm_id, self.left = vm_id.encode(), watchers
        self.done.clear()
        self.began = time.perf_counter()

    def hear(self, block: bytes) -> None:
        """A whole event."""
        found = _PENDING.search(block)
        if found and found[1] == self.vm_id:
            self.delays_s.append(time.perf_counter() - self.began)
            self.left -= 1
            if not self.left:
                self.done.set()


class Watcher(asyncio.Protocol):
    """One connection that watches the fleet."""

    def __init__(self, heard: Heard) -> None:
        self._heard = heard
        self._rest = b""
        self.began = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        request = b"GET /v1/events HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\n\r\n"
        transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Some events."""
        self._heard.received_bytes += len(data)
        *whole, self._rest = (self._rest + data).split(_LAST)
        for block in whole:
            if b"event: migration" in block:
                self._heard.hear(block)
            elif b"event: began" in block and not self.began.done():
                self.began.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cut."""
        del exc
        self._heard.lost += 1


class Server:
    """The orchestrator's process."""

    def __init__(self, store: str, agents: dict[str, FakeAgent], core: int, log: Path) -> None:
        self._words = [sys.executable, "-m", "services.orchestrator", "--store", store]
        self._words += ["--rest", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
        for name, agent in agents.items():
            self._words += ["--node", f"{name}={agent.address}"]
        self._core, self._log = core, log
        self.process: asyncio.subprocess.Process | None = None
        self.host, self.port = "127.0.0.1", 0

    async def __aenter__(self) -> Self:
        began = time.perf_counter()
        with self._log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *("taskset", "-c", str(self._core), *self._words),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        async with asyncio.timeout(START_S_MAX):
            line = (await self.process.stdout.readline()).decode()
        if not line.startswith("listening rest="):
            raise RuntimeError(self._log.read_text()[-2000:])
        self.port = int(line.split()[1].rpartition(":")[2])
        self.start_s = time.perf_counter() - began
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        await self.process.wait()

    @property
    def url(self) -> str:
        """Of its REST."""
        return f"http://{self.host}:{self.port}"

    def rss_mib(self, name: str = "VmRSS") -> float:
        """Its memory."""
        assert self.process is not None
        return status_kib(str(self.process.pid), name) / 1024

    def cpu_s(self) -> float:
        """What it has used of its core."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _lists(server: Server, calls: int) -> dict[str, dict[str, float]]:
    """Lists as a process of its own asks for them."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.lister", server.host, str(server.port), str(calls)),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError("a list was not answered")
    times: dict[str, list[float]] = json.loads(out)
    assert set(times) == set(lister.PATHS)
    return {name: Sample(times_s=tuple(each)).row() for name, each in times.items()}


@contextlib.asynccontextmanager
async def _watching(server: Server, count: int, heard: Heard) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    transports: list[asyncio.Transport] = []
    try:
        while len(transports) < count:
            group = min(CONNECT_AT_ONCE, count - len(transports))
            made = [
                await loop.create_connection(lambda: Watcher(heard), server.host, server.port)
                for _ in range(group)
            ]
            transports += [transport for transport, _ in made]
            async with asyncio.timeout(HEARD_S_MAX):
                await asyncio.gather(*(watcher.began for _, watcher in made))
        yield
    finally:
        for transport in transports:
            transport.abort()


async def _change(http: httpx.AsyncClient, vm_id: str) -> str:
    answer = await http.post("/v1/migrations", json={"vm": vm_id, "destination_node": "b"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["migration_id"])


async def _changes(
    http: httpx.AsyncClient, heard: Heard, watchers: int, changes: int, per_s: float
) -> int:
    """So many changes; how many watchers did not hear of one in time."""
    missed = 0
    for number in range(changes):
        began, vm_id = time.perf_counter(), f"bench-{number % VMS}"
        heard.listen(vm_id, watchers)
        migration_id = await _change(http, vm_id)
        try:
            async with asyncio.timeout(HEARD_S_MAX):
                await heard.done.wait()
        except TimeoutError:
            missed += heard.left
        assert (await http.post(f"/v1/migrations/{migration_id}:cancel")).status_code == 200
        await asyncio.sleep(max(0.0, 1 / per_s - (time.perf_counter() - began)))
    return missed


async def _measure(store: str, given: argparse.Namespace, log: Path) -> dict[str, Any]:
    world = World()
    agents = {name: FakeAgent(name, world) for name in "ab"}
    report: dict[str, Any] = {}
    async with contextlib.AsyncExitStack() as stack:
        for agent in agents.values():
            await agent.start()
            stack.push_async_callback(agent.kill)
        server = await stack.enter_async_context(Server(store, agents, given.server_core, log))
        report["start_s"] = round(server.start_s, 2)
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=server.url, timeout=HEARD_S_MAX)
        )
        await http.post("/v1/queue:freeze", json={"because": "bench"})
        for number in range(VMS):
            vm_id = f"bench-{number}"
            body = {"node": "a", "spec": spec(vm_id)}
            answer = await http.post("/v1/vms", json=body)
            assert answer.status_code == 201, answer.text
        report["rss_alone_mib"] = round(server.rss_mib(), 1)
        for name, row in (await _lists(server, given.calls)).items():
            report[f"{name}, nobody watches"] = row
        heard = Heard()
        await stack.enter_async_context(_watching(server, given.watchers, heard))
        report["rss_watched_mib"] = round(server.rss_mib(), 1)
        missed = await _changes(http, heard, given.watchers, given.changes, given.per_s)
        report["event delay"] = Sample(times_s=tuple(heard.delays_s)).row()
        heard.delays_s.clear()
        began, cpu_s = time.perf_counter(), server.cpu_s()
        async with asyncio.TaskGroup() as group:
            changing = group.create_task(
                _changes(http, heard, given.watchers, given.changes, given.per_s)
            )
            listing = group.create_task(_lists(server, given.calls))
        report["event delay, while somebody lists"] = Sample(times_s=tuple(heard.delays_s)).row()
        for name, row in listing.result().items():
            report[f"{name}, {given.watchers} watch"] = row
        report["cpu_share"] = round((server.cpu_s() - cpu_s) / (time.perf_counter() - began), 2)
        report["events_not_heard"] = missed + changing.result()
        report["streams_cut"] = heard.lost
        report["received_mib"] = round(heard.received_bytes / (1 << 20))
        report["peak_rss_mib"] = round(server.rss_mib("VmHWM"), 1)
    return report


async def _of(kind: str, at: Path, given: argparse.Namespace) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(directory(at))
        store = str(here / "godwit.db")
        if kind == "postgresql":
            settings = {"shared_buffers": "128MB", "autovacuum": "on"}
            server = stack.enter_context(postgres.serving(at=at, **settings))
            store = server.url(server.create())
        place = store if kind == "postgresql" else Path(store)
        async with open_store(place) as filled:
            began = time.perf_counter()
            await make_history(filled, given.history)
            history_s = round(time.perf_counter() - began, 1)
        return {"history_s": history_s, **await _measure(store, given, here / "log")}


def _table(reports: dict[str, dict[str, Any]]) -> str:
    kinds = list(reports)
    lines = ["| p50 / p99 | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for name in reports[kinds[0]]:
        cells = []
        for kind in kinds:
            value = reports[kind][name]
            if isinstance(value, dict):
                value = f"{value['p50_ms']:.1f} / {value['p99_ms']:.1f} ms, n {value['n']}"
            cells.append(str(value))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="bench-watchers")
    parser.add_argument("--at", type=Path, default=Path(), help="a directory on the disk to use")
    parser.add_argument("--history", type=int, default=HISTORY)
    parser.add_argument("--watchers", type=int, default=WATCHERS)
    parser.add_argument("--changes", type=int, default=40, help="in each of two rounds")
    parser.add_argument("--per-s", type=float, default=2.0, help="changes a second, at most")
    parser.add_argument("--calls", type=int, default=300, help="of each list, in each round")
    parser.add_argument("--kinds", default="sqlite,postgresql")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    cores = sorted(os.sched_getaffinity(0))
    given.server_core = cores[0]
    os.sched_setaffinity(0, {cores[-1]})  # PostgreSQL and the one who lists inherit it
    at = given.at.resolve()
    synced_ms = sync_ms(at)
    reports = {kind: asyncio.run(_of(kind, at, given)) for kind in given.kinds.split(",")}
    if given.json:
        sys.stdout.write(json.dumps({"sync_ms": synced_ms, **reports}) + "\n")
    else:
        sys.stdout.write(f"fdatasync of 16 KiB here: {synced_ms} ms\n{_table(reports)}\n")
    missed = [
        f"{kind}: {name} {report[name]}"
        for kind, report in reports.items()
        for name in ("events_not_heard", "streams_cut")
        if report[name]
    ]
    for line in missed:
        sys.stderr.write(f"missed: {line}\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
