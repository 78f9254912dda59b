# SPDX-License-Identifier: Apache-2.0
"""REST of operations: /v1/nodes/{node}:drain, /v1/operations."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from godwit.fleet.v1 import operation_service_pb2 as pb
from pydantic import BaseModel, BeforeValidator, Field

from services.orchestrator import problems
from services.orchestrator.operations.service import Answer, Operations
from services.orchestrator.rest_models import (
    NEXT_PAGE_TOKEN,
    IdempotencyKey,
    PageSize,
    PageToken,
    Strict,
)
from services.orchestrator.rest_schedule import FromMessage, Priority, PriorityWord


def _last(prefix: str) -> BeforeValidator:
    return BeforeValidator(lambda text: str(text).removeprefix(prefix).lower())


class OptionsRequest(Strict, strict=True):
    """How an operation goes about it."""

    parallel_max: int = Field(default=0, ge=0, le=10_000, description="0: as the limits allow")
    deadline_s: float = Field(default=0, ge=0, description="then it begins nothing more; 0: none")
    priority: Priority | None = Field(default=None, description="maintenance")
    retries: int | None = Field(default=None, ge=0, le=100, description="of each VM; 3")
    largest_first: bool | None = Field(default=None, description="with a deadline true")
    windows: list[str] = Field(default=[], description="times of day, UTC, as 22:00-04:00")
    dry_run: bool = Field(default=False, description="nothing is done; the answer is the plan")

    def message(self) -> pb.OperationOptions:
        """For the service layer."""
        names = pb.OperationOptions.DESCRIPTOR.fields_by_name
        fields = self.model_dump(exclude_none=True, include=set(names))
        if word := fields.get("priority"):
            fields["priority"] = f"PRIORITY_{word.upper()}"
        return pb.OperationOptions(**fields)


class UndrainRequest(OptionsRequest):
    """Open a node again."""

    no_return: bool = Field(default=False, description="move nothing back")


class RebalanceRequest(OptionsRequest):
    """Even the load."""

    spread_max: float = Field(
        default=0, ge=0, le=1, description="of shares of memory in use that is left alone; 0: 0.1"
    )


class BatchRequest(OptionsRequest):
    """Move many."""

    vms: list[str] = Field(min_length=1, max_length=10_000)
    destination_node: str = Field(default="", description="empty: each where it is best")


class OperationOptions(FromMessage):
    """How an operation goes about it."""

    parallel_max: int
    deadline_s: float
    priority: PriorityWord
    retries: int
    largest_first: bool
    windows: list[str]


class OperationVm(FromMessage):
    """What an operation does with one VM."""

    vm_id: str
    state: Annotated[str, _last("OPERATION_VM_STATE_")]
    source_node: str
    destination_node: str
    migration_id: str
    attempts: int
    reason: str
    message: str
    hint: str


class Operation(FromMessage):
    """A long-running operation."""

    operation_id: str
    kind: Annotated[str, _last("OPERATION_KIND_")]
    node: str
    state: Annotated[str, _last("OPERATION_STATE_")]
    paused: bool
    progress: float = Field(description="0..1")
    eta_s: float = Field(description="until it is done; 0: not known")
    reason: str
    message: str
    hint: str
    created_at: datetime
    ended_at: datetime | None = None
    options: OperationOptions
    vms: list[OperationVm] = Field(description="the first 1000: /vms has all; empty in lists")
    counts: dict[str, int] = Field(description="VMs by state")
    version: int


class Operations_(BaseModel):  # noqa: N801 - the service has the name
    """A page of operations, the newest first."""

    operations: list[Operation]
    next_page_token: str = NEXT_PAGE_TOKEN


class OperationVms(BaseModel):
    """A page of what an operation does with each VM, in order."""

    vms: list[OperationVm]
    next_page_token: str = NEXT_PAGE_TOKEN


class PlanStep(FromMessage):
    """A move of a plan."""

    vm_id: str
    source_node: str
    destination_node: str
    because: str
    wave: int
    starts_s: float
    ends_s: float


class PlanImpossible(FromMessage):
    """A VM that cannot go."""

    vm_id: str
    source_node: str
    check: str
    reason: str
    hint: str


class Plan(FromMessage):
    """What an operation would do."""

    steps: list[PlanStep]
    impossible: list[PlanImpossible]
    ends_s: float
    waves: int


def _answer(answer: Answer) -> Response:
    operation, plan = answer
    if operation is None:
        assert plan is not None
        return JSONResponse(Plan.of(plan).model_dump(mode="json"))
    return JSONResponse(
        Operation.of(operation).model_dump(mode="json"),
        status_code=202,
        headers={"Location": f"/v1/operations/{operation.operation_id}"},
    )


_BEGUN: dict[int | str, dict[str, Any]] = {
    202: {"model": Operation, "description": "Begun"},
    200: {"model": Plan, "description": "The plan of a dry run"},
}


def operations(service: Operations) -> APIRouter:
    """Drains and the like."""
    router = APIRouter(prefix="/v1", tags=["operations"], responses=problems.RESPONSES)

    @router.post("/nodes/{node}:drain", responses=_BEGUN, response_model=None)
    async def drain_node(
        node: str, body: OptionsRequest, idempotency_key: IdempotencyKey = ""
    ) -> Response:
        request = pb.DrainNodeRequest(node=node, options=body.message(), request_id=idempotency_key)
        return _answer(await service.drain(request))

    @router.post("/nodes/{node}:undrain", responses=_BEGUN, response_model=None)
    async def undrain_node(
        node: str, body: UndrainRequest, idempotency_key: IdempotencyKey = ""
    ) -> Response:
        request = pb.UndrainNodeRequest(
            node=node,
            options=body.message(),
            no_return=body.no_return,
            request_id=idempotency_key,
        )
        return _answer(await service.undrain(request))

    @router.post("/operations:rebalance", responses=_BEGUN, response_model=None)
    async def rebalance(body: RebalanceRequest, idempotency_key: IdempotencyKey = "") -> Response:
        request = pb.RebalanceRequest(
            options=body.message(), spread_max=body.spread_max, request_id=idempotency_key
        )
        return _answer(await service.rebalance(request))

    @router.post("/operations:batch", responses=_BEGUN, response_model=None)
    async def move_batch(body: BatchRequest, idempotency_key: IdempotencyKey = "") -> Response:
        request = pb.MoveBatchRequest(
            vm_ids=body.vms,
            destination_node=body.destination_node,
            options=body.message(),
            request_id=idempotency_key,
        )
        return _answer(await service.batch(request))

    @router.get("/operations")
    async def list_operations(
        unfinished: Annotated[bool, Query(description="only those that have not ended")] = False,
        page_size: PageSize = 0,
        page_token: PageToken = "",
    ) -> Operations_:
        found, token = await service.page(page_size, page_token, unfinished=unfinished)
        return Operations_(operations=[Operation.of(each) for each in found], next_page_token=token)

    @router.get("/operations/{operation_id}")
    async def get_operation(operation_id: str) -> Operation:
        return Operation.of(await service.get(operation_id))

    @router.get("/operations/{operation_id}/vms")
    async def list_operation_vms(
        operation_id: str, page_size: PageSize = 0, page_token: PageToken = ""
    ) -> OperationVms:
        vms, token = await service.vms(operation_id, page_size, page_token)
        return OperationVms(vms=[OperationVm.of(each) for each in vms], next_page_token=token)

    @router.post("/operations/{operation_id}:cancel")
    async def cancel_operation(operation_id: str) -> Operation:
        return Operation.of(await service.cancel(operation_id))

    @router.post("/operations/{operation_id}:pause")
    async def pause_operation(operation_id: str) -> Operation:
        return Operation.of(await service.pause(operation_id, paused=True))

    @router.post("/operations/{operation_id}:resume")
    async def resume_operation(operation_id: str) -> Operation:
        return Operation.of(await service.pause(operation_id, paused=False))

    return router
