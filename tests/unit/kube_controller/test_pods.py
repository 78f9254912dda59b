# SPDX-License-Identifier: Apache-2.0
"""The destination's pod: as the source's, but for what is one pod's alone."""

from __future__ import annotations

import copy
from typing import Any

from services.orchestrator.kubernetes.pods import clone
from services.orchestrator.store.rows import MigrationRow, VmRow, VmState

SOURCE: Any = {
    "metadata": {
        "name": "db-0",
        "namespace": "vms",
        "uid": "u-1",
        "resourceVersion": "7",
        "labels": {"godwit.io/vm": "db", "app": "db"},
        "annotations": {"team": "red", "kubernetes.io/psp": "x", "cni.example/ip": "10.0.0.1"},
        "ownerReferences": [
            {"apiVersion": "v1", "kind": "Owner", "name": "o", "uid": "u", "controller": True}
        ],
    },
    "spec": {
        "nodeName": "a",
        "nodeSelector": {"kubernetes.io/hostname": "a", "disk": "fast"},
        "volumes": [
            {"name": "disk", "persistentVolumeClaim": {"claimName": "db"}},
            {"name": "kube-api-access-x7", "projected": {}},
        ],
        "containers": [
            {
                "name": "vmm",
                "image": "vmm:1",
                "volumeMounts": [
                    {"name": "disk", "mountPath": "/disk"},
                    {"name": "kube-api-access-x7", "mountPath": "/var/run/secrets"},
                ],
            }
        ],
    },
    "status": {"phase": "Running"},
}


def row(migration_id: str = "01ABCDEFGHJKMNPQRSTVWXYZ12", node: str = "b") -> MigrationRow:
    vm = VmRow(
        vm_id="db",
        node="a",
        epoch=1,
        spec_json="{}",
        spec_hash="",
        created_at_ns=1,
        memory_bytes=1 << 20,
        state=VmState.RUNNING,
    )
    return MigrationRow.new(
        migration_id=migration_id,
        vm=vm,
        destination_node=node,
        bulk_bytes_per_s_max=0,
        traceparent="",
        now_ns=1,
    )


def test_it_is_a_pod_of_its_own_on_the_other_node() -> None:
    before = copy.deepcopy(SOURCE)
    made = clone(SOURCE, row())
    assert before == SOURCE
    assert made["metadata"]["name"] == "db-0-tvwxyz12"
    assert made["metadata"]["namespace"] == "vms"
    assert made["spec"]["nodeName"] == "b"
    assert made["spec"]["nodeSelector"] == {"disk": "fast"}
    assert "uid" not in made["metadata"]
    assert "resourceVersion" not in made["metadata"]
    assert "status" not in made


def test_labels_volumes_and_owner_go_with_it() -> None:
    made = clone(SOURCE, row())
    assert made["metadata"]["labels"] == {
        "godwit.io/vm": "db",
        "app": "db",
        "godwit.io/migration": "01abcdefghjkmnpqrstvwxyz12",
    }
    owner = made["metadata"]["ownerReferences"][0]
    assert (owner["uid"], owner["controller"]) == ("u", False)
    assert [each["name"] for each in made["spec"]["volumes"]] == ["disk"]
    assert [each["name"] for each in made["spec"]["containers"][0]["volumeMounts"]] == ["disk"]


def test_what_was_said_of_the_one_pod_stays_behind() -> None:
    annotations = clone(SOURCE, row())["metadata"]["annotations"]
    assert annotations == {"team": "red", "godwit.io/base-name": "db-0"}


def test_names_do_not_grow_with_every_move() -> None:
    first = clone(SOURCE, row())
    second = clone(first, row("01ABCDEFGHJKMNPQRSTVWXYZ34", "a"))
    assert second["metadata"]["name"] == "db-0-tvwxyz34"
