# SPDX-License-Identifier: Apache-2.0
"""The controller does all its work with the account that the chart gives it, and no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.harness import helm
from tests.harness.chart_accounts import apply, create, token_of
from tests.harness.kube import ApiServer
from tests.harness.kube_fleet import DRAINS, MERGE, World, fleet_in_cluster
from tests.harness.kubelet import Kubelet, wait_for
from tests.harness.microvm import need_backend

pytestmark = [
    pytest.mark.requires("kube", "uffd"),
    pytest.mark.asyncio(loop_scope="module"),
]

NAMESPACE = "as-installed"
NODES = ("ca", "cb", "cc")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    kube_with_crds: ApiServer, kubelets: Kubelet, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    need_backend("thread", "uffd")
    server = kube_with_crds
    create(server, {"kind": "Namespace", "metadata": {"name": NAMESPACE}})
    kinds = {"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    objects = helm.render(name="own", namespace=NAMESPACE)
    apply(server, [each for each in objects if each["kind"] in kinds])
    account = server.directory / "orchestrator.kubeconfig"
    server.write_kubeconfig(
        account, {"token": token_of(server, "own-godwit-orchestrator", NAMESPACE)}
    )
    directory = tmp_path_factory.mktemp("kube") / "cluster"
    environment = {"GODWIT_KUBECONFIG": str(account), "GODWIT_LEASE_NAMESPACE": NAMESPACE}
    async with fleet_in_cluster(server, kubelets, directory, NODES, **environment) as made:
        yield made


async def test_a_guest_moves_and_a_cordon_drains(world: World) -> None:
    """An object, pods, budgets, events, the Lease; then a cordon, and its drain ends with it."""
    await world.start("own-1", "ca")
    await world.migrate("own-first", vm="own-1", destinationNode="cb")
    done = await world.ended("own-first")
    assert done["status"]["phase"] == "Succeeded", done["status"]
    await world.pods_of("own-1", "cb")
    await world.verify("own-1")
    await asyncio.to_thread(
        world.server.request,
        "PATCH",
        "/api/v1/nodes/cb",
        {"spec": {"unschedulable": True}},
        media=MERGE,
    )

    def drained() -> bool:
        found = world.server.request("GET", f"{DRAINS}/cordon-cb")
        return bool(found.get("status", {}).get("phase") == "Succeeded")

    def begun() -> bool:
        items = world.server.request("GET", DRAINS)["items"]
        return any(each["metadata"]["name"] == "cordon-cb" for each in items)

    await asyncio.to_thread(wait_for, begun, "the cordon has become a drain")
    await asyncio.to_thread(wait_for, drained, "the node is empty")
    assert await world.where("own-1") != "cb"
    await world.verify("own-1")
    events = await asyncio.to_thread(
        world.server.request, "GET", "/apis/events.k8s.io/v1/namespaces/default/events"
    )
    assert any("own-first" in str(each["regarding"]) for each in events["items"])
    lease = await asyncio.to_thread(
        world.server.request,
        "GET",
        f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/godwit-controller",
    )
    assert lease["spec"]["holderIdentity"]
    log = (world.cluster.directory / "logs" / "orchestrator.log").read_text()
    assert "forbidden" not in log.lower(), "it asked for something that it may not"
