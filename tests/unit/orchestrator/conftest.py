# SPDX-License-Identifier: Apache-2.0
"""A fleet of fake agents under a real orchestrator."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.fake_fleet import FakeFleet, fake_fleet
from tests.harness.stores import Place


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[FakeFleet]:
    """Nodes a, b and c; vm-1 runs on a. No invariant may be broken by the end of a test."""
    async with fake_fleet(tmp_path) as running:
        yield running
        assert running.world.broken == []


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of hook files."""
    directory = tmp_path / "hooks"
    directory.mkdir()
    monkeypatch.setenv("GODWIT_HOOKS_DIR", str(directory))
    yield directory
    for hold in directory.glob("*.hold"):
        hold.unlink()


@pytest.fixture(
    params=["sqlite", pytest.param("postgresql", marks=pytest.mark.requires("postgres"))]
)
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Place]:
    """Makes places for stores, of each kind that there is."""
    if request.param == "postgresql":
        made: Callable[[], str] = request.getfixturevalue("new_database")
        return made
    numbers = itertools.count()
    return lambda: tmp_path / f"s{next(numbers)}.db"


@pytest.fixture
def place(new_place: Callable[[], Place]) -> Place:
    """A place for a store."""
    return new_place()


@pytest.fixture
async def stored_fleet(tmp_path: Path, place: Place) -> AsyncIterator[FakeFleet]:
    """As `fleet`, once on each kind of store that there is."""
    server = place if isinstance(place, str) else ""
    async with fake_fleet(tmp_path, server=server) as running:
        yield running
        assert running.world.broken == []
