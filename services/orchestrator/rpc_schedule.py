# SPDX-License-Identifier: Apache-2.0
"""gRPC of the queue, limits, policies and placement: godwit.fleet.v1.ScheduleService."""
# The generated servicer gives the names and the arguments.
# ruff: noqa: ARG002, N802

from __future__ import annotations

from typing import Any

import grpc.aio
from godwit.fleet.v1 import schedule_service_pb2 as pb
from godwit.fleet.v1 import schedule_service_pb2_grpc as pb_grpc

from services.orchestrator.fleet import Fleet

_Context = grpc.aio.ServicerContext[Any, Any]


class ScheduleServicer(pb_grpc.ScheduleServiceServicer):
    """See the proto."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._scheduling = fleet.scheduling

    async def GetQueue(self, request: pb.GetQueueRequest, context: _Context) -> pb.GetQueueResponse:
        return await self._scheduling.queue(
            page_size=request.page_size, page_token=request.page_token
        )

    async def FreezeAdmissions(
        self, request: pb.FreezeAdmissionsRequest, context: _Context
    ) -> pb.FreezeAdmissionsResponse:
        await self._scheduling.freeze(request.because)
        return pb.FreezeAdmissionsResponse()

    async def ThawAdmissions(
        self, request: pb.ThawAdmissionsRequest, context: _Context
    ) -> pb.ThawAdmissionsResponse:
        await self._scheduling.thaw()
        return pb.ThawAdmissionsResponse()

    async def GetLimits(
        self, request: pb.GetLimitsRequest, context: _Context
    ) -> pb.GetLimitsResponse:
        return await self._scheduling.limits(
            page_size=request.page_size, page_token=request.page_token
        )

    async def SetLimits(
        self, request: pb.SetLimitsRequest, context: _Context
    ) -> pb.SetLimitsResponse:
        now = await self._scheduling.set_limits(
            request.values, list(request.remove), etag=request.etag
        )
        return pb.SetLimitsResponse(
            limits=now.limits, next_page_token=now.next_page_token, etag=now.etag
        )

    async def ListPolicies(
        self, request: pb.ListPoliciesRequest, context: _Context
    ) -> pb.ListPoliciesResponse:
        policies, token = await self._scheduling.policies(
            page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListPoliciesResponse(policies=policies, next_page_token=token)

    async def PutPolicy(
        self, request: pb.PutPolicyRequest, context: _Context
    ) -> pb.PutPolicyResponse:
        return pb.PutPolicyResponse(policy=await self._scheduling.put_policy(request.policy))

    async def DeletePolicy(
        self, request: pb.DeletePolicyRequest, context: _Context
    ) -> pb.DeletePolicyResponse:
        await self._scheduling.delete_policy(request.name, etag=request.etag)
        return pb.DeletePolicyResponse()

    async def SetNodePlacement(
        self, request: pb.SetNodePlacementRequest, context: _Context
    ) -> pb.SetNodePlacementResponse:
        await self._scheduling.set_node_placement(request)
        return pb.SetNodePlacementResponse(node=await self._fleet.get_node(request.name))

    async def SetVmPlacement(
        self, request: pb.SetVmPlacementRequest, context: _Context
    ) -> pb.SetVmPlacementResponse:
        await self._scheduling.set_vm_placement(request)
        return pb.SetVmPlacementResponse(vm=await self._fleet.get_vm(request.vm_id))
