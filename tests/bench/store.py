# SPDX-License-Identifier: Apache-2.0
"""What the store does in a second, on one core, with years of history in it: `make bench-store`.

SQLite and PostgreSQL in turns, each on the disk and each commit synced, the process and the server
on the same core. The history is made by SQL; what is measured goes through the store and the
service layer as the orchestrator goes through them. A bar that is missed is exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from godwit.common.v1 import common_pb2
from ulid import ULID

from services.common.listen import Address
from services.common.vm_spec import VmSpec
from services.orchestrator.main import Core, Settings, working
from services.orchestrator.migration import Decision, Phase
from services.orchestrator.scheduling.model import Priority
from services.orchestrator.scheduling.policy import Settings as PolicySettings
from services.orchestrator.store import Store, schema
from services.orchestrator.store.records import ANSWERS_MAX
from services.orchestrator.store.rows import IdempotencyRow, MigrationRow, VmRow, row_values
from services.orchestrator.store.schedule import AdmissionRow, new_admission
from tests.harness import postgres

ADMISSIONS_PER_S_MIN = 200.0
HISTORY = 200_000
TRANSITIONS = 11
"""Phases of a move that succeeds."""
CHUNK = 1_000
FIRST = 100_000_000
"""Number of the first: all have as many digits."""
PAGE = 100
_COUNTERS = common_pb2.ArrivalCounters(
    page_count=1 << 20, demand_page_count=1 << 12, bulk_page_count=1 << 20, fault_count=1 << 12
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Times of one kind of call, in seconds."""

    times_s: tuple[float, ...]

    def ms(self, share: float) -> float:
        """A quantile, in milliseconds."""
        ordered = sorted(self.times_s)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def row(self) -> dict[str, float]:
        """For the report."""
        return {
            "n": len(self.times_s),
            "p50_ms": round(self.ms(0.5), 3),
            "p99_ms": round(self.ms(0.99), 3),
        }


async def _times(calls: int, call: Callable[[int], Awaitable[Any]]) -> Sample:
    times = []
    for number in range(calls):
        began = time.perf_counter()
        await call(number)
        times.append(time.perf_counter() - began)
    return Sample(times_s=tuple(times))


# --- the history ---


def _ended(vm: VmRow) -> MigrationRow:
    row = MigrationRow.new(
        migration_id="",
        vm=vm,
        destination_node="b",
        bulk_bytes_per_s_max=0,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        now_ns=1,
    )
    values = row_values(row) | {
        "phase": Phase.SUCCEEDED,
        "terminal": True,
        "decision": Decision.COMMITTED,
        "epoch": 2,
        "progress": 1.0,
        "counters": _COUNTERS.SerializeToString(),
        "version": 20,
        "source_boot_id": "0af76519-16cd-43dd-8448-eb211c80319c",
    }
    return MigrationRow(**values)


def _fill(connection: sa.Connection, vm: VmRow, first: int, count: int) -> None:
    """`count` migrations that have ended, of a thousand VMs, with their transitions."""
    numbers = sa.select(sa.literal(first, sa.BigInteger).label("n")).cte("numbers", recursive=True)
    numbers = numbers.union_all(sa.select(numbers.c.n + 1).where(numbers.c.n < first + count - 1))
    # Ids as ULIDs of years ago, in order: ten characters of time, sixteen of chance.
    identity = sa.literal("01A0000000" + "0" * 7, sa.Text) + sa.cast(numbers.c.n, sa.Text)
    values = row_values(_ended(vm))
    columns = {
        **{
            name: sa.literal(value, schema.migrations.c[name].type)
            for name, value in values.items()
        },
        "migration_id": identity,
        "vm_id": sa.literal("old-", sa.Text) + sa.cast(numbers.c.n % 1000, sa.Text),
    }
    connection.execute(
        sa.insert(schema.migrations).from_select(
            list(columns), sa.select(*(value.label(name) for name, value in columns.items()))
        )
    )
    phases = [*Phase][:TRANSITIONS]
    for sequence, phase in enumerate(phases, start=1):
        connection.execute(
            sa.insert(schema.transitions).from_select(
                ["migration_id", "sequence", "phase", "at_ns", "message"],
                sa.select(
                    schema.migrations.c.migration_id,
                    sa.literal(sequence, sa.BigInteger),
                    sa.literal(phase, sa.Text),
                    sa.literal(1, sa.BigInteger),
                    sa.literal("", sa.Text),
                ).where(
                    schema.migrations.c.migration_id >= _id_of(first),
                    schema.migrations.c.migration_id < _id_of(first + count),
                ),
            )
        )


def _fill_answers(connection: sa.Connection) -> None:
    """As many answers to repeated requests as are kept."""
    rows = [
        {"key": f"old-{n}", "request_hash": "h" * 64, "response": b"r" * 200, "created_at_ns": n}
        for n in range(1, ANSWERS_MAX + 1)
    ]
    connection.execute(sa.insert(schema.idempotency), rows)


