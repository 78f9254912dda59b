# SPDX-License-Identifier: Apache-2.0
"""What the store says of a migration, as the status of a VMMigration. Values in, values out.

| condition | True once | False |
|---|---|---|
| Admitted | the queue has let it go | it waits; reason: which limit holds it |
| PodReady | the destination's pod is there | it is not yet; a fleet without pods has none |
| Committed | the store has decided for the destination | the store has decided for the source |
| MemoryComplete | all memory is at the destination | some is still at the source |
| NeedsAttention | a person must look | nobody has to |
| Cancelled | it was cancelled | it was asked for too late |
| Succeeded | it is over, and all went well | it is over otherwise |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from godwit.common.v1 import common_pb2
from godwit.fleet.v1 import types_pb2

from services.common.errors import GodwitError
from services.orchestrator.kubernetes.conditions import Condition, percent, rfc3339, write

_PREFIX = "MIGRATION_PHASE_"
TERMINAL = frozenset({"Succeeded", "Cancelled", "Failed", "Lost", "Returned", "Refused"})
"""Phases that do not change any more. Refused: there never was such a migration."""
UNDECIDED = frozenset(
    {
        "",
        "Pending",
        "Validating",
        "Reserving",
        "Preparing",
        "Ready",
        "Precopy",
        "Switchover",
        "Cancelling",
        "RollingBack",
        "Aborted",
    }
)
"""Phases in which a rollback is owed to whoever deletes the object."""
_COMPLETE = frozenset({"Finalizing", "Succeeded"})


def phase_name(phase: types_pb2.MigrationPhase.ValueType) -> str:
    """MIGRATION_PHASE_ROLLING_BACK as RollingBack."""
    words = types_pb2.MigrationPhase.Name(phase).removeprefix(_PREFIX).split("_")
    return "".join(word.capitalize() for word in words)


def status_of(
    view: types_pb2.Migration,
    before: dict[str, Any],
    *,
    now: str,
    generation: int,
    pod: str = "",
) -> dict[str, Any]:
    """The status. `before`: the one that is there; `pod`: the destination's, if there is one."""
    phase = phase_name(view.phase)
    status = {
        "observedGeneration": generation,
        "phase": phase,
        "migrationId": view.migration_id,
        "sourceNode": view.source_node,
        "destinationNode": view.destination_node,
        "destinationPod": pod or before.get("destinationPod", ""),
        "epoch": view.epoch,
        "progress": percent(view.progress),
        "pause": f"{round(view.pause_ns / 1e6)}ms" if view.pause_ns else "",
        "pauseMilliseconds": round(view.pause_ns / 1e6),
        "startTime": rfc3339(view.created_at),
        "completionTime": rfc3339(view.ended_at if view.HasField("ended_at") else None),
        "reason": view.reason,
        "message": view.message,
        "hint": view.hint,
    }
    status["conditions"] = write(
        _conditions(view, phase, pod), before.get("conditions", ()), now=now, generation=generation
    )
    return {name: value for name, value in status.items() if value not in ("", None)}


def refused(
    error: GodwitError, before: dict[str, Any], *, now: str, generation: int
) -> dict[str, Any]:
    """The status of what the orchestrator did not take: nothing was begun."""
    why = Condition(type="Succeeded", status=False, reason=error.reason, message=error.message)
    status = {
        "observedGeneration": generation,
        "phase": "Refused",
        "reason": error.reason,
        "message": error.message,
        "hint": error.hint,
        "completionTime": now,
        "conditions": write([why], before.get("conditions", ()), now=now, generation=generation),
    }
    return {name: value for name, value in status.items() if value not in ("", None)}


def _conditions(view: types_pb2.Migration, phase: str, pod: str) -> Iterable[Condition]:
    reason, message = view.reason or phase, _words(view)
    admitted = phase != "Pending"
    yield Condition(
        type="Admitted",
        status=admitted,
        reason="Admitted" if admitted else view.reason or "Queued",
        message=view.because if admitted else message,
    )
    if pod:
        yield Condition(type="PodReady", status=True, reason="PodReady", message=f"{pod} is ready")
    decisions = {common_pb2.DECISION_COMMITTED: True, common_pb2.DECISION_ABORTED: False}
    decided = decisions.get(view.decision)
    yield Condition(
        type="Committed",
        status=decided,
        reason={True: "Committed", False: "Aborted", None: "Undecided"}[decided],
        message={
            True: f"{view.destination_node} owns the guest",
            False: f"{view.source_node} keeps the guest",
            None: "",
        }[decided],
    )
    complete = phase in _COMPLETE
    yield Condition(
        type="MemoryComplete",
        status=complete if complete or decided else None,
        reason="MemoryComplete" if complete else "MemoryFollows" if decided else "Undecided",
        message="" if complete else message if decided else "",
    )
    attention = phase == "NeedsAttention"
    yield Condition(
        type="NeedsAttention",
        status=attention,
        reason=reason if attention else "AsExpected",
        message=message if attention else "",
    )
    if view.cancel_requested or phase == "Cancelled":
        done = phase == "Cancelled"
        yield Condition(
            type="Cancelled",
            status=True if done else False if decided else None,
            reason="Cancelled" if done else "PAST_COMMIT" if decided else "Cancelling",
            message="the guest runs at its destination already" if decided and not done else "",
        )
    over = phase in TERMINAL
    yield Condition(
        type="Succeeded",
        status=phase == "Succeeded" if over else None,
        reason=("Succeeded" if phase == "Succeeded" else reason) if over else phase,
        message=message,
    )


def _words(view: types_pb2.Migration) -> str:
    return f"{view.message}: {view.hint}" if view.message and view.hint else view.message
