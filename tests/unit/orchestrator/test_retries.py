# SPDX-License-Identifier: Apache-2.0
"""Promise: a policy has what failed tried again, each time as a migration of its own, and no more.

And: what is begun goes before what is new, who waits long before higher classes, budgets hold.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from services.common.errors import FailedPreconditionError
from services.orchestrator.retries import Retrier
from services.orchestrator.scheduling.breaker import Caution
from services.orchestrator.scheduling.model import Priority
from services.orchestrator.scheduling.retry import FINAL
from tests.harness.fake_fleet import VM, FakeFleet, eventually
from tests.harness.stores import execute

QUICK = Caution(backoff_s=0.05, backoff_s_max=0.2, breaker_after=1000)


@pytest.fixture
def fleet(stored_fleet: FakeFleet) -> FakeFleet:
    """On SQLite and on PostgreSQL, with back-offs that are soon over."""
    stored_fleet.core.queue.caution = QUICK
    return stored_fleet


async def policy(fleet: FakeFleet, **settings: Any) -> None:
    answer = await fleet.http.put("/v1/policies/p", json=settings)
    assert answer.status_code == 200, answer.text


async def next_attempt(fleet: FakeFleet, of: str) -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        for row in (await fleet.get("/v1/migrations"))["migrations"]:
            found: dict[str, Any] = await fleet.migration(row["migration_id"])
            if found["retry_of"] == of:
                return found
        return None

    found: dict[str, Any] = await eventually(look)
    return found


def refuse(fleet: FakeFleet, times: int, reason: str = "NOT_TODAY") -> None:
    for _ in range(times):
        fleet.b.refuse("Preflight", FailedPreconditionError(reason, "come again"))


async def test_a_failure_is_tried_again_and_linked_to_its_forerunner(fleet: FakeFleet) -> None:
    await policy(fleet, retries=3, bulk_bytes_per_s_max=9 << 20)
    refuse(fleet, 2)
    first = await fleet.ended(await fleet.migrate())
    assert (first["phase"], first["attempt"], first["retry_of"]) == ("failed", 1, "")
    second = await fleet.ended((await next_attempt(fleet, first["migration_id"]))["migration_id"])
    third = await fleet.ended((await next_attempt(fleet, second["migration_id"]))["migration_id"])
    assert [second["phase"], third["phase"]] == ["failed", "succeeded"]
    assert [second["attempt"], third["attempt"]] == [2, 3]
    assert third["policy"]["retries"] == 3, "what counted at first is kept with each"
    assert third["policy"]["bulk_bytes_per_s_max"] == 9 << 20
    told = (await fleet.migration(first["migration_id"]))["events"][-1]
    assert told["kind"] == "RETRIED"
    assert second["migration_id"] in told["message"]
    assert fleet.world.owners(VM) == ["b"]


async def test_there_are_no_more_attempts_than_the_policy_says(fleet: FakeFleet) -> None:
    await policy(fleet, retries=2)
    refuse(fleet, 9)
    ids = [await fleet.migrate()]
    await fleet.ended(ids[0])
    for _ in range(2):
        ids.append((await next_attempt(fleet, ids[-1]))["migration_id"])
        await fleet.ended(ids[-1])
    await fleet.core.retrier.look()
    assert await fleet.core.context.store.schedule.ended_with_retries() == []
    assert len((await fleet.get("/v1/migrations"))["migrations"]) == 3


@pytest.mark.parametrize("why", ["final", "cancelled", "no policy", "elsewhere"])
async def test_what_is_not_to_be_tried_again_is_not(fleet: FakeFleet, why: str) -> None:
    if why != "no policy":
        await policy(fleet, retries=5)
    if why == "cancelled":
        await fleet.post("/v1/queue:freeze", {"because": "x"})
    refuse(fleet, 1, min(FINAL) if why == "final" else "NOT_TODAY")
    if why == "elsewhere":  # it has moved before anybody has looked
        await _run_without_retrying(fleet)
    migration_id = await fleet.migrate()
    if why == "cancelled":
        await fleet.cancel(migration_id)
    ended = await fleet.ended(migration_id)
    assert ended["phase"] == ("cancelled" if why == "cancelled" else "failed")
    count = 1
    if why == "elsewhere":
        assert (await fleet.ended(await fleet.migrate("c")))["phase"] == "succeeded"
        assert migration_id in await fleet.core.context.store.schedule.ended_with_retries()
        count = 2
        await fleet.restart()
    await fleet.core.retrier.look()
    assert await fleet.core.context.store.schedule.ended_with_retries() == []
    assert len((await fleet.get("/v1/migrations"))["migrations"]) == count


async def _run_without_retrying(fleet: FakeFleet) -> None:
    """An orchestrator that never looks: as if it died before it could."""

    async def nothing(_retrier: Retrier) -> None:
        """Not now."""

    with mock.patch.object(Retrier, "look", nothing):
        await fleet.restart()
    fleet.core.queue.caution = QUICK


async def test_the_next_orchestrator_tries_again_and_only_once(fleet: FakeFleet) -> None:
    """Whoever finds it: the new row and the old one's settling are one transaction."""
    await policy(fleet, retries=1)
    await _run_without_retrying(fleet)
    refuse(fleet, 1)
    migration_id = await fleet.migrate()
    await fleet.ended(migration_id)
    await fleet.restart()
    fleet.core.queue.caution = QUICK
    one, other = (
        Retrier(fleet.core.context, fleet.core.runner, fleet.core.queue) for _ in range(2)
    )
    await asyncio.gather(one.look(), other.look())
    again = await next_attempt(fleet, migration_id)
    assert (await fleet.ended(again["migration_id"]))["phase"] == "succeeded"
    await asyncio.gather(one.look(), other.look())
    assert len((await fleet.get("/v1/migrations"))["migrations"]) == 2


