# SPDX-License-Identifier: Apache-2.0
"""The webhook that answers evictions of VM pods: moved first, evicted when nothing is held there.

Kubernetes asks it (pods/eviction, CREATE) while somebody drains a node. A pod whose guest is there,
or whose node still holds memory of it, is refused with 429 until that memory is complete elsewhere;
what asks tries again, as `kubectl drain` does. Meanwhile the guest is moved. Fails open by its
registration (failurePolicy Ignore): then the PodDisruptionBudget refuses.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request

from services.common.errors import AlreadyExistsError, GodwitError
from services.orchestrator.fleet import Fleet
from services.orchestrator.kubernetes.api import Object
from services.orchestrator.kubernetes.pods import Pods, vm_of
from services.orchestrator.migration import TERMINAL
from services.orchestrator.scheduling.model import Priority
from services.orchestrator.store import Store

log = logging.getLogger(__name__)

PATH = "/evictions"
RETRY_S = 5
BODY_BYTES_MAX = 1 << 20


class Evictions:
    """Answers."""

    def __init__(self, fleet: Fleet, store: Store, pods: Pods) -> None:
        self._fleet = fleet
        self._store = store
        self._pods = pods

    def app(self) -> FastAPI:
        """HTTP, to be served over TLS: the API server calls nothing else."""
        app = FastAPI(title="Godwit evictions", openapi_url=None)

        @app.post(PATH)
        async def review(request: Request) -> dict[str, Any]:
            body = await request.json()
            asked = body["request"]
            return {
                "apiVersion": body["apiVersion"],
                "kind": body["kind"],
                "response": {"uid": asked["uid"], **await self.answer(asked)},
            }

        return app

    async def answer(self, asked: Object) -> dict[str, Any]:
        """To an AdmissionRequest."""
        key = f"{asked['namespace']}/{asked['name']}"
        pod = self._pods.informer.get(key)
        if pod is None:
            return {"allowed": True}  # No VM of ours.
        vm_id, node = vm_of(pod), pod["spec"].get("nodeName", "")
        try:
            why = await self._why_not(vm_id, node, dry_run=is_dry_run(asked))
        except GodwitError as error:
            why = f"{vm_id} cannot be moved now: {error.message}"
        if not why:
            return {"allowed": True}
        return {
            "allowed": False,
            "status": {
                "status": "Failure",
                "code": 429,
                "reason": "TooManyRequests",
                "message": why,
                "details": {
                    "retryAfterSeconds": RETRY_S,
                    "causes": [{"reason": "GuestNotMoved", "message": why}],
                },
            },
        }

    async def _why_not(self, vm_id: str, node: str, *, dry_run: bool) -> str:
        """Why the pod cannot go; "": it can."""
        vm = await self._store.fleet.vm(vm_id)
        if vm is None:
            return ""
        if active := await self._store.migrations.active_of(vm_id):
            row = await self._store.migrations.get(active)
            if row is not None and row.phase not in TERMINAL and node in _sides(row):
                return f"{vm_id} moves: migration {active} is {row.phase}"
        if vm.node == node:
            if not dry_run:
                await self._move(vm_id)
            return f"{vm_id} runs on {node}; it is being moved, its pod can go when its memory has"
        for row in await self._store.migrations.owing():
            if row.vm_id == vm_id and row.source_node == node and row.source_owed:
                return f"{node} still holds memory of {vm_id}"
        return ""

    async def _move(self, vm_id: str) -> None:
        try:
            made = await self._fleet.create_migration(vm_id, "", priority=Priority.MAINTENANCE)
        except AlreadyExistsError:
            return
        log.info("VM %s is to be evicted: migration %s", vm_id, made.migration_id)


def is_dry_run(asked: Object) -> bool:
    """Nothing shall happen. `kubectl drain --dry-run=server` says it in the eviction alone."""
    options = (asked.get("object") or {}).get("deleteOptions") or {}
    return bool(asked.get("dryRun") or options.get("dryRun"))


def _sides(row: Any) -> tuple[str, str]:
    return row.source_node, row.destination_node
