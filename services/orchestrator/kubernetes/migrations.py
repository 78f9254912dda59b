# SPDX-License-Identifier: Apache-2.0
"""VMMigration objects: each asks for one migration, or mirrors one that was asked for elsewhere.

The store decides; the object says what was wanted and mirrors what came of it. Asked for under the
object's uid, a move is begun once, however often a controller dies between asking and writing down
the answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from godwit.fleet.v1 import types_pb2

from services.common.errors import (
    FailedPreconditionError,
    GodwitError,
    NotFoundError,
    UnavailableError,
)
from services.orchestrator.fleet import Fleet
from services.orchestrator.kubernetes import names
from services.orchestrator.kubernetes.api import Api, Object, key_of
from services.orchestrator.kubernetes.conditions import now_rfc3339
from services.orchestrator.kubernetes.events import Events
from services.orchestrator.kubernetes.informer import Informer
from services.orchestrator.kubernetes.migration_status import (
    TERMINAL,
    UNDECIDED,
    phase_name,
    refused,
    status_of,
)
from services.orchestrator.kubernetes.own_objects import delete_after, set_finalizer, write_status
from services.orchestrator.kubernetes.pods import Pods
from services.orchestrator.kubernetes.workqueue import WorkQueue
from services.orchestrator.scheduling.model import Priority

log = logging.getLogger(__name__)

STATUS_S_MIN = 1.0
"""How often progress alone is written."""
FOLLOW_S = 5.0
"""How often a migration under way is looked at untold."""

_UNTOLD = frozenset({"Validating", "Reserving", "Ready", "Precopy", "Switchover", "Finalizing"})
"""Phases of which no event tells: they are over at once."""
_WARNINGS = frozenset({"Failed", "Lost", "NeedsAttention", "PostcopyPaused", "RollingBack"})


class Migrations:
    """Makes every VMMigration right."""

    def __init__(
        self,
        api: Api,
        fleet: Fleet,
        pods: Pods,
        events: Events,
        *,
        namespace: str = "",
        ttl_s: int,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`ttl_s`: how long an object stays after its end, where it does not say."""
        self._api = api
        self._fleet = fleet
        self._pods = pods
        self._events = events
        self._ttl_s = ttl_s
        self._now_ns = now_ns
        self.informer = Informer(api, names.MIGRATIONS, namespace=namespace)
        self.queue = WorkQueue(self.reconcile, what="VMMigration")
        self._by_id: dict[str, str] = {}
        """Keys of objects, by their migrations."""
        self._written_s: dict[str, float] = {}
        self.informer.on_change.append(self._changed)

    def _changed(self, found: Object) -> None:
        if migration_id := found.get("status", {}).get("migrationId"):
            self._by_id[migration_id] = key_of(found)
        self.queue.add(key_of(found))

    def published(self, migration_id: str) -> None:
        """The store has written a migration."""
        if key := self._by_id.get(migration_id):
            self.queue.add(key)

    def has(self, migration_id: str) -> bool:
        """True if there is an object for it."""
        return migration_id in self._by_id

    def asks_for(self, vm_id: str) -> bool:
        """True if an object has asked for a move of the VM and does not know which it got."""
        return any(
            found["spec"]["vm"] == vm_id and not found.get("status", {}).get("phase")
            for found in self.informer.all()
        )

    async def mirror(self, view: types_pb2.Migration, namespace: str) -> None:
        """Make an object for a migration that was asked for elsewhere."""
        body = {
            "metadata": {
                "name": f"{view.vm_id}-{view.migration_id.lower()}",
                "namespace": namespace,
                "labels": {
                    names.ORIGIN_LABEL: "mirror",
                    names.MIGRATION_LABEL: view.migration_id.lower(),
                },
            },
            "spec": {"vm": view.vm_id, "destinationNode": view.destination_node},
        }
        made = await self._api.create(names.MIGRATIONS, body, namespace=namespace)
        self._by_id[view.migration_id] = key_of(made)

    # --- one object ---

    async def reconcile(self, key: str) -> float | None:
        """Make one right."""
        found = self.informer.get(key)
        if found is None:
            return None
        status = found.get("status", {})
        phase = status.get("phase", "")
        found = await self._keep_finalizer(found, phase)
        if found["metadata"].get("deletionTimestamp") and not status.get("migrationId"):
            # Asked for or not: the answer was never written. To ask again tells which.
            return await self._let_go(found)
        if phase == "Refused":
            return await self._expire(found)
        view = await self._asked(found)
        if view is None:
            return None
        if phase in TERMINAL and phase == phase_name(view.phase):
            return await self._expire(found)
        return await self._mirrored(found, await self._obey(found, view))

    async def _asked(self, found: Object) -> types_pb2.Migration | None:
        """The migration, asked for now if it was not. None: it was refused."""
        if migration_id := _migration_id(found):
            try:
                return await self._fleet.get_migration(migration_id)
            except NotFoundError as error:
                await self._write(found, self._refused(found, error))
                return None
        spec = found["spec"]
        try:
            return await self._fleet.create_migration(
                spec["vm"],
                spec.get("destinationNode", ""),
                bulk_bytes_per_s_max=spec.get("bulkBytesPerSecond", 0),
                freeze_after_ms=spec.get("freezeAfterMilliseconds", 0),
                priority=_priority(spec) if "priority" in spec else None,
                key=f"kubernetes/{found['metadata']['uid']}",
            )
        except UnavailableError:
            raise
        except GodwitError as error:
            await self._write(found, self._refused(found, error))
            await self._events.tell(
                found,
                key="refused",
                reason=error.reason,
                note=f"{error.message}. {error.hint}",
                at_ns=self._now_ns(),
                warning=True,
            )
            return None

    def _refused(self, found: Object, error: GodwitError) -> dict[str, Any]:
        return refused(
            error,
            found.get("status", {}),
            now=now_rfc3339(self._now_ns()),
            generation=found["metadata"]["generation"],
        )

    async def _obey(self, found: Object, view: types_pb2.Migration) -> types_pb2.Migration:
        """Cancel what shall be cancelled, as far as it can be; change its class while it waits."""
        deleted = "deletionTimestamp" in found["metadata"]
        wants = found["spec"].get("cancelRequested", False) or deleted
        if wants and not view.cancel_requested and phase_name(view.phase) in UNDECIDED:
            try:
                view = await self._fleet.cancel_migration(view.migration_id)
            except FailedPreconditionError as error:
                # The decision came first. The object says so by its conditions.
                log.info("migration %s: %s", view.migration_id, error.message)
        seen = found.get("status", {}).get("observedGeneration", 0)
        changed = 0 < seen < found["metadata"]["generation"]
        if changed and "priority" in found["spec"] and phase_name(view.phase) == "Pending":
            await self._fleet.set_priority(view.migration_id, _priority(found["spec"]))
        return view

    async def _mirrored(self, found: Object, view: types_pb2.Migration) -> float | None:
        before = found.get("status", {})
        metadata = found["metadata"]
        if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
            return None
        status = status_of(
            view,
            before,
            now=now_rfc3339(self._now_ns()),
            generation=metadata["generation"],
            pod=self._pods.ready_for(view.migration_id),
        )
        phase = status["phase"]
        if status != before:
            quiet_s = self._quiet_s(found)
            if quiet_s and _important(status) == _important(before):
                return quiet_s
            await self._write(found, status)
        await self._tell(found, view)
        return None if phase in TERMINAL else FOLLOW_S

    def _quiet_s(self, found: Object) -> float:
        """How long progress alone has to wait."""
        last_s = self._written_s.get(found["metadata"]["uid"], 0.0)
        return max(last_s + STATUS_S_MIN - self._now_ns() / 1e9, 0.0)

    async def _write(self, found: Object, status: dict[str, Any]) -> None:
        """Write the status, and remember when, and of which migration."""
        await write_status(self._api, names.MIGRATIONS, found, status)
        self._written_s[found["metadata"]["uid"]] = self._now_ns() / 1e9
        if migration_id := status.get("migrationId"):
            self._by_id[migration_id] = key_of(found)

    async def _tell(self, found: Object, view: types_pb2.Migration) -> None:
        """Events: its phases, and what happened in between."""
        pod = self._pods.of(view.vm_id, view.source_node)
        for each in view.transitions:
            phase = phase_name(each.phase)
            if phase in _UNTOLD:
                continue
            await self._events.tell(
                found,
                key=f"{each.at.seconds}.{each.at.nanos}/{phase}",
                reason=phase,
                note=_note(phase, view, each.message),
                at_ns=each.at.ToNanoseconds(),
                warning=phase in _WARNINGS,
                related=pod,
            )
        for happened in view.events:
            await self._events.tell(
                found,
                key=f"event/{happened.sequence}",
                reason=happened.kind,
                note=" ".join(each for each in (happened.message, happened.action) if each),
                at_ns=happened.at.ToNanoseconds(),
                warning=bool(happened.hint),
                related=pod,
            )

    # --- its end ---

    async def _keep_finalizer(self, found: Object, phase: str) -> Object:
        """There is one exactly while a rollback would be owed. The object, as it is then."""
        metadata = found["metadata"]
        has = names.FINALIZER in metadata.get("finalizers", ())
        owed = phase in UNDECIDED and (has or "deletionTimestamp" not in metadata)
        if owed == has:
            return found
        return await set_finalizer(self._api, names.MIGRATIONS, found, names.FINALIZER, there=owed)

    async def _let_go(self, found: Object) -> float | None:
        """Deleted before the object knew its migration: find it, cancel it, then forget both."""
        if found.get("status", {}).get("phase") != "Refused":
            view = await self._asked(found)
            if view is None:
                return None  # It says Refused now, and is looked at again.
            view = await self._obey(found, view)
            if phase_name(view.phase) in UNDECIDED:
                return await self._mirrored(found, view)
        await set_finalizer(self._api, names.MIGRATIONS, found, names.FINALIZER, there=False)
        return None

    async def _expire(self, found: Object) -> float | None:
        """Delete it when its time is over."""
        metadata, status = found["metadata"], found.get("status", {})
        if "deletionTimestamp" in metadata or "completionTime" not in status:
            return None
        ttl_s = float(found["spec"].get("ttlSecondsAfterFinished", self._ttl_s))
        left_s = await delete_after(
            self._api, names.MIGRATIONS, found, ttl_s, now_ns=self._now_ns()
        )
        if left_s is None:
            self._written_s.pop(metadata["uid"], None)
            self._by_id.pop(status.get("migrationId", ""), None)
        return left_s


