# SPDX-License-Identifier: Apache-2.0
"""NodeDrain objects: a node shall be empty for as long as there is one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from godwit.fleet.v1 import operation_service_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from services.common.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    GodwitError,
    NotFoundError,
    UnavailableError,
)
from services.orchestrator.kubernetes import names
from services.orchestrator.kubernetes.api import Api, Object, key_of
from services.orchestrator.kubernetes.conditions import (
    Condition,
    now_rfc3339,
    percent,
    rfc3339,
    write,
)
from services.orchestrator.kubernetes.events import Events
from services.orchestrator.kubernetes.informer import Informer
from services.orchestrator.kubernetes.own_objects import delete_after, set_finalizer, write_status
from services.orchestrator.kubernetes.workqueue import WorkQueue
from services.orchestrator.operations.service import Operations

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often a drain under way is looked at."""
UNMOVED_MAX = 20
ENDED = frozenset({"Succeeded", "Failed", "Cancelled", "Refused"})


class Drains:
    """Makes every NodeDrain right."""

    def __init__(
        self,
        api: Api,
        operations: Operations,
        events: Events,
        *,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._api = api
        self._operations = operations
        self._events = events
        self._now_ns = now_ns
        self.informer = Informer(api, names.DRAINS)
        self.queue = WorkQueue(self.reconcile, what="NodeDrain")
        self.informer.on_change.append(lambda found: self.queue.add(key_of(found)))

    async def reconcile(self, key: str) -> float | None:
        """Make one right."""
        found = self.informer.get(key)
        if found is None:
            return None
        metadata, status = found["metadata"], found.get("status", {})
        if "deletionTimestamp" in metadata:
            return await self._open(found)
        if names.DRAIN_FINALIZER not in metadata.get("finalizers", ()):
            found = await self._set_finalizer(found, there=True)
        if status.get("phase") in ENDED:
            return await self._expire(found)
        view = await self._asked(found)
        if view is None:
            return None
        view = await self._obey(found, view)
        await self._mirror(found, view)
        return LOOK_S

    async def _asked(self, found: Object) -> pb.Operation | None:
        """The operation, asked for now if it was not. None: it was refused."""
        status, spec = found.get("status", {}), found["spec"]
        try:
            if operation_id := status.get("operationId"):
                return await self._operations.get(operation_id)
            request = pb.DrainNodeRequest(
                node=spec["node"],
                request_id=f"kubernetes/{found['metadata']['uid']}",
                options=pb.OperationOptions(
                    parallel_max=spec.get("parallelMax", 0),
                    deadline_s=spec.get("deadlineSeconds", 0),
                    retries=spec.get("retries", 3),
                    windows=spec.get("windows", ()),
                ),
            )
            view, _plan = await self._operations.drain(request)
        except AlreadyExistsError as error:
            # Somebody else's operation works on that node. It may be cancelled; ours is next then.
            await self._wait(found, error)
            raise UnavailableError(error.reason, error.message, hint=error.hint) from error
        except UnavailableError:
            raise
        except GodwitError as error:
            await self._refuse(found, error)
            return None
        assert view is not None
        return view

    async def _obey(self, found: Object, view: pb.Operation) -> pb.Operation:
        spec = found["spec"]
        if view.state != pb.OPERATION_STATE_RUNNING:
            return view
        try:
            if spec.get("cancelRequested", False):
                return await self._operations.cancel(view.operation_id)
            if spec.get("paused", False) != view.paused:
                return await self._operations.pause(
                    view.operation_id, paused=spec.get("paused", False)
                )
        except FailedPreconditionError as error:
            log.info("operation %s: %s", view.operation_id, error.message)
        return view

    async def _mirror(self, found: Object, view: pb.Operation) -> None:
        before = found.get("status", {})
        status = status_of(
            view,
            before,
            now=now_rfc3339(self._now_ns()),
            generation=found["metadata"]["generation"],
        )
        if status != before:
            await write_status(self._api, names.DRAINS, found, status)
        if status["phase"] != before.get("phase"):
            await self._events.tell(
                found,
                key=status["phase"] + status["startTime"],
                reason=f"Drain{status['phase']}",
                note=view.message or _counts(view),
                at_ns=self._now_ns(),
                warning=status["phase"] == "Failed",
            )

    async def _wait(self, found: Object, error: GodwitError) -> None:
        await self._say(found, "Pending", error, status=None)

    async def _refuse(self, found: Object, error: GodwitError) -> None:
        await self._say(found, "Refused", error, status=False)

    async def _say(
        self, found: Object, phase: str, error: GodwitError, *, status: bool | None
    ) -> None:
        before = found.get("status", {})
        generation = found["metadata"]["generation"]
        now = now_rfc3339(self._now_ns())
        why = Condition(type="Succeeded", status=status, reason=error.reason, message=error.message)
        said = {
            "observedGeneration": generation,
            "phase": phase,
            "reason": error.reason,
            "message": error.message,
            "hint": error.hint,
            "conditions": write(
                [why], before.get("conditions", ()), now=now, generation=generation
            ),
        }
        if phase in ENDED:
            said["completionTime"] = now
        if said != before:
            await write_status(self._api, names.DRAINS, found, said)

    # --- its end ---

    async def _open(self, found: Object) -> float | None:
        """Deleted: end the drain, open the node, then let the object go."""
        metadata, spec = found["metadata"], found["spec"]
        if names.DRAIN_FINALIZER not in metadata.get("finalizers", ()):
            return None
        phase = found.get("status", {}).get("phase", "")
        if phase != "Refused":
            view = await self._asked(found)
            if view is not None and view.state == pb.OPERATION_STATE_RUNNING:
                view = await self._operations.cancel(view.operation_id)
            if view is not None and view.state == pb.OPERATION_STATE_CANCELLING:
                await self._mirror(found, view)
                return LOOK_S
            # A drain that was cancelled has opened its node already.
            if view is not None and view.state != pb.OPERATION_STATE_CANCELLED:
                await self._undrain(found, spec.get("whenDeleted", "Open"))
        await self._set_finalizer(found, there=False)
        return None

    async def _undrain(self, found: Object, when_deleted: str) -> None:
        uid, node = found["metadata"]["uid"], found["spec"]["node"]
        for no_return in (False, True) if when_deleted == "Return" else (True,):
            request = pb.UndrainNodeRequest(
                node=node,
                no_return=no_return,
                request_id=f"kubernetes/{uid}/{'open' if no_return else 'return'}",
            )
            try:
                await self._operations.undrain(request)
            except FailedPreconditionError as error:
                # CAPACITY_SHORT: open it all the same.
                await self._events.tell(
                    found,
                    key=f"undrain/{error.reason}",
                    reason=error.reason,
                    note=f"{error.message}; the node is opened, nothing moves back",
                    at_ns=self._now_ns(),
                    warning=True,
                )
            except NotFoundError:
                return  # The node has left the fleet.
            else:
                return

    async def _set_finalizer(self, found: Object, *, there: bool) -> Object:
        return await set_finalizer(
            self._api, names.DRAINS, found, names.DRAIN_FINALIZER, there=there
        )

    async def _expire(self, found: Object) -> float | None:
        """Delete one that failed or was cancelled; one that succeeded keeps its node closed."""
        status = found["status"]
        ttl_s = found["spec"].get("ttlSecondsAfterFinished")
        if ttl_s is None or status["phase"] == "Succeeded" or "completionTime" not in status:
            return None
        return await delete_after(
            self._api, names.DRAINS, found, float(ttl_s), now_ns=self._now_ns()
        )


def status_of(
    view: pb.Operation, before: dict[str, Any], *, now: str, generation: int
) -> dict[str, Any]:
    """What the store says of a drain, as the status of a NodeDrain.

    | condition | True once | False |
    |---|---|---|
    | Progressing | it admits moves | it is paused or over |
    | Succeeded | the node has no VM and retains nothing | it is over otherwise |
    """
    phase = pb.OperationState.Name(view.state).removeprefix("OPERATION_STATE_").capitalize()
    if view.paused and phase == "Running":
        phase = "Paused"
    counts = view.counts
    status: dict[str, Any] = {
        "observedGeneration": generation,
        "phase": phase,
        "operationId": view.operation_id,
        "progress": percent(view.progress),
        "etaSeconds": round(view.eta_s) or None,
        "vms": {
            "total": sum(counts.values()),
            **{name: counts.get(name, 0) for name in ("moved", "moving", "waiting", "failed")},
        },
        "unmoved": _unmoved(view.vms),
        "startTime": rfc3339(view.created_at),
        "completionTime": rfc3339(_ended_at(view)),
        "reason": view.reason,
        "message": view.message,
        "hint": view.hint,
    }
    over = phase in ENDED
    conditions = [
        Condition(type="Progressing", status=phase == "Running", reason=phase),
        Condition(
            type="Succeeded",
            status=phase == "Succeeded" if over else None,
            reason=view.reason or phase,
            message=view.message,
        ),
    ]
    status["conditions"] = write(
        conditions, before.get("conditions", ()), now=now, generation=generation
    )
    return {name: value for name, value in status.items() if value not in ("", None, [])}


def _counts(view: pb.Operation) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in sorted(view.counts.items()))
    return f"VMs of {view.node}: {counts or 'none'}"


def _ended_at(view: pb.Operation) -> Timestamp | None:
    return view.ended_at if view.HasField("ended_at") else None


def _unmoved(vms: Iterable[pb.OperationVm]) -> list[dict[str, str]]:
    left = [each for each in vms if each.reason and each.state != pb.OPERATION_VM_STATE_MOVED]
    return [
        {
            name: value
            for name, value in (
                ("vm", each.vm_id),
                ("reason", each.reason),
                ("message", each.message),
                ("hint", each.hint),
            )
            if value
        }
        for each in left[:UNMOVED_MAX]
    ]
