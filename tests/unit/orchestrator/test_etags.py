# SPDX-License-Identifier: Apache-2.0
"""Two people who read the same and write both: one is told, and nothing of his is written."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.common.errors import AbortedError
from services.orchestrator.etags import ANY, require_match
from tests.harness.fake_fleet import VM, FakeFleet

LIMITS = "/v1/limits"
POLICY = "/v1/policies/db"
NODE = "/v1/nodes/b/placement"
PLACED = f"/v1/vms/{VM}/placement"


@pytest.mark.parametrize(
    ("given", "now", "fits"),
    [
        ("", '"1"', True),
        ("", "", True),
        ('"1"', '"1"', True),
        (ANY, '"1"', True),
        (ANY, "", False),
        ('"1"', '"2"', False),
        ('"1"', "", False),
        ("1", '"1"', False),
    ],
)
def test_what_fits(given: str, now: str, fits: bool) -> None:
    if fits:
        require_match(given, now, "it")
        return
    with pytest.raises(AbortedError, match="ETAG_MISMATCH"):
        require_match(given, now, "it")


CHANGES: list[tuple[str, str, Any, Any]] = [
    ("patch", LIMITS, {"values": {"node-in": 3}}, {"values": {"node-in": 4}}),
    ("put", POLICY, {"priority": "user"}, {"priority": "system"}),
    ("put", NODE, {"labels": {"zone": "x"}}, {"labels": {"zone": "y"}}),
    ("put", PLACED, {"labels": {"app": "x"}}, {"labels": {"app": "y"}}),
]


@pytest.mark.parametrize(("method", "path", "one", "two"), CHANGES)
async def test_who_writes_over_a_change_is_told(
    fleet: FakeFleet, method: str, path: str, one: Any, two: Any
) -> None:
    first = await fleet.http.request(method, path, json=one)
    read = first.headers["ETag"]
    second = await fleet.http.request(method, path, json=two, headers={"If-Match": read})
    assert second.status_code == 200
    assert second.headers["ETag"] != read
    late = await fleet.http.request(method, path, json=one, headers={"If-Match": read})
    assert (late.status_code, late.json()["reason"]) == (412, "ETAG_MISMATCH")
    assert late.json()["metadata"]["etag"] == second.headers["ETag"]
    # Nothing of it was written: the last one's tag still fits, and what is back has its old tag.
    again = {"If-Match": second.headers["ETag"]}
    back = await fleet.http.request(method, path, json=one, headers=again)
    assert (back.status_code, back.headers["ETag"]) == (200, read)


async def test_of_two_at_once_one_is_told(fleet: FakeFleet) -> None:
    read = (await fleet.http.get(LIMITS)).headers["ETag"]
    answers = await asyncio.gather(
        *(
            fleet.http.patch(
                LIMITS, json={"values": {"cluster": 10 + count}}, headers={"If-Match": read}
            )
            for count in range(8)
        )
    )
    assert sorted(answer.status_code for answer in answers) == [200, *[412] * 7]


async def test_lists_have_the_tags(fleet: FakeFleet) -> None:
    made = await fleet.http.put(POLICY, json={"retries": 1})
    (listed,) = (await fleet.http.get("/v1/policies")).json()["policies"]
    assert listed["etag"] == made.headers["ETag"] == made.json()["etag"]
    placed = await fleet.http.put(NODE, json={"link": "rack-7"})
    node = (await fleet.http.get("/v1/nodes/b")).json()
    assert node["placement_etag"] == placed.headers["ETag"]
    vm = (await fleet.http.get(f"/v1/vms/{VM}")).json()
    headers = {"If-Match": vm["placement_etag"]}
    assert (await fleet.http.put(PLACED, json={}, headers=headers)).status_code == 200


async def test_a_policy_that_is_gone_is_not_made_again(fleet: FakeFleet) -> None:
    made = await fleet.http.put(POLICY, json={"retries": 1})
    headers = {"If-Match": made.headers["ETag"]}
    assert (await fleet.http.delete(POLICY, headers=headers)).status_code == 204
    late = await fleet.http.put(POLICY, json={"retries": 2}, headers=headers)
    assert (late.status_code, late.json()["reason"]) == (412, "ETAG_MISMATCH")
    assert (await fleet.http.get("/v1/policies")).json()["policies"] == []


async def test_what_is_used_is_no_change_of_limits(fleet: FakeFleet) -> None:
    before = (await fleet.http.get(LIMITS)).json()["etag"]
    made = await fleet.http.post("/v1/migrations", json={"vm": VM, "destination_node": "b"})
    assert made.status_code in (201, 202), made.text
    assert (await fleet.http.get(LIMITS)).json()["etag"] == before
