# SPDX-License-Identifier: Apache-2.0
"""A fleet of microvms in a cluster: real agents and guests; their pods are objects beside them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from godwit.client import AsyncClient

from services.demo.cluster import Cluster, running_cluster
from services.demo.microvm_guest import MicrovmGuest, make_spec
from tests.harness.kube import ApiServer, RefusedError
from tests.harness.kubelet import Kubelet, make_node, make_vm_pod, wait_for

MIGRATIONS = "/apis/godwit.io/v1alpha1/namespaces/default/vmmigrations"
DRAINS = "/apis/godwit.io/v1alpha1/nodedrains"
PODS = "/api/v1/namespaces/default/pods"
MERGE = "application/merge-patch+json"


@dataclass(slots=True, kw_only=True)
class World:
    """A fleet in a cluster."""

    server: ApiServer
    kubelet: Kubelet
    cluster: Cluster
    client: AsyncClient
    environment: dict[str, str] = field(default_factory=dict)
    """What the parts were given."""
    guests: dict[str, MicrovmGuest] = field(default_factory=dict)

    async def start(self, vm_id: str, node: str, **pod: Any) -> MicrovmGuest:
        """A guest and its pod."""
        spec = make_spec(vm_id, accel="thread", memory_bytes=64 << 20, workload_bytes=4 << 20)
        guest = await MicrovmGuest.start(spec, node, cluster=self.cluster, client=self.client)
        await asyncio.to_thread(make_vm_pod, self.server, vm_id, node, **pod)
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
            found = self.find(f"{MIGRATIONS}/{name}")
            return found if "completionTime" in found.get("status", {}) else None

        return await asyncio.to_thread(wait_for, over, f"{name} is over")

    def find(self, path: str) -> Any:
        """What is there, or {}."""
        try:
            return self.server.request("GET", path)
        except RefusedError as error:
            if error.status != 404:
                raise
            return {}

    async def request(self, method: str, path: str, body: Any = None, **more: str) -> Any:
        """As the cluster's admin."""
        return await asyncio.to_thread(self.server.request, method, path, body, **more)

    async def patch(self, path: str, body: Any) -> Any:
        """The same, a merge patch."""
        return await self.request("PATCH", path, body, media=MERGE)

    async def until(self, true: Callable[[], Any], what: str) -> Any:
        """See wait_for; `true` may ask the server."""
        return await asyncio.to_thread(wait_for, true, what)

    async def phase(self, name: str, *phases: str) -> Any:
        """A VMMigration, once it is in one of the phases."""

        def there() -> Any:
            found = self.find(f"{MIGRATIONS}/{name}")
            return found if found.get("status", {}).get("phase") in phases else None

        return await self.until(there, f"{name} is {phases}")

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


@asynccontextmanager
async def fleet_in_cluster(
    server: ApiServer, kubelet: Kubelet, directory: Path, names: tuple[str, ...], **environment: str
) -> AsyncIterator[World]:
    """A fleet whose orchestrator is the controller of an API server."""
    for name in names:
        await asyncio.to_thread(make_node, server, name, {"zone": f"zone-{name}"})
    # A Lease of its own: the one before may have been killed with it.
    namespace = {"metadata": {"name": f"controller-{names[0]}"}}
    await asyncio.to_thread(server.request, "POST", "/api/v1/namespaces", namespace)
    whole = {
        "GODWIT_KUBECONFIG": str(server.kubeconfig),
        "GODWIT_LEASE_NAMESPACE": namespace["metadata"]["name"],
        **environment,
    }
    async with (
        running_cluster(directory, node_names=names, environment=whole, hooked=True) as cluster,
        cluster.client() as client,
    ):
        yield World(
            server=server, kubelet=kubelet, cluster=cluster, client=client, environment=whole
        )


def condition(found: Any, name: str) -> tuple[str, str]:
    """(status, reason) of a condition; ("", "") where there is none."""
    by_type = {each["type"]: each for each in found["status"].get("conditions", ())}
    each = by_type.get(name, {"status": "", "reason": ""})
    return each["status"], each["reason"]
