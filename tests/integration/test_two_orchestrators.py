# SPDX-License-Identifier: Apache-2.0
"""Two real orchestrator processes on one real PostgreSQL: one leads, whatever becomes of the other.

What each of them writes is noted by triggers of the test's own, by the session that wrote it: not
even the database's word is taken for who wrote what.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from godwit.client import AsyncClient

from services.orchestrator.store import schema
from tests.harness.fake_agent import FakeAgent, World, spec_json
from tests.harness.fake_fleet import VM, eventually
from tests.harness.orchestrator import START_S_MAX, Process
from tests.harness.postgres import Server

pytestmark = [pytest.mark.requires("postgres"), pytest.mark.timeout(400)]

_AUDIT = """CREATE TABLE audit (id BIGSERIAL PRIMARY KEY, who TEXT, what TEXT, term BIGINT);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO audit (who, what, term) VALUES
    (current_setting('application_name'), TG_OP || ' ' || TG_TABLE_NAME,
     (SELECT term FROM leadership));
  RETURN NULL; END $$;"""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The store, the agents, and two orchestrators of which one leads."""

    server: Server
    database: str
    world: World
    leader: Process
    other: Process

    def rows(self, query: str) -> list[str]:
        """What the database says."""
        return self.server.sql(query, self.database).splitlines()

    def writers_since(self, term: int) -> set[str]:
        """Who has written under this term or a later one."""
        return set(self.rows(f"SELECT DISTINCT who FROM audit WHERE term >= {term}"))


LEASE_S = {"stopped": 10.0, "ends": 60.0}
"""Longer than a loaded machine makes a process wait; the first is waited for."""


@pytest.fixture(params=["stopped"])
async def pair(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    postgres_server: Server,
    new_database: Callable[[], str],
) -> AsyncIterator[Pair]:
    url = new_database()
    database = url.partition("@/")[2].partition("?")[0]
    tables = [name for name in schema.metadata.tables if name != "leadership"]
    triggers = "".join(
        f"CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON {name}"
        " FOR EACH STATEMENT EXECUTE FUNCTION note();"
        for name in tables
    )
    postgres_server.sql(_AUDIT + triggers, database)
    world = World()
    agents = {name: FakeAgent(name, world) for name in "ab"}
    async with contextlib.AsyncExitStack() as stack:
        for agent in agents.values():
            await agent.start()
            stack.push_async_callback(agent.kill)
        nodes = {name: str(agent.address) for name, agent in agents.items()}
        one, two = [Process(name, tmp_path, url, nodes) for name in ("one", "two")]
        for each in (one, two):
            stack.push_async_callback(each.end)
        lease_s = LEASE_S[request.param]
        await asyncio.gather(*(each.start(lease_s=lease_s) for each in (one, two)))
        leader = await eventually(lambda: _first(one, two), wait_s=START_S_MAX)
        other = two if leader is one else one
        await other.stands_by(leader)
        body = {"node": "a", "spec": json.loads(spec_json(VM))}
        assert (await leader.http.post("/v1/vms", json=body)).status_code == 201
        yield Pair(
            server=postgres_server, database=database, world=world, leader=leader, other=other
        )
        assert world.broken == []


async def _first(one: Process, two: Process) -> Process | None:
    """Which of them leads."""
    for each in (one, two):
        if (await each.get("/readyz"))["leads"]:
            return each
    return None


async def _migrate(by: Process, to: str) -> str:
    answer = await by.http.post("/v1/migrations", json={"vm": VM, "destination_node": to})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["migration_id"])


async def _assert_refused(by: Process, leader: Process) -> None:
    """Every change is, with a reason, and whom to ask."""
    rest = str(leader.http.base_url).removeprefix("http://")
    for method, path, body in (
        ("POST", "/v1/migrations", {"vm": VM, "destination_node": "a"}),
        ("POST", "/v1/vms", {"node": "a", "spec": json.loads(spec_json("vm-2"))}),
        ("DELETE", f"/v1/vms/{VM}", None),
        ("POST", "/v1/nodes", {"name": "c", "agent_address": "127.0.0.1:1"}),
    ):
        answer = await by.http.request(method, path, json=body)
        assert answer.status_code == 503, (path, answer.text)
        problem = answer.json()
        assert problem["reason"] == "NOT_LEADER", problem
        assert problem["metadata"]["rest"] == rest


