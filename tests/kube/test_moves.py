# SPDX-License-Identifier: Apache-2.0
"""Real guests of real agents, moved by Kubernetes objects: microvms beside their pods."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
from godwit.client import AsyncClient

from services.demo.cluster import Cluster, running_cluster
from services.demo.microvm_guest import MicrovmGuest, make_spec
from tests.harness.kube import ApiServer
from tests.harness.kubelet import Kubelet, make_node, make_vm_pod, wait_for
from tests.harness.microvm import need_backend

pytestmark = [
    pytest.mark.requires("kube", "uffd"),
    pytest.mark.asyncio(loop_scope="module"),
]

MIGRATIONS = "/apis/godwit.io/v1alpha1/namespaces/default/vmmigrations"
DRAINS = "/apis/godwit.io/v1alpha1/nodedrains"
PODS = "/api/v1/namespaces/default/pods"
NODES = ("a", "b", "c")
MERGE = "application/merge-patch+json"


@dataclass(slots=True, kw_only=True)
class World:
    """A fleet in a cluster."""

    server: ApiServer
    kubelet: Kubelet
    cluster: Cluster
    client: AsyncClient
    guests: dict[str, MicrovmGuest] = field(default_factory=dict)

    async def start(self, vm_id: str, node: str) -> MicrovmGuest:
        """A guest and its pod."""
        spec = make_spec(vm_id, accel="thread", memory_bytes=64 << 20, workload_bytes=4 << 20)
        guest = await MicrovmGuest.start(spec, node, cluster=self.cluster, client=self.client)
        await asyncio.to_thread(make_vm_pod, self.server, vm_id, node)
        self.guests[vm_id] = guest
        return guest

    async def where(self, vm_id: str) -> str:
        """Where the store has it; the guest is told."""
        node = (await self.client.vm(vm_id)).node
        if self.guests[vm_id].node != node:
            self.guests[vm_id].was_moved(node)
        return node

    async def verify(self, vm_id: str) -> None:
        """Every page of the guest is right."""
        await self.where(vm_id)
        stay = await self.guests[vm_id].look_again()
        assert stay.sweep["errors"] == 0
        assert stay.sweep["pages_verified"] == self.guests[vm_id].page_count

    async def migrate(self, name: str, **spec: Any) -> Any:
        """Make a VMMigration."""
        body = {
            "apiVersion": "godwit.io/v1alpha1",
            "kind": "VMMigration",
            "metadata": {"name": name},
            "spec": spec,
        }
        return await asyncio.to_thread(self.server.request, "POST", MIGRATIONS, body)

    async def ended(self, name: str) -> Any:
        """A VMMigration, once it is over."""

        def over() -> Any:
            found = self.server.request("GET", f"{MIGRATIONS}/{name}")
            return found if "completionTime" in found.get("status", {}) else None

        return await asyncio.to_thread(wait_for, over, f"{name} is over")

    async def pods_of(self, vm_id: str, *nodes: str) -> list[Any]:
        """The VM's pods, once they are on just these nodes."""

        def right() -> Any:
            found = self.server.request("GET", f"{PODS}?labelSelector=godwit.io/vm={vm_id}")[
                "items"
            ]
            return (
                found if sorted(each["spec"]["nodeName"] for each in found) == sorted(nodes) else []
            )

        return list(await asyncio.to_thread(wait_for, right, f"pods of {vm_id} are on {nodes}"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    kube_with_crds: ApiServer, kubelets: Kubelet, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    need_backend("thread", "uffd")
    for name in NODES:
        make_node(kube_with_crds, name, {"zone": f"zone-{name}"})
    environment = {"GODWIT_KUBECONFIG": str(kube_with_crds.kubeconfig)}
    async with (
        running_cluster(
            tmp_path_factory.mktemp("kube") / "cluster",
            node_names=NODES,
            environment=environment,
            hooked=True,
        ) as cluster,
        cluster.client() as client,
    ):
        yield World(server=kube_with_crds, kubelet=kubelets, cluster=cluster, client=client)


def condition(found: Any, name: str) -> tuple[str, str]:
    """(status, reason)."""
    by_type = {each["type"]: each for each in found["status"]["conditions"]}
    return by_type[name]["status"], by_type[name]["reason"]


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
