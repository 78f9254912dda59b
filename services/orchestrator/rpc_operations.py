# SPDX-License-Identifier: Apache-2.0
"""gRPC of operations: godwit.fleet.v1.OperationService."""
# The generated servicer gives the names and the arguments.
# ruff: noqa: ARG002, N802

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import grpc.aio
from godwit.fleet.v1 import operation_service_pb2 as pb
from godwit.fleet.v1 import operation_service_pb2_grpc as pb_grpc

from services.orchestrator.events.model import Change, Kind
from services.orchestrator.events.service import Events
from services.orchestrator.operations.service import Operations

_Context = grpc.aio.ServicerContext[Any, Any]


class OperationServicer(pb_grpc.OperationServiceServicer):
    """See the proto."""

    def __init__(self, operations: Operations, events: Events) -> None:
        self._operations = operations
        self._events = events

    async def DrainNode(
        self, request: pb.DrainNodeRequest, context: _Context
    ) -> pb.DrainNodeResponse:
        operation, plan = await self._operations.drain(request)
        return pb.DrainNodeResponse(operation=operation, plan=plan)

    async def UndrainNode(
        self, request: pb.UndrainNodeRequest, context: _Context
    ) -> pb.UndrainNodeResponse:
        operation, plan = await self._operations.undrain(request)
        return pb.UndrainNodeResponse(operation=operation, plan=plan)

    async def Rebalance(
        self, request: pb.RebalanceRequest, context: _Context
    ) -> pb.RebalanceResponse:
        operation, plan = await self._operations.rebalance(request)
        return pb.RebalanceResponse(operation=operation, plan=plan)

    async def MoveBatch(
        self, request: pb.MoveBatchRequest, context: _Context
    ) -> pb.MoveBatchResponse:
        operation, plan = await self._operations.batch(request)
        return pb.MoveBatchResponse(operation=operation, plan=plan)

    async def GetOperation(
        self, request: pb.GetOperationRequest, context: _Context
    ) -> pb.GetOperationResponse:
        return pb.GetOperationResponse(operation=await self._operations.get(request.operation_id))

    async def ListOperations(
        self, request: pb.ListOperationsRequest, context: _Context
    ) -> pb.ListOperationsResponse:
        found, token = await self._operations.page(
            request.page_size, request.page_token, unfinished=request.unfinished_only
        )
        return pb.ListOperationsResponse(operations=found, next_page_token=token)

    async def ListOperationVms(
        self, request: pb.ListOperationVmsRequest, context: _Context
    ) -> pb.ListOperationVmsResponse:
        vms, token = await self._operations.vms(
            request.operation_id, request.page_size, request.page_token
        )
        return pb.ListOperationVmsResponse(vms=vms, next_page_token=token)

    async def CancelOperation(
        self, request: pb.CancelOperationRequest, context: _Context
    ) -> pb.CancelOperationResponse:
        operation = await self._operations.cancel(request.operation_id)
        return pb.CancelOperationResponse(operation=operation)

    async def PauseOperation(
        self, request: pb.PauseOperationRequest, context: _Context
    ) -> pb.PauseOperationResponse:
        operation = await self._operations.pause(request.operation_id, paused=True)
        return pb.PauseOperationResponse(operation=operation)

    async def ResumeOperation(
        self, request: pb.ResumeOperationRequest, context: _Context
    ) -> pb.ResumeOperationResponse:
        operation = await self._operations.pause(request.operation_id, paused=False)
        return pb.ResumeOperationResponse(operation=operation)

    async def WatchOperation(
        self, request: pb.WatchOperationRequest, context: _Context
    ) -> AsyncIterator[pb.WatchOperationResponse]:
        watching = self._events.one(Kind.OPERATION, request.operation_id)
        async with aclosing(watching) as stream:  # type: ignore[type-var]
            async for told in stream:
                if isinstance(told.what, Change):
                    yield pb.WatchOperationResponse(operation=cast(pb.Operation, told.what.message))
