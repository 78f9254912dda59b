# SPDX-License-Identifier: Apache-2.0
"""What the cluster says of its nodes: cordons and taints begin drains, labels guide placement.

Agents are found by their pods: where one runs, the fleet has a node of that name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from godwit.fleet.v1 import schedule_service_pb2 as schedule_pb2

from services.common.errors import NotFoundError
from services.orchestrator.fleet import Fleet
from services.orchestrator.kubernetes import names
from services.orchestrator.kubernetes.api import Api, ConflictError, Object, key_of
from services.orchestrator.kubernetes.drains import Drains
from services.orchestrator.kubernetes.informer import Informer
from services.orchestrator.kubernetes.pods import is_ready
from services.orchestrator.kubernetes.settings import OnCordon
from services.orchestrator.kubernetes.workqueue import WorkQueue

log = logging.getLogger(__name__)

LOOK_S = 60.0
_NEVER_COPIED = ("node.kubernetes.io/unschedulable",)
"""A cordon: it becomes a drain, or nothing, by policy."""


class ClusterNodes:
    """Makes the fleet's nodes as the cluster's are."""

    def __init__(
        self,
        api: Api,
        fleet: Fleet,
        drains: Drains,
        *,
        on_cordon: OnCordon,
        when_uncordoned: str,
        namespace: str = "",
    ) -> None:
        """`when_uncordoned`: Open or Return, as NodeDrain.spec.whenDeleted."""
        self._api = api
        self._fleet = fleet
        self._drains = drains
        self._on_cordon = on_cordon
        self._when_uncordoned = when_uncordoned
        self.informer = Informer(api, names.NODES)
        self.agents = Informer(api, names.PODS, namespace=namespace, selector=names.AGENT_SELECTOR)
        self.queue = WorkQueue(self.reconcile, what="node")
        self._placed: dict[str, tuple[Mapping[str, str], tuple[str, ...]]] = {}
        self._registered: dict[str, str] = {}
        self.informer.on_change.append(lambda node: self.queue.add(key_of(node)))
        self.agents.on_change.append(self._agent_changed)

    def _agent_changed(self, pod: Object) -> None:
        if node := pod["spec"].get("nodeName"):
            self.queue.add(node)

    async def reconcile(self, name: str) -> float | None:
        """Make one right."""
        node = self.informer.get(name)
        await self._register(name)
        if node is None:
            return None
        await self._drain(node)
        try:
            await self._place(node)
        except NotFoundError:
            return LOOK_S  # No agent there, or not yet.
        return LOOK_S

    async def _register(self, name: str) -> None:
        for pod in self.agents.all():
            if pod["spec"].get("nodeName") != name or not is_ready(pod):
                continue
            address = _agent_address(pod)
            if address and self._registered.get(name) != address:
                await self._fleet.register_node(name, address)
                self._registered[name] = address
                log.info("node %s: its agent is pod %s at %s", name, key_of(pod), address)

    async def _place(self, node: Object) -> None:
        """Labels and taints, as selectors and tolerations of VMs look at them."""
        name = node["metadata"]["name"]
        labels = dict(sorted(node["metadata"].get("labels", {}).items()))
        taints = tuple(
            sorted(
                {
                    each["key"]
                    for each in node["spec"].get("taints", ())
                    if each["effect"] in ("NoSchedule", "NoExecute")
                    and each["key"] not in (*_NEVER_COPIED, names.DRAIN_TAINT)
                }
            )
        )
        if self._placed.get(name) == (labels, taints):
            return
        known = await self._fleet.get_node(name)
        await self._fleet.scheduling.set_node_placement(
            schedule_pb2.SetNodePlacementRequest(
                name=name, labels=labels, taints=taints, link=known.link
            )
        )
        self._placed[name] = (labels, taints)

    # --- cordon, taint → NodeDrain ---

    async def _drain(self, node: Object) -> None:
        name = node["metadata"]["name"]
        why = self._why(node)
        for origin in ("cordon", "taint"):
            key = f"{origin}-{name}"
            found = self._drains.informer.get(key)
            if found and found["metadata"].get("labels", {}).get(names.ORIGIN_LABEL) != origin:
                continue  # Somebody's own, of that name.
            if origin == why and found is None:
                await self._begin(node, origin)
            if origin != why and found and "deletionTimestamp" not in found["metadata"]:
                await self._api.delete(names.DRAINS, key, uid=found["metadata"]["uid"])
                log.info("node %s: no %s any more, its drain ends", name, origin)

    def _why(self, node: Object) -> str:
        spec = node["spec"]
        if any(each["key"] == names.DRAIN_TAINT for each in spec.get("taints", ())):
            return "taint"
        if spec.get("unschedulable", False) and self._on_cordon is OnCordon.DRAIN:
            return "cordon"
        return ""

    async def _begin(self, node: Object, origin: str) -> None:
        name = node["metadata"]["name"]
        try:
            await self._fleet.get_node(name)
        except NotFoundError:
            return  # A node without an agent: nothing of ours is there.
        body = {
            "metadata": {
                "name": f"{origin}-{name}",
                "labels": {names.ORIGIN_LABEL: origin},
                "ownerReferences": [
                    {
                        "apiVersion": "v1",
                        "kind": "Node",
                        "name": name,
                        "uid": node["metadata"]["uid"],
                    }
                ],
            },
            "spec": {"node": name, "whenDeleted": self._when_uncordoned},
        }
        try:
            await self._api.create(names.DRAINS, body)
            log.info("node %s: %s, it is drained", name, origin)
        except ConflictError:
            log.debug("node %s: there is a drain already", name)


def _agent_address(pod: Object) -> str:
    """host:port of the agent in a pod, as its named port says; "": it says none."""
    address = pod.get("status", {}).get("podIP", "")
    ports = [
        port["containerPort"]
        for container in pod["spec"]["containers"]
        for port in container.get("ports", ())
        if port.get("name") == names.AGENT_PORT
    ]
    if not address or not ports:
        return ""
    return f"[{address}]:{ports[0]}" if ":" in address else f"{address}:{ports[0]}"