async def test_what_was_begun_goes_before_what_is_new(fleet: FakeFleet) -> None:
    """Live: the next attempt comes first, whatever the class of those that came before it."""
    await policy(fleet, retries=1)
    await fleet.start_vm("vm-2")
    await _run_without_retrying(fleet)
    refuse(fleet, 1)
    failed = await fleet.migrate()
    await fleet.ended(failed)
    await fleet.post("/v1/queue:freeze", {"because": "x"})
    other = await _ask(fleet, "vm-2", Priority.SYSTEM)
    await fleet.restart()
    fleet.core.queue.caution = QUICK
    again = (await next_attempt(fleet, failed))["migration_id"]
    assert await _order(fleet) == [again, other]
    await fleet.post("/v1/queue:thaw", {})
    for migration_id in (again, other):
        assert (await fleet.ended(migration_id))["phase"] == "succeeded"


async def _ask(fleet: FakeFleet, vm_id: str, priority: Priority) -> str:
    asked = await fleet.core.fleet.create_migration(vm_id, "b", priority=priority)
    return asked.migration_id


async def _order(fleet: FakeFleet) -> list[str]:
    return [each["migration_id"] for each in (await fleet.get("/v1/queue"))["entries"]]


async def test_who_has_waited_long_goes_before_a_higher_class(fleet: FakeFleet) -> None:
    """Live: five minutes are worth a class."""
    await fleet.start_vm("vm-2")
    await fleet.post("/v1/queue:freeze", {"because": "x"})
    old = await _ask(fleet, VM, Priority.BACKGROUND)
    ago_ns = 601 * 10**9
    await execute(
        fleet.core.context.store,
        f"UPDATE migrations SET created_at_ns = created_at_ns - {ago_ns}"
        f" WHERE migration_id = '{old}'",
    )
    new = await _ask(fleet, "vm-2", Priority.USER)
    assert await _order(fleet) == [old, new]
    await fleet.post("/v1/queue:thaw", {})
    for migration_id in (old, new):
        assert (await fleet.ended(migration_id))["phase"] == "succeeded"


async def test_a_policy_gives_preparing_more_time_for_each_gib(fleet: FakeFleet) -> None:
    """Of two that are held alike, the one without a policy fails first."""
    fleet.limits = replace(fleet.limits, preparing_s=0.3)
    await fleet.restart()
    await fleet.start_vm("vm-2")
    await fleet.http.put("/v1/vms/vm-2/placement", json={"labels": {"big": "yes"}})
    await policy(fleet, match_labels={"big": "yes"}, prepare_s_per_gib=3600)
    gate = fleet.b.stall("PrepareDestination")
    short, long = await fleet.migrate(), await fleet.migrate(vm_id="vm-2")
    await fleet.in_phase(long, "preparing")
    assert (await fleet.ended(short))["phase"] == "failed"
    assert (await fleet.migration(long))["phase"] == "preparing"
    gate.opened.set()
    assert (await fleet.ended(long))["phase"] == "succeeded"


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_guest_does_not_stand_still_for_longer_than_its_policy_says(
    fleet: FakeFleet, restarted: bool
) -> None:
    """The next orchestrator keeps to it too. Without the policy it would take an hour."""
    fleet.limits = replace(fleet.limits, switchover_s=3600.0)
    await fleet.restart()
    await policy(fleet, pause_ms_max=300)
    gate = fleet.b.stall("LoadDeviceState")
    migration_id = await fleet.migrate()
    await fleet.in_phase(migration_id, "switchover")
    if restarted:
        await fleet.restart()
    told = await fleet.until(migration_id, lambda each: each["reason"] == "TIMED_OUT")
    assert "switchover" in told["message"]
    gate.opened.set()
    assert (await fleet.ended(migration_id))["phase"] == "failed"
    assert fleet.world.owners(VM) == ["a"]


@pytest.mark.parametrize("mode", ["pre-copy", "hybrid"])
async def test_a_mode_that_is_not_there_yet_is_refused(fleet: FakeFleet, mode: str) -> None:
    answer = await fleet.http.put("/v1/policies/p", json={"mode": mode})
    assert (answer.status_code, answer.json()["reason"]) == (422, "MODE_NOT_AVAILABLE")
    assert (await fleet.get("/v1/policies"))["policies"] == []
    await policy(fleet, mode="post-copy")
    assert (await fleet.ended(await fleet.migrate()))["policy"]["mode"] == "post-copy"
