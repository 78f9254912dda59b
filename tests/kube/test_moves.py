# SPDX-License-Identifier: Apache-2.0
"""Real guests of real agents, moved by Kubernetes objects: microvms beside their pods."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from godwit import schedule

from tests.harness.kube import ApiServer
from tests.harness.kube_fleet import DRAINS, MIGRATIONS, PODS, World, condition, fleet_in_cluster
from tests.harness.kubelet import Kubelet
from tests.harness.microvm import need_backend

pytestmark = [
    pytest.mark.requires("kube", "uffd"),
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    kube_with_crds: ApiServer, kubelets: Kubelet, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    need_backend("thread", "uffd")
    directory = tmp_path_factory.mktemp("kube") / "cluster"
    async with fleet_in_cluster(kube_with_crds, kubelets, directory, ("a", "b", "c")) as made:
        yield made


async def test_an_object_moves_a_guest(world: World) -> None:
    await world.start("vm-1", "a")
    await world.verify("vm-1")
    await world.migrate("first", vm="vm-1", destinationNode="b")
    done = await world.ended("first")
    status = done["status"]
    assert status["phase"] == "Succeeded", status
    assert (status["sourceNode"], status["destinationNode"]) == ("a", "b")
    assert (status["progress"], status["epoch"]) == ("100%", 2)
    assert status["pause"].endswith("ms")
    for name in ("Admitted", "PodReady", "Committed", "MemoryComplete", "Succeeded"):
        assert condition(done, name)[0] == "True", name
    assert condition(done, "NeedsAttention")[0] == "False"
    assert not done["metadata"].get("finalizers")
    pods = await world.pods_of("vm-1", "b")
    assert status["destinationPod"] == f"default/{pods[0]['metadata']['name']}"
    await world.verify("vm-1")
    assert await world.where("vm-1") == "b"
    events = await world.request("GET", "/apis/events.k8s.io/v1/namespaces/default/events")
    told = [each["reason"] for each in events["items"] if each["regarding"]["name"] == "first"]
    assert {"Pending", "Committed", "Postcopy", "Succeeded"} <= set(told)
    assert len(told) == len(set(told))


async def test_a_move_asked_for_elsewhere_has_an_object(world: World) -> None:
    await world.start("vm-2", "a")
    made = await world.client.migrate("vm-2", "b")
    done = await world.ended(f"vm-2-{made.migration_id.lower()}")
    assert done["status"]["migrationId"] == made.migration_id
    assert done["metadata"]["labels"]["godwit.io/origin"] == "mirror"
    assert done["status"]["phase"] == "Succeeded"
    await world.pods_of("vm-2", "b")
    await world.verify("vm-2")


async def test_what_cannot_be_is_refused_and_says_why(world: World) -> None:
    await world.migrate("nobody", vm="there-is-none", destinationNode="b")
    done = await world.ended("nobody")
    assert (done["status"]["phase"], done["status"]["reason"]) == ("Refused", "VM_UNKNOWN")
    assert condition(done, "Succeeded") == ("False", "VM_UNKNOWN")
    await world.request("DELETE", f"{MIGRATIONS}/nobody")
    await world.until(lambda: not world.find(f"{MIGRATIONS}/nobody"), "it is gone")


async def test_a_volume_of_one_node_keeps_its_guest_there(world: World) -> None:
    claim = {
        "metadata": {"name": "disk-3"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    await world.request("POST", "/api/v1/namespaces/default/persistentvolumeclaims", claim)
    await world.start("vm-3", "a", volumes=[_volume("disk-3")])
    await world.migrate("third", vm="vm-3", destinationNode="b")
    done = await world.ended("third")
    assert (done["status"]["phase"], done["status"]["reason"]) == (
        "Failed",
        "POD_VOLUME_NOT_SHARED",
    )
    await world.pods_of("vm-3", "a")
    await world.verify("vm-3")


async def test_deleted_before_its_decision_it_is_rolled_back(world: World) -> None:
    await world.start("vm-4", "a")
    world.kubelet.holding.add("b")
    try:
        await world.migrate("fourth", vm="vm-4", destinationNode="b")
        found = await world.phase("fourth", "Preparing")
        assert found["metadata"]["finalizers"] == ["godwit.io/rollback"]
        await world.pods_of("vm-4", "a", "b")
        await world.request("DELETE", f"{MIGRATIONS}/fourth")

        def gone() -> bool:
            items = world.server.request("GET", MIGRATIONS)["items"]
            return "fourth" not in {each["metadata"]["name"] for each in items}

        await world.until(gone, "fourth is gone")
    finally:
        world.kubelet.holding.clear()
    await world.pods_of("vm-4", "a")
    assert await world.where("vm-4") == "a"
    migration = await world.client.migration(found["status"]["migrationId"])
    assert migration.phase == "cancelled"
    await world.verify("vm-4")


async def test_cancelled_before_its_decision(world: World) -> None:
    await world.start("vm-5", "a")
    world.kubelet.holding.add("c")
    try:
        await world.migrate("fifth", vm="vm-5", destinationNode="c")
        await world.phase("fifth", "Preparing")
        await world.patch(f"{MIGRATIONS}/fifth", {"spec": {"cancelRequested": True}})
        done = await world.ended("fifth")
    finally:
        world.kubelet.holding.clear()
    assert done["status"]["phase"] == "Cancelled"
    assert condition(done, "Cancelled") == ("True", "Cancelled")
    await world.pods_of("vm-5", "a")
    await world.verify("vm-5")


async def test_its_class_is_changed_while_it_waits(world: World) -> None:
    """With nothing admitted, the queue's order is told by places."""
    await world.start("vm-9", "a")
    await world.start("vm-10", "a")
    await world.client.send(schedule.freeze("a test"))
    try:
        for name, vm in (("nine", "vm-9"), ("ten", "vm-10")):
            await world.migrate(name, vm=vm, destinationNode="b", priority="User")
            await world.phase(name, "Pending")
        await world.patch(f"{MIGRATIONS}/ten", {"spec": {"priority": "System"}})

        first = ""
        async with asyncio.timeout(60):
            while first != "vm-10":
                await asyncio.sleep(0.05)
                first = (await world.client.send(schedule.get_queue())).value.entries[0].vm_id
    finally:
        await world.client.send(schedule.thaw())
    for name in ("nine", "ten"):
        assert (await world.ended(name))["status"]["phase"] == "Succeeded"