def _id_of(number: int) -> str:
    return f"01A0000000{'0' * 7}{number}"


async def make_history(store: Store, count: int) -> VmRow:
    for name in "ab":
        await store.fleet.put_node(name, "127.0.0.1:1", now_ns=1)
    vm = await _start(store, "old-0")
    for first in range(FIRST, FIRST + count, CHUNK):
        await store.database.write(
            lambda connection, first=first: _fill(connection, vm, first, CHUNK)  # type: ignore[misc]
        )
    await store.database.write(lambda connection: connection.exec_driver_sql("ANALYZE").close())
    return vm


async def _start(store: Store, vm_id: str) -> VmRow:
    spec = VmSpec(vm_id=vm_id, memory_bytes=64 << 20, kernel="/boot/vmlinuz")
    vm = await store.fleet.begin_start(spec, "a", now_ns=1)
    return await store.fleet.finish_start(vm.vm_id, vm.epoch) or vm


# --- what is measured ---


async def _admit(store: Store, vms: list[VmRow], *, at_once: int) -> dict[str, float]:
    """Admissions as the API makes them, each with its place in the queue and the answer kept."""
    queue = list(reversed(vms))
    times: list[float] = []

    async def caller() -> None:
        while queue:
            vm = queue.pop()
            row = MigrationRow.new(
                migration_id=str(ULID()),
                vm=vm,
                destination_node="b",
                bulk_bytes_per_s_max=0,
                traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                now_ns=time.time_ns(),
            )
            answer = IdempotencyRow(
                key=row.migration_id, request_hash="h" * 64, response=b"r" * 200, created_at_ns=1
            )
            admission = AdmissionRow(
                migration_id=row.migration_id,
                priority=Priority.USER,
                target="b",
                operation_id="",
                settings=PolicySettings(),
                policies=(),
            )
            began = time.perf_counter()
            await store.migrations.create(row, answer, new_admission(admission))
            times.append(time.perf_counter() - began)

    server = await _backend(store)
    began = time.perf_counter()
    cpu_s = time.process_time() + _cpu_s(server)
    async with asyncio.TaskGroup() as group:
        for _caller in range(at_once):
            group.create_task(caller())
    took_s = time.perf_counter() - began
    sample = Sample(times_s=tuple(times)).row()
    cpu_s = time.process_time() + _cpu_s(server) - cpu_s
    return {
        **sample,
        "per_s": round(len(vms) / took_s, 1),
        "cpu_ms": round(1e3 * cpu_s / len(vms), 2),
    }


async def _backend(store: Store) -> int:
    """Process id of the server's end of the connection that writes; 0: there is none."""
    if store.database.dialect == "sqlite":
        return 0

    def ask(connection: sa.Connection) -> int:
        return int(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())

    return await store.database.write(ask)


def _cpu_s(pid: int) -> float:
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _decide(store: Store, vms: list[VmRow]) -> dict[str, float]:
    """The decision of moves that are in SWITCHOVER: the guest stands still meanwhile."""
    rows = []
    for row in (await store.migrations.unfinished())[: len(vms)]:
        reserved = await store.migrations.reserve_epoch(row)
        rows.append(await store.migrations.enter(reserved, Phase.SWITCHOVER, now_ns=2))

    async def decide(number: int) -> None:
        await store.migrations.decide(rows[number], Decision.COMMITTED, now_ns=3)

    return (await _times(len(rows), decide)).row()


