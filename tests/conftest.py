# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from services.orchestrator.store import open_store
from tests.harness import kube, postgres
from tests.harness.require import THINGS, missing, require, required_names

# No test asserts on absolute time, so no example has a deadline; what failed can be replayed. In CI
# the examples are the same every time: a commit is judged by itself, new ones are found at desks.
hypothesis.settings.register_profile("godwit", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "godwit")


def pytest_configure() -> None:
    """Refuse a GODWIT_REQUIRE that names an unknown thing before any test runs."""
    required_names(os.environ)


def pytest_report_header() -> str:
    """Say what this machine has: it tells at a glance what the skips will be."""
    have = ", ".join(name for name in THINGS if missing(name) is None)
    lack = ", ".join(name for name in THINGS if missing(name) is not None)
    return f"machine: has {have or 'nothing'}" + (f"; lacks {lack}" if lack else "")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Apply `@pytest.mark.requires(...)` before the fixtures, which may need the thing as well."""
    for mark in item.iter_markers("requires"):
        require(*mark.args)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    """A PostgreSQL of this session, started when the first test asks for it."""
    require("postgres")
    with postgres.serving() as server:
        yield server


@pytest.fixture(scope="session")
def kube_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kube.ApiServer]:
    """A Kubernetes API server of this session, started when the first test asks for it."""
    require("kube")
    with kube.serving(tmp_path_factory.mktemp("kube")) as server:
        yield server


@pytest.fixture(scope="session")
def store_template(postgres_server: postgres.Server) -> str:
    """A database with a store in it that nothing was written to."""
    template = postgres_server.create()

    async def make() -> None:
        async with open_store(postgres_server.url(template)):
            pass

    asyncio.run(make())
    return template


@pytest.fixture
def new_database(
    postgres_server: postgres.Server, store_template: str
) -> Iterator[Callable[[], str]]:
    """Makes databases with a new store in them; their URLs. They go when the test ends."""
    made = []

    def make() -> str:
        made.append(postgres_server.create(store_template))
        return postgres_server.url(made[-1])

    yield make
    for database in made:
        postgres_server.sql(f"DROP DATABASE {database} WITH (FORCE)")