def _migration_id(found: Object) -> str:
    """What it asked for, or mirrors; "": nothing yet."""
    labels = found["metadata"].get("labels", {})
    mirrored = labels.get(names.MIGRATION_LABEL, "") if names.ORIGIN_LABEL in labels else ""
    return str(found.get("status", {}).get("migrationId") or mirrored.upper())


def _priority(spec: dict[str, Any]) -> Priority:
    return Priority[spec["priority"].upper()]


def _important(status: dict[str, Any]) -> Any:
    """What is written at once."""
    return (
        [(each["type"], each["status"], each["reason"]) for each in status.get("conditions", ())],
        status.get("observedGeneration"),
        status.get("phase"),
    )


def _note(phase: str, view: types_pb2.Migration, message: str) -> str:
    match phase:
        case "Pending":
            where = view.destination_node or "the best node"
            return f"{view.vm_id} shall move from {view.source_node} to {where}"
        case "Preparing":
            return f"{view.source_node} exports its memory, {view.destination_node} makes ready"
        case "Committed":
            return f"decided: {view.destination_node} owns {view.vm_id}, epoch {view.epoch}"
        case "Postcopy":
            pause = f"; it stood still for {round(view.pause_ns / 1e6)} ms" if view.pause_ns else ""
            return f"{view.vm_id} runs on {view.destination_node}, its memory follows{pause}"
        case "Succeeded":
            took_s = view.total_ns / 1e9
            return f"{view.vm_id} is whole on {view.destination_node} after {took_s:.1f} s"
    return message or view.message or phase
