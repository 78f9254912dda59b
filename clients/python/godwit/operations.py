# SPDX-License-Identifier: Apache-2.0
"""Drains and the like: what the API says of them, and its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from godwit.calls import Call, part, read_list
from godwit.models import Model, with_many, with_times

ENDED_STATES = frozenset({"succeeded", "failed", "cancelled"})
"""States that are never left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationVm(Model):
    """What an operation does with one VM."""

    vm_id: str = ""
    state: str = ""
    source_node: str = ""
    destination_node: str = ""
    migration_id: str = ""
    attempts: int = 0
    reason: str = ""
    message: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Model):
    """A long-running operation.

    Attributes:
        kind: drain, undrain, rebalance, batch.
        state: running, cancelling, succeeded, failed, cancelled.
        progress: 0..1.
        eta_s: until it is done; 0: not known.
        vms: empty in lists.
        counts: VMs by state.
    """

    operation_id: str = ""
    kind: str = ""
    node: str = ""
    state: str = ""
    paused: bool = False
    progress: float = 0.0
    eta_s: float = 0.0
    reason: str = ""
    message: str = ""
    hint: str = ""
    created_at: datetime | None = None
    ended_at: datetime | None = None
    vms: tuple[OperationVm, ...] = ()
    counts: Mapping[str, int] | None = None
    version: int = 0

    @property
    def has_ended(self) -> bool:
        """True if its state is never left."""
        return self.state in ENDED_STATES

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = with_times(values, "created_at", "ended_at")
        return with_many(values, vms=OperationVm)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStep(Model):
    """A move of a plan. Seconds after its beginning."""

    vm_id: str = ""
    source_node: str = ""
    destination_node: str = ""
    because: str = ""
    wave: int = 0
    starts_s: float = 0.0
    ends_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanImpossible(Model):
    """A VM that cannot go."""

    vm_id: str = ""
    source_node: str = ""
    check: str = ""
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Model):
    """What an operation would do."""

    steps: tuple[PlanStep, ...] = ()
    impossible: tuple[PlanImpossible, ...] = ()
    ends_s: float = 0.0
    waves: int = 0

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_many(values, steps=PlanStep, impossible=PlanImpossible)


Begun = Operation | Plan
"""A plan for a dry run."""


def _begun(data: Any) -> Begun:
    return Plan.from_json(data) if "steps" in data else Operation.from_json(data)


def _begin(path: str, options: Mapping[str, Any] | None, **more: Any) -> Call[Begun]:
    body = {**(options or {}), **more}
    return Call(method="POST", path=path, body=body, read=_begun)


def drain(node: str, options: Mapping[str, Any] | None = None) -> Call[Begun]:
    """Empty a node; `options` as OperationOptions, e.g. {"dry_run": True}."""
    return _begin(f"/v1/nodes/{part(node)}:drain", options)


def undrain(
    node: str, options: Mapping[str, Any] | None = None, *, no_return: bool = False
) -> Call[Begun]:
    """Open a node, and move back what its last drain moved away."""
    more = {"no_return": True} if no_return else {}
    return _begin(f"/v1/nodes/{part(node)}:undrain", options, **more)


def rebalance(options: Mapping[str, Any] | None = None, *, spread_max: float = 0.0) -> Call[Begun]:
    """Even the load; 0: until it differs by less than a tenth of the memory."""
    more = {"spread_max": spread_max} if spread_max else {}
    return _begin("/v1/operations:rebalance", options, **more)


def batch(
    vms: Sequence[str], destination_node: str = "", options: Mapping[str, Any] | None = None
) -> Call[Begun]:
    """Move many, each to where it is best unless a node is named."""
    more = {"destination_node": destination_node} if destination_node else {}
    return _begin("/v1/operations:batch", options, vms=list(vms), **more)


def list_operations(*, unfinished: bool = False) -> Call[list[Operation]]:
    """Operations, newest first, without their VMs; `unfinished`: that have not ended."""
    return Call(
        method="GET",
        path="/v1/operations",
        query={"unfinished": "true"} if unfinished else None,
        read=partial(read_list, "operations", Operation.from_json),
        items="operations",
    )


def list_operation_vms(operation_id: str) -> Call[list[OperationVm]]:
    """What one does with each VM, in order."""
    return Call(
        method="GET",
        path=f"/v1/operations/{part(operation_id)}/vms",
        read=partial(read_list, "vms", OperationVm.from_json),
        items="vms",
    )


def get_operation(operation_id: str) -> Call[Operation]:
    """One."""
    path = f"/v1/operations/{part(operation_id)}"
    return Call(method="GET", path=path, read=Operation.from_json)


def change_operation(operation_id: str, verb: str) -> Call[Operation]:
    """`verb`: cancel, pause or resume."""
    path = f"/v1/operations/{part(operation_id)}:{verb}"
    return Call(method="POST", path=path, read=Operation.from_json)


def events_path(operation_id: str) -> str:
    """Where the events of an operation are streamed."""
    return f"/v1/operations/{part(operation_id)}/events"
