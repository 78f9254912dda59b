# SPDX-License-Identifier: Apache-2.0
"""The pods of virtual machines: one where the guest is, one more where it goes while it moves.

A pod stands for its guest's place in the cluster's books: memory, devices, volumes, quota. Before a
guest is prepared anywhere, its destination has a pod, a clone of the source's; after the end, the
pod of the side without the guest goes. Which side that is the store says, never the pods.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Iterable

from services.common.errors import FailedPreconditionError
from services.orchestrator.kubernetes import names
from services.orchestrator.kubernetes.api import Api, ConflictError, Object, RefusedError, key_of
from services.orchestrator.kubernetes.informer import Informer
from services.orchestrator.kubernetes.workqueue import WorkQueue
from services.orchestrator.store import Store
from services.orchestrator.store.rows import MigrationRow

log = logging.getLogger(__name__)

LOOK_S = 30.0
_SHARED = "ReadWriteMany"
_HOSTNAME = "kubernetes.io/hostname"
_FAILED = frozenset({"Failed", "Succeeded"})
_SET_BY_OTHERS = ("kubectl.kubernetes.io/", "kubernetes.io/", "cni.", "k8s.v1.cni")
"""Annotations of one pod alone."""


class Pods:
    """Keeps the pods as the store has the guests."""

    def __init__(self, api: Api, store: Store, *, namespace: str = "") -> None:
        self._api = api
        self._store = store
        self.informer = Informer(api, names.PODS, namespace=namespace, selector=names.VM_LABEL)
        self.queue = WorkQueue(self.reconcile, what="the pods of VM")
        self.informer.on_change.append(self._changed)
        self._stirred = asyncio.Event()

    def _changed(self, pod: Object) -> None:
        self.queue.add(vm_of(pod))
        self._stirred.set()

    # --- looking ---

    def of(self, vm_id: str, node: str = "") -> Object | None:
        """The VM's pod on a node, or (no node) any; of several the one that is ready."""
        found = [
            pod
            for pod in self.informer.all()
            if vm_of(pod) == vm_id and (not node or pod["spec"].get("nodeName") == node)
        ]
        found.sort(key=lambda pod: (is_ready(pod), key_of(pod)), reverse=True)
        return found[0] if found else None

    def ready_for(self, migration_id: str) -> str:
        """NAMESPACE/NAME of the pod that was made for a migration, once it is ready; else empty."""
        for pod in self.informer.all():
            if pod["metadata"]["labels"].get(names.MIGRATION_LABEL) == migration_id.lower():
                return key_of(pod) if is_ready(pod) else ""
        return ""

    # --- before the move: Context.homes ---

    async def prepare(self, row: MigrationRow) -> None:
        """Return once the destination has a pod for the guest, and that is ready.

        Raises:
            FailedPreconditionError: POD_VOLUME_NOT_SHARED, POD_REFUSED, POD_FAILED.
            UnavailableError: the API server does not answer.
        """
        source = self.of(row.vm_id, row.source_node)
        if source is None:
            return  # A VM without a pod: there are such, and nothing is booked for them.
        await self._check_volumes(source)
        key = await self._make(source, row)
        while True:
            self._stirred.clear()
            pod = self.informer.get(key)
            if pod and pod.get("status", {}).get("phase") in _FAILED:
                raise FailedPreconditionError(
                    "POD_FAILED",
                    f"pod {key} on {row.destination_node} ended before the guest came",
                    hint=f"kubectl describe pod says why: {key}",
                )
            if pod and is_ready(pod):
                return
            await self._stirred.wait()

    async def _check_volumes(self, source: Object) -> None:
        namespace = source["metadata"]["namespace"]
        for volume in source["spec"].get("volumes", ()):
            claim_name = volume.get("persistentVolumeClaim", {}).get("claimName")
            if not claim_name:
                continue
            claim = await self._api.find(names.CLAIMS, f"{namespace}/{claim_name}")
            modes = claim["spec"].get("accessModes", []) if claim else []
            if _SHARED not in modes:
                raise FailedPreconditionError(
                    "POD_VOLUME_NOT_SHARED",
                    f"volume claim {claim_name} of pod {key_of(source)} is {modes or 'missing'},"
                    f" not {_SHARED}: two nodes cannot have it at a time",
                    hint="put the VM's disks on volumes that are ReadWriteMany",
                )

    async def _make(self, source: Object, row: MigrationRow) -> str:
        """The destination's pod, which may be there already; its key."""
        body = clone(source, row)
        try:
            made = await self._api.create(
                names.PODS, body, namespace=source["metadata"]["namespace"]
            )
        except ConflictError:
            return key_of(body)
        except RefusedError as error:
            raise FailedPreconditionError(
                "POD_REFUSED",
                f"a pod for {row.vm_id} on {row.destination_node} was refused: {error.message}",
                hint="quota, admission policies or RBAC: see the message",
            ) from error
        log.info("migration %s: made pod %s", row.migration_id, key_of(made))
        return key_of(made)

    # --- afterwards ---

    async def reconcile(self, vm_id: str) -> float | None:
        """Remove the pods of sides that have no guest; keep one budget."""
        mine = [pod for pod in self.informer.all() if vm_of(pod) == vm_id]
        vm = await self._store.fleet.vm(vm_id)
        if vm is None:
            return None  # Not ours, or not yet.
        active = await self._store.migrations.active_of(vm_id)
        if not active:
            await self._remove_others(vm_id, vm.node, mine)
        await self._keep_budget(vm_id, mine)
        return LOOK_S if active else None

    async def _remove_others(self, vm_id: str, node: str, mine: Iterable[Object]) -> None:
        """No move is under way: where the store says the guest is, its pod stays; others go.

        Only where the other side owes nothing more: it may still hold memory.
        """
        owing = {
            each
            for row in await self._store.migrations.owing()
            if row.vm_id == vm_id
            for each, owes in (
                (row.source_node, row.source_owed),
                (row.destination_node, row.destination_owed),
            )
            if owes
        }
        for pod in mine:
            where = pod["spec"].get("nodeName", "")
            metadata = pod["metadata"]
            if not where or where == node or where in owing or "deletionTimestamp" in metadata:
                continue
            await self._api.delete(names.PODS, key_of(pod), uid=metadata["uid"])
            log.info("VM %s is on %s: removed pod %s of %s", vm_id, node, key_of(pod), where)

    async def _keep_budget(self, vm_id: str, mine: list[Object]) -> None:
        """Nobody evicts a guest's pod unasked, even while our webhook is away.

        `minAvailable`: pods that belong to no controller know no other kind of budget.
        """
        living = [pod for pod in mine if "deletionTimestamp" not in pod["metadata"]]
        if not mine:
            return
        namespace = mine[0]["metadata"]["namespace"]
        key = f"{namespace}/{budget_name(vm_id)}"
        found = await self._api.find(names.BUDGETS, key)
        if not living:
            if found:
                await self._api.delete(names.BUDGETS, key)
            return
        if found and found["spec"].get("minAvailable") == len(living):
            return
        spec = {
            "minAvailable": len(living),
            "selector": {"matchLabels": {names.VM_LABEL: vm_id}},
        }
        if found:
            await self._api.patch(names.BUDGETS, key, {"spec": spec})
            return
        body = {
            "metadata": {"name": budget_name(vm_id), "labels": {names.VM_LABEL: vm_id}},
            "spec": spec,
        }
        await self._api.create(names.BUDGETS, body, namespace=namespace)


