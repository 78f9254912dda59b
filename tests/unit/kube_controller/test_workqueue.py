# SPDX-License-Identifier: Apache-2.0
"""A key at a time, what fails comes back, what is added meanwhile is not lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from services.common.errors import UnavailableError
from services.orchestrator.kubernetes import workqueue
from services.orchestrator.kubernetes.api import ConflictError
from services.orchestrator.kubernetes.workqueue import WorkQueue

pytestmark = pytest.mark.asyncio


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            if true():
                return
            await asyncio.sleep(0)


async def drained(looks: Counter[str], key: str, count: int) -> None:
    await until(lambda: looks[key] >= count)


async def test_a_key_that_is_added_twice_is_looked_at_once() -> None:
    looks: Counter[str] = Counter()

    async def look(key: str) -> None:
        looks[key] += 1

    queue = WorkQueue(look, what="key")
    for _ in range(5):
        queue.add("a")
    queue.add("b")
    async with queue.running():
        await drained(looks, "b", 1)
        await asyncio.sleep(0)
    assert looks == {"a": 1, "b": 1}


async def test_a_change_in_the_middle_of_a_look_is_looked_at_afterwards() -> None:
    looks: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    begun, go = asyncio.Event(), asyncio.Event()

    async def look(key: str) -> None:
        busy[key] += 1
        assert busy[key] == 1, "one at a time"
        looks[key] += 1
        begun.set()
        await go.wait()
        busy[key] -= 1

    queue = WorkQueue(look, what="key", workers=3)
    async with queue.running():
        queue.add("a")
        await begun.wait()
        queue.add("a")
        queue.add("a")
        go.set()
        await drained(looks, "a", 2)
        await asyncio.sleep(0)
    assert looks["a"] == 2


@pytest.mark.parametrize(
    "error", [UnavailableError("X", "no"), ConflictError("stale", status=409), ValueError("a bug")]
)
async def test_what_fails_is_looked_at_again_and_the_others_meanwhile(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workqueue, "BACK_OFF_S_MIN", 0.001)
    looks: Counter[str] = Counter()

    async def look(key: str) -> None:
        looks[key] += 1
        if key == "bad" and looks[key] < 4:
            raise error

    queue = WorkQueue(look, what="key", workers=1, seed=1)
    async with queue.running():
        queue.add("bad")
        queue.add("good")
        await drained(looks, "good", 1)
        await drained(looks, "bad", 4)
    assert looks == {"good": 1, "bad": 4}


async def test_delays_double_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []

    async def look(key: str) -> None:
        raise UnavailableError("X", key)

    queue = WorkQueue(look, what="key", seed=1)
    monkeypatch.setattr(queue, "add_after", lambda _key, delay_s: delays.append(delay_s))
    async with queue.running():
        for count in range(1, 15):
            queue.add("a")
            await until(lambda count=count: len(delays) >= count)  # type: ignore[misc]
    for number, delay_s in enumerate(delays):
        most = min(0.1 * 2**number, 60.0)
        assert most / 2 <= delay_s <= most


async def test_it_looks_again_when_it_wants_to() -> None:
    looks: Counter[str] = Counter()

    async def look(key: str) -> float | None:
        looks[key] += 1
        return 0.001 if looks[key] < 3 else None

    queue = WorkQueue(look, what="key")
    async with queue.running():
        queue.add("a")
        await drained(looks, "a", 3)