async def test_leader_that_was_stopped_past_its_lease_writes_nothing(pair: Pair) -> None:
    """I13: stopped before its decision, with the guest paused; the other leads and finishes it."""
    one, two = pair.leader, pair.other
    await _assert_refused(two, one)
    (one.hooks / "orchestrator.decision.before.hold").touch()
    migration_id = await _migrate(one, "b")
    await eventually((one.hooks / "orchestrator.decision.before.reached").exists, wait_s=60)
    assert (await two.get(f"/v1/migrations/{migration_id}"))["phase"] == "switchover"

    one.send(signal.SIGSTOP)
    await two.leads()
    term = (await two.get("/readyz"))["term"]
    ended = await two.ended(migration_id)
    assert ended["phase"] in ("succeeded", "failed"), ended
    owner = "b" if ended["phase"] == "succeeded" else "a"
    assert pair.world.owners(VM) == [owner]
    before = pair.rows("SELECT * FROM migrations")

    # It wakes up at the very write of the decision.
    (one.hooks / "orchestrator.decision.before.hold").unlink()
    one.send(signal.SIGCONT)
    await one.stands_by(two)
    await eventually(lambda: "NOT_LEADER" in one.log.read_text(), wait_s=60)
    await _assert_refused(one, two)
    assert pair.rows("SELECT * FROM migrations") == before
    assert pair.world.owners(VM) == [owner]
    assert (await one.get(f"/v1/migrations/{migration_id}"))["phase"] == ended["phase"]
    assert pair.writers_since(term) == {f"orchestrator-{two.name}"}

    # And back, to the one that was deposed: it has taken no harm, and the leader may die.
    back = await _migrate(two, "a" if owner == "b" else "b")
    assert (await two.ended(back))["phase"] == "succeeded"
    await two.end()
    await one.leads()
    last = await _migrate(one, owner)
    assert (await one.ended(last))["phase"] == "succeeded"
    assert pair.world.owners(VM) == [owner]
    listed = (await one.get("/v1/migrations"))["migrations"]
    assert [each["migration_id"] for each in listed] == [last, back, migration_id]
    assert pair.rows("SELECT count(*) FROM migrations WHERE NOT terminal") == ["0"]


@pytest.mark.parametrize("pair", ["ends"], indirect=True)
async def test_leader_that_ends_leaves_at_once(pair: Pair) -> None:
    """SIGTERM gives the lease back, however long it is, and a watch of a standby goes on."""
    one, two = pair.leader, pair.other
    term = (await one.get("/readyz"))["term"]
    migration_id = await _migrate(one, "b")
    seen: list[Any] = []

    async def watch() -> None:
        path = f"/v1/migrations/{migration_id}/events"
        async with two.http.stream("GET", path) as stream:
            seen.extend(
                [
                    json.loads(line.removeprefix("data:"))
                    async for line in stream.aiter_lines()
                    if line.startswith("data:")
                ]
            )

    async with asyncio.timeout(START_S_MAX):
        await watch()
    assert seen[-1]["phase"] == "succeeded"
    async with asyncio.timeout(LEASE_S["ends"] / 2):
        assert await one.end(signal.SIGTERM) == 0
        await two.leads()
    assert (await two.get("/readyz"))["term"] == term + 1
    assert (await two.ended(await _migrate(two, "a")))["phase"] == "succeeded"


async def test_a_client_of_one_that_stands_by_reaches_the_leader(pair: Pair) -> None:
    """By what the one that stands by says, whomever the client knows."""
    standby, leader = (str(each.http.base_url).rstrip("/") for each in (pair.other, pair.leader))
    async with AsyncClient(standby) as client:
        begun = await client.migrate(VM, "b")
        assert client.url == leader
    assert (await pair.leader.ended(begun.migration_id))["phase"] == "succeeded"
