# SPDX-License-Identifier: Apache-2.0
"""What the API server itself keeps from us: wrong objects, and changes that may not be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.kube import ApiServer, RefusedError

pytestmark = pytest.mark.requires("kube")

MIGRATIONS = "/apis/godwit.io/v1alpha1/namespaces/crds/vmmigrations"
DRAINS = "/apis/godwit.io/v1alpha1/nodedrains"
MERGE = "application/merge-patch+json"


@pytest.fixture(scope="module")
def server(kube_with_crds: ApiServer) -> ApiServer:
    kube_with_crds.request("POST", "/api/v1/namespaces", {"metadata": {"name": "crds"}})
    return kube_with_crds


@pytest.fixture
def migration(server: ApiServer) -> Iterator[str]:
    """The path of an object that nobody looks at: no controller works in this module."""
    create(server, MIGRATIONS, "VMMigration", {"vm": "vm-1"}, name="one")
    yield f"{MIGRATIONS}/one"
    server.request("DELETE", f"{MIGRATIONS}/one")


def create(server: ApiServer, path: str, kind: str, spec: Any, *, name: str = "one") -> Any:
    body = {
        "apiVersion": "godwit.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    }
    return server.request("POST", path, body)


def refused(do: Any) -> str:
    """Do it; what the server said of it."""
    with pytest.raises(RefusedError) as caught:
        do()
    assert caught.value.status == 422
    return caught.value.message


def test_what_is_left_out_is_as_documented(server: ApiServer, migration: str) -> None:
    assert server.request("GET", migration)["spec"] == {
        "vm": "vm-1",
        "destinationNode": "",
        "mode": "PostCopy",
        "bulkBytesPerSecond": 0,
        "freezeAfterMilliseconds": 0,
        "cancelRequested": False,
    }


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ({}, "spec.vm"),
        ({"vm": ""}, "spec.vm"),
        ({"vm": "Upper"}, "spec.vm"),
        ({"vm": "x" * 64}, "spec.vm"),
        ({"vm": "a", "destinationNode": "not a node"}, "spec.destinationNode"),
        ({"vm": "a", "mode": "PreCopy"}, "spec.mode"),
        ({"vm": "a", "priority": "urgent"}, "spec.priority"),
        ({"vm": "a", "bulkBytesPerSecond": -1}, "spec.bulkBytesPerSecond"),
        ({"vm": "a", "bulkBytesPerSecond": "fast"}, "spec.bulkBytesPerSecond"),
        ({"vm": "a", "freezeAfterMilliseconds": 86400001}, "spec.freezeAfterMilliseconds"),
        ({"vm": "a", "ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished"),
    ],
)
def test_a_wrong_migration_names_its_field(server: ApiServer, spec: Any, names: str) -> None:
    said = refused(lambda: create(server, MIGRATIONS, "VMMigration", spec, name="wrong"))
    assert names in said, said


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ({}, "spec.node"),
        ({"node": "a", "parallelMax": 10001}, "spec.parallelMax"),
        ({"node": "a", "windows": ["late"]}, "spec.windows"),
        ({"node": "a", "whenDeleted": "Keep"}, "spec.whenDeleted"),
        ({"node": "a", "deadlineSeconds": -1}, "spec.deadlineSeconds"),
    ],
)
def test_a_wrong_drain_names_its_field(server: ApiServer, spec: Any, names: str) -> None:
    said = refused(lambda: create(server, DRAINS, "NodeDrain", spec, name="wrong"))
    assert names in said, said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vm": "vm-2"}, "vm cannot be changed"),
        ({"destinationNode": "b"}, "destinationNode cannot be changed"),
        ({"bulkBytesPerSecond": 5}, "bulkBytesPerSecond cannot be changed"),
        ({"freezeAfterMilliseconds": 5}, "freezeAfterMilliseconds cannot be changed"),
    ],
)
def test_what_was_asked_for_stays(
    server: ApiServer, migration: str, change: Any, says: str
) -> None:
    said = refused(lambda: server.request("PATCH", migration, {"spec": change}, media=MERGE))
    assert says in said


def test_a_cancel_is_not_taken_back(server: ApiServer, migration: str) -> None:
    server.request("PATCH", migration, {"spec": {"cancelRequested": True}}, media=MERGE)
    said = refused(
        lambda: server.request(
            "PATCH", migration, {"spec": {"cancelRequested": False}}, media=MERGE
        )
    )
    assert "a cancel cannot be taken back" in said


def test_its_priority_changes_only_while_it_waits(server: ApiServer, migration: str) -> None:
    server.request("PATCH", migration, {"spec": {"priority": "System"}}, media=MERGE)
    status = {"status": {"phase": "Pending"}}
    server.request("PATCH", f"{migration}/status", status, media=MERGE)
    server.request("PATCH", migration, {"spec": {"priority": "User"}}, media=MERGE)
    status = {"status": {"phase": "Postcopy"}}
    server.request("PATCH", f"{migration}/status", status, media=MERGE)
    said = refused(
        lambda: server.request("PATCH", migration, {"spec": {"priority": "System"}}, media=MERGE)
    )
    assert "only while the phase is Pending" in said


def test_the_status_is_a_resource_of_its_own(server: ApiServer, migration: str) -> None:
    server.request("PATCH", migration, {"status": {"phase": "Failed"}}, media=MERGE)
    assert "status" not in server.request("GET", migration)
    said = refused(
        lambda: server.request(
            "PATCH", f"{migration}/status", {"status": {"phase": "Sideways"}}, media=MERGE
        )
    )
    assert "status.phase" in said


def test_conditions_are_keyed_by_type(server: ApiServer, migration: str) -> None:
    condition = {
        "type": "Succeeded",
        "status": "True",
        "reason": "Succeeded",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    said = refused(
        lambda: server.request(
            "PATCH",
            f"{migration}/status",
            {"status": {"conditions": [condition, condition]}},
            media=MERGE,
        )
    )
    assert "Duplicate value" in said


def test_a_stale_write_is_a_conflict(server: ApiServer, migration: str) -> None:
    old = server.request("GET", migration)["metadata"]["resourceVersion"]
    server.request("PATCH", migration, {"spec": {"priority": "User"}}, media=MERGE)
    body = {"metadata": {"resourceVersion": old}, "status": {"phase": "Pending"}}
    with pytest.raises(RefusedError) as caught:
        server.request("PATCH", f"{migration}/status", body, media=MERGE)
    assert caught.value.status == 409


def test_kubectl_get_has_the_columns(server: ApiServer, migration: str) -> None:
    status = {
        "phase": "Postcopy",
        "sourceNode": "a",
        "destinationNode": "b",
        "progress": "43%",
        "pause": "41ms",
    }
    server.request("PATCH", f"{migration}/status", {"status": status}, media=MERGE)
    table = as_table(server, migration)
    names = [each["name"] for each in table["columnDefinitions"] if each["priority"] == 0]
    assert names == ["Name", "VM", "From", "To", "Mode", "Phase", "Progress", "Pause", "Age"]
    cells = table["rows"][0]["cells"]
    assert cells[:8] == ["one", "vm-1", "a", "b", "PostCopy", "Postcopy", "43%", "41ms"]


def test_a_drain_has_its_columns(server: ApiServer) -> None:
    create(server, DRAINS, "NodeDrain", {"node": "nowhere"}, name="columns")
    try:
        table = as_table(server, f"{DRAINS}/columns")
        names = [each["name"] for each in table["columnDefinitions"] if each["priority"] == 0]
        assert names == ["Name", "Node", "Phase", "Progress", "VMs", "Moved", "Failed", "Age"]
    finally:
        body: Any = {"metadata": {"finalizers": []}}
        server.request("PATCH", f"{DRAINS}/columns", body, media=MERGE)
        server.request("DELETE", f"{DRAINS}/columns")


def as_table(server: ApiServer, path: str) -> Any:
    """As kubectl asks for it."""
    return server.request("GET", path, accept="application/json;as=Table;v=v1;g=meta.k8s.io")