async def test_a_controller_killed_in_the_middle(world: World) -> None:
    await world.start("vm-6", "a")
    world.kubelet.holding.add("b")
    await world.migrate("sixth", vm="vm-6", destinationNode="b")
    await world.phase("sixth", "Preparing")
    await world.cluster.orchestrator.kill()
    world.kubelet.holding.clear()
    await world.cluster.start(world.cluster.orchestrator)
    done = await world.ended("sixth")
    assert done["status"]["phase"] == "Succeeded", done["status"]
    await world.pods_of("vm-6", "b")
    await world.verify("vm-6")


async def test_a_cordon_empties_a_node(world: World) -> None:
    before = sorted(vm.vm_id for vm in await world.client.vms() if vm.node == "a")
    for vm_id in ("vm-7", "vm-8"):
        await world.start(vm_id, "a")
    # The volume of one node keeps its guest; the rest can go.
    await world.client.stop_vm("vm-3")
    await world.request("DELETE", f"{PODS}/vm-3")
    await world.patch("/api/v1/nodes/a", {"spec": {"unschedulable": True}})

    def drained() -> Any:
        found = world.find(f"{DRAINS}/cordon-a")
        return found if found.get("status", {}).get("phase") == "Succeeded" else None

    done = await world.until(drained, "a is drained")
    assert done["status"]["vms"]["moved"] == len(before) + 1
    assert done["status"]["vms"]["failed"] == 0
    for vm_id in ("vm-7", "vm-8"):
        node = await world.where(vm_id)
        assert node != "a"
        await world.pods_of(vm_id, node)
        await world.verify(vm_id)
    events = await world.request("GET", "/apis/events.k8s.io/v1/namespaces/default/events")
    told = {each["reason"] for each in events["items"] if each["regarding"]["name"] == "cordon-a"}
    assert "DrainSucceeded" in told
    # Opened again with the cordon's end.
    await world.patch("/api/v1/nodes/a", {"spec": {"unschedulable": None}})

    def over() -> bool:
        return not world.server.request("GET", DRAINS)["items"]

    await world.until(over, "the drain's object is gone")
    nodes = {node.name: node for node in await world.client.nodes()}
    assert not nodes["a"].closed_by


async def test_a_node_is_placed_as_the_cluster_labels_it(world: World) -> None:
    nodes = {node.name: node for node in await world.client.nodes()}
    assert (nodes["b"].labels or {})["zone"] == "zone-b"
    taint = {"key": "gpu", "effect": "NoSchedule"}
    await world.patch("/api/v1/nodes/b", {"spec": {"taints": [taint]}})
    async with asyncio.timeout(60):
        while nodes["b"].taints != ("gpu",):
            await asyncio.sleep(0.05)
            nodes = {node.name: node for node in await world.client.nodes()}
    await world.patch("/api/v1/nodes/b", {"spec": {"taints": None}})


async def test_a_guest_has_a_budget(world: World) -> None:
    await world.until(
        lambda: (
            world.server.request(
                "GET", "/apis/policy/v1/namespaces/default/poddisruptionbudgets/godwit-vm-6"
            )["spec"]["minAvailable"]
            == 1
        ),
        "vm-6 has a budget of one pod",
    )


def _volume(claim: str) -> Any:
    return {"name": "disk", "persistentVolumeClaim": {"claimName": claim}}