async def _list(core: Core, history: int, calls: int) -> dict[str, dict[str, float]]:
    """Pages of a hundred: the first, one from anywhere, one of a VM; and all of them in turn."""
    chance = random.Random(1)
    tokens = [""]

    async def first(_number: int) -> None:
        await core.fleet.list_migrations(page_size=PAGE)

    async def of_vm(_number: int) -> None:
        await core.fleet.list_migrations(f"old-{chance.randrange(1000)}", page_size=PAGE)

    async def anywhere(_number: int) -> None:
        await core.fleet.list_migrations(page_size=PAGE, page_token=chance.choice(tokens))

    async def next_page(_number: int) -> None:
        views, token = await core.fleet.list_migrations(page_size=PAGE, page_token=tokens[-1])
        assert len(views) == PAGE
        tokens.append(token)

    walked = await _times(history // PAGE - 1, next_page)
    return {
        "list, every page in turn": walked.row(),
        "list, first page": (await _times(calls, first)).row(),
        "list, any page": (await _times(calls, anywhere)).row(),
        "list, of a VM": (await _times(calls, of_vm)).row(),
    }


async def _of(place: str | Path, *, history: int, calls: int) -> dict[str, Any]:
    listen = Address(host="127.0.0.1", port=0)
    settings = Settings(store=place, rest=listen, grpc=listen)
    report: dict[str, Any] = {}
    from services.orchestrator.store import open_store

    began = time.perf_counter()
    async with open_store(place) as store:
        await make_history(store, history)
        report["history_s"] = round(time.perf_counter() - began, 1)
        await store.database.write(_fill_answers)
        vms = [await _start(store, f"new-{number}") for number in range(2 * calls)]
        await _admit(store, vms[: calls // 10], at_once=1)
        report["admit, one caller"] = await _admit(store, vms[calls // 10 : calls], at_once=1)
        report["admit, 16 callers"] = await _admit(store, vms[calls:], at_once=16)
        report["decide"] = await _decide(store, vms[: calls // 2])
        # They end: an orchestrator that is started would go on with them.
        await store.database.write(_end_all)
    began = time.perf_counter()
    async with working(settings) as core:
        report["start_s"] = round(time.perf_counter() - began, 3)
        report |= await _list(core, history, calls)
        report["owing"] = (await _times(20, lambda _n: core.context.store.migrations.owing())).row()
        report["unfinished"] = (
            await _times(20, lambda _n: core.context.store.migrations.unfinished())
        ).row()
    report["peak_rss_mib"] = round(status_kib("self", "VmHWM") / 1024)
    return report


def _end_all(connection: sa.Connection) -> None:
    table = schema.migrations
    connection.execute(
        sa.update(table)
        .where(~table.c.terminal)
        .values(decision=Decision.ABORTED, phase=Phase.FAILED, terminal=True)
        .where(table.c.decision.is_(None))
    )
    connection.execute(
        sa.update(table).where(~table.c.terminal).values(phase=Phase.SUCCEEDED, terminal=True)
    )


def status_kib(pid: str, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0


def sync_ms(directory: Path) -> float:
    """What one fdatasync of 16 KiB costs here: the floor of a commit."""
    path = directory / "sync"
    times = []
    with path.open("wb", buffering=0) as file:
        for _turn in range(200):
            file.write(b"x" * 16384)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    path.unlink()
    return round(1e3 * statistics.median(times), 3)


@contextlib.contextmanager
def directory(at: Path) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="bench-store-", dir=at))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _child(kind: str, at: Path, history: int, calls: int) -> dict[str, Any]:
    """In a process of its own, so that its memory is its own."""
    words = ["--child", kind, "--history", str(history), "--calls", str(calls)]
    with contextlib.ExitStack() as stack:
        server = None
        if kind == "postgresql":
            settings = {"shared_buffers": "128MB", "autovacuum": "on"}
            server = stack.enter_context(postgres.serving(at=at, **settings))
            place = server.url(server.create())
        else:
            place = str(stack.enter_context(directory(at)) / "godwit.db")
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.store", *words, "--store", place],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if server is None:
            size = sum(each.stat().st_size for each in Path(place).parent.iterdir())
            report["disk_mib"] = round(size / (1 << 20))
        else:
            size = int(server.sql(f"SELECT pg_database_size('{server.last}')"))
            report["disk_mib"] = round(size / (1 << 20))
            report["server_rss_mib"] = server.rss_kib() // 1024
        return report


def _table(reports: dict[str, dict[str, Any]]) -> str:
    kinds = list(reports)
    lines = ["| | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for name, first in reports[kinds[0]].items():
        cells = []
        for kind in kinds:
            value = reports[kind].get(name, "")
            if isinstance(value, dict):
                text = f"{value['p50_ms']:.2f} / {value['p99_ms']:.2f} ms, n {value['n']}"
                if "per_s" in value:
                    text = f"**{value['per_s']:.0f}/s**, {text}, {value['cpu_ms']:.1f} ms of CPU"
                value = text
            cells.append(str(value))
        unit = " (p50 / p99)" if isinstance(first, dict) else ""
        lines.append(f"| {name}{unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="bench-store")
    parser.add_argument("--at", type=Path, default=Path(), help="a directory on the disk to use")
    parser.add_argument("--history", type=int, default=HISTORY)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--kinds", default="sqlite,postgresql")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        place = Path(given.store) if given.child == "sqlite" else given.store
        report = asyncio.run(_of(place, history=given.history, calls=given.calls))
        sys.stdout.write(json.dumps(report) + "\n")
        return 0
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the server inherits it
    at = given.at.resolve()
    synced_ms = sync_ms(at)
    reports = {
        kind: _child(kind, at, given.history, given.calls) for kind in given.kinds.split(",")
    }
    if given.json:
        sys.stdout.write(json.dumps({"sync_ms": synced_ms, **reports}) + "\n")
    else:
        sys.stdout.write(f"one core; fdatasync of 16 KiB here: {synced_ms} ms\n{_table(reports)}\n")
    slow = [
        f"{kind}: {report[name]['per_s']} admissions/s, the bar is {ADMISSIONS_PER_S_MIN:g}"
        for kind, report in reports.items()
        for name in ("admit, one caller", "admit, 16 callers")
        if report[name]["per_s"] < ADMISSIONS_PER_S_MIN
    ]
    for line in slow:
        sys.stderr.write(f"missed: {line}\n")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
