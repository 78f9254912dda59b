# SPDX-License-Identifier: Apache-2.0
"""Ask for a move through the API and follow it to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from godwit.client import AsyncClient
from godwit.models import Migration, MigrationPhase

from services.common.errors import DeadlineExceededError
from services.demo.verdict import MigrationReport

MOVE_S_MAX = 300.0

OnStep = Callable[[Migration], Awaitable[bool]]
"""Told of each change of a migration; True = there is nothing more to wait for."""


async def move(
    client: AsyncClient,
    vm_id: str,
    destination: str,
    *,
    on_step: OnStep,
    bulk_bytes_per_s_max: int = 0,
    timeout_s: float = MOVE_S_MAX,
) -> Migration:
    """The last that was seen of it, whether it succeeded or not.

    Raises:
        DeadlineExceededError: MOVE_STALLED.
        GodwitClientError: the orchestrator refused or cannot be reached any more.
    """
    last = await client.migrate(vm_id, destination, bulk_bytes_per_s_max=bulk_bytes_per_s_max)
    try:
        async with (
            asyncio.timeout(timeout_s),
            aclosing(client.watch(last.migration_id)) as steps,
        ):
            async for last in steps:
                if await on_step(last) or last.phase == MigrationPhase.NEEDS_ATTENTION:
                    break
    except TimeoutError:
        raise DeadlineExceededError(
            "MOVE_STALLED", f"{last.migration_id} is {last.phase} after {timeout_s:g} s"
        ) from None
    return last


def report_of(migration: Migration) -> MigrationReport:
    """What the system says about a move, in the units of the verdict."""
    counters = migration.counters
    latency = counters.fault_latency if counters else None
    return MigrationReport(
        source=migration.source_node,
        destination=migration.destination_node,
        pause_ms=round(migration.pause_ns / 1e6, 3),
        total_s=round(migration.total_ns / 1e9, 3),
        pages_demand=counters.demand_page_count if counters else 0,
        pages_bulk=counters.bulk_page_count if counters else 0,
        pages_zero=counters.zero_page_count if counters else 0,
        fault_p50_us=round(latency.p50_ns / 1e3, 1) if latency else 0.0,
        fault_p99_us=round(latency.p99_ns / 1e3, 1) if latency else 0.0,
    )


def why_not_succeeded(migration: Migration) -> str:
    """In words; empty if it has."""
    if migration.phase == MigrationPhase.SUCCEEDED:
        return ""
    why = ": ".join(part for part in (migration.reason, migration.message) if part)
    return (
        f"migration {migration.source_node} to {migration.destination_node}"
        f" ended {migration.phase}" + (f" ({why})" if why else "")
    )