def vm_of(pod: Object) -> str:
    """The VM that a pod is."""
    return str(pod["metadata"]["labels"][names.VM_LABEL])


def budget_name(vm_id: str) -> str:
    """Of the PodDisruptionBudget of a VM."""
    return f"godwit-{vm_id}"


def is_ready(pod: Object) -> bool:
    """As the kubelet says."""
    conditions = pod.get("status", {}).get("conditions", ())
    return "deletionTimestamp" not in pod["metadata"] and any(
        each["type"] == "Ready" and each["status"] == "True" for each in conditions
    )


def clone(source: Object, row: MigrationRow) -> Object:
    """The destination's pod: as the source's, on the other node, with a name of its own.

    Its owner, volumes, labels and resources are the same. What admission added to the one pod is
    left out, and comes again: the service account's token, the node's tolerations are kept.
    """
    metadata = source["metadata"]
    labels = {**metadata["labels"], names.MIGRATION_LABEL: row.migration_id.lower()}
    annotations = {
        name: value
        for name, value in metadata.get("annotations", {}).items()
        if not name.startswith(_SET_BY_OTHERS)
    }
    owners = [
        # Two pods of one controller: it would remove one of them. It is told afterwards.
        {**each, "controller": False, "blockOwnerDeletion": False}
        for each in metadata.get("ownerReferences", ())
    ]
    spec = copy.deepcopy(source["spec"])
    spec["nodeName"] = row.destination_node
    spec.pop("ephemeralContainers", None)
    spec.get("nodeSelector", {}).pop(_HOSTNAME, None)
    tokens = {
        each["name"]
        for each in spec.get("volumes", ())
        if each["name"].startswith("kube-api-access-")
    }
    spec["volumes"] = [each for each in spec.get("volumes", ()) if each["name"] not in tokens]
    for container in (*spec["containers"], *spec.get("initContainers", ())):
        mounts = [each for each in container.get("volumeMounts", ()) if each["name"] not in tokens]
        container["volumeMounts"] = mounts
    base = metadata.get("annotations", {}).get(f"{names.GROUP}/base-name", metadata["name"])
    annotations[f"{names.GROUP}/base-name"] = base
    return {
        "metadata": {
            "name": f"{base[:200]}-{row.migration_id[-8:].lower()}",
            "namespace": metadata["namespace"],
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": owners,
        },
        "spec": spec,
    }
