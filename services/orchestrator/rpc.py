# SPDX-License-Identifier: Apache-2.0
"""The gRPC face of the service layer: godwit.fleet.v1."""
# The generated servicers give the names and the arguments.
# ruff: noqa: ARG002, N802

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import grpc.aio
from godwit.fleet.v1 import (
    event_service_pb2_grpc,
    migration_service_pb2,
    migration_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    operation_service_pb2_grpc,
    schedule_service_pb2_grpc,
    types_pb2,
    vm_service_pb2,
    vm_service_pb2_grpc,
)

from services.common.grpc_server import Service
from services.orchestrator.events.model import Change, Kind
from services.orchestrator.events.service import Events
from services.orchestrator.fleet import Fleet
from services.orchestrator.operations.service import Operations
from services.orchestrator.rpc_events import EventServicer
from services.orchestrator.rpc_operations import OperationServicer
from services.orchestrator.rpc_schedule import ScheduleServicer
from services.orchestrator.scheduling_api import read_priority

_Context = grpc.aio.ServicerContext[Any, Any]


class MigrationServicer(migration_service_pb2_grpc.MigrationServiceServicer):
    """See the proto."""

    def __init__(self, fleet: Fleet, events: Events) -> None:
        self._fleet = fleet
        self._events = events

    async def CreateMigration(
        self, request: migration_service_pb2.CreateMigrationRequest, context: _Context
    ) -> migration_service_pb2.CreateMigrationResponse:
        migration = await self._fleet.create_migration(
            request.vm_id,
            request.destination_node,
            bulk_bytes_per_s_max=request.bulk_bytes_per_s_max,
            freeze_after_ms=request.on_link_loss.freeze_after_ms,
            priority=read_priority(request.priority),
            key=request.request_id,
        )
        return migration_service_pb2.CreateMigrationResponse(migration=migration)

    async def GetMigration(
        self, request: migration_service_pb2.GetMigrationRequest, context: _Context
    ) -> migration_service_pb2.GetMigrationResponse:
        migration = await self._fleet.get_migration(request.migration_id)
        return migration_service_pb2.GetMigrationResponse(migration=migration)

    async def ListMigrations(
        self, request: migration_service_pb2.ListMigrationsRequest, context: _Context
    ) -> migration_service_pb2.ListMigrationsResponse:
        migrations, token = await self._fleet.list_migrations(
            request.vm_id,
            page_size=request.page_size,
            page_token=request.page_token,
            unfinished=request.unfinished_only,
        )
        return migration_service_pb2.ListMigrationsResponse(
            migrations=migrations, next_page_token=token
        )

    async def CancelMigration(
        self, request: migration_service_pb2.CancelMigrationRequest, context: _Context
    ) -> migration_service_pb2.CancelMigrationResponse:
        migration = await self._fleet.cancel_migration(request.migration_id)
        return migration_service_pb2.CancelMigrationResponse(migration=migration)

    async def RecoverMigration(
        self, request: migration_service_pb2.RecoverMigrationRequest, context: _Context
    ) -> migration_service_pb2.RecoverMigrationResponse:
        migration, findings = await self._fleet.recover_migration(request.migration_id)
        return migration_service_pb2.RecoverMigrationResponse(
            migration=migration, findings=findings
        )

    async def AbandonMigration(
        self, request: migration_service_pb2.AbandonMigrationRequest, context: _Context
    ) -> migration_service_pb2.AbandonMigrationResponse:
        migration = await self._fleet.abandon_migration(
            request.migration_id, epoch=request.epoch, confirm=request.confirm
        )
        return migration_service_pb2.AbandonMigrationResponse(migration=migration)

    async def BreakGlass(
        self, request: migration_service_pb2.BreakGlassRequest, context: _Context
    ) -> migration_service_pb2.BreakGlassResponse:
        migration = await self._fleet.break_glass(
            request.migration_id,
            epoch=request.epoch,
            fenced_vm_id=request.fenced_vm_id,
            operator=request.operator,
            because=request.because,
        )
        return migration_service_pb2.BreakGlassResponse(migration=migration)

    async def WatchMigration(
        self, request: migration_service_pb2.WatchMigrationRequest, context: _Context
    ) -> AsyncIterator[migration_service_pb2.WatchMigrationResponse]:
        watching = self._events.one(Kind.MIGRATION, request.migration_id)
        async with aclosing(watching) as stream:  # type: ignore[type-var]
            async for told in stream:
                if isinstance(told.what, Change):
                    yield migration_service_pb2.WatchMigrationResponse(
                        migration=cast(types_pb2.Migration, told.what.message)
                    )


class NodeServicer(node_service_pb2_grpc.NodeServiceServicer):
    """See the proto."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def RegisterNode(
        self, request: node_service_pb2.RegisterNodeRequest, context: _Context
    ) -> node_service_pb2.RegisterNodeResponse:
        node, _is_new = await self._fleet.register_node(request.name, request.agent_address)
        return node_service_pb2.RegisterNodeResponse(node=node)

    async def GetNode(
        self, request: node_service_pb2.GetNodeRequest, context: _Context
    ) -> node_service_pb2.GetNodeResponse:
        return node_service_pb2.GetNodeResponse(node=await self._fleet.get_node(request.name))

    async def ListNodes(
        self, request: node_service_pb2.ListNodesRequest, context: _Context
    ) -> node_service_pb2.ListNodesResponse:
        nodes, token = await self._fleet.list_nodes(
            page_size=request.page_size, page_token=request.page_token
        )
        return node_service_pb2.ListNodesResponse(nodes=nodes, next_page_token=token)


class VmServicer(vm_service_pb2_grpc.VmServiceServicer):
    """See the proto."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def StartVm(
        self, request: vm_service_pb2.StartVmRequest, context: _Context
    ) -> vm_service_pb2.StartVmResponse:
        vm = await self._fleet.start_vm(request.node, request.spec_json, key=request.request_id)
        return vm_service_pb2.StartVmResponse(vm=vm)

    async def StopVm(
        self, request: vm_service_pb2.StopVmRequest, context: _Context
    ) -> vm_service_pb2.StopVmResponse:
        await self._fleet.stop_vm(request.vm_id)
        return vm_service_pb2.StopVmResponse()

    async def GetVm(
        self, request: vm_service_pb2.GetVmRequest, context: _Context
    ) -> vm_service_pb2.GetVmResponse:
        return vm_service_pb2.GetVmResponse(vm=await self._fleet.get_vm(request.vm_id))

    async def ListVms(
        self, request: vm_service_pb2.ListVmsRequest, context: _Context
    ) -> vm_service_pb2.ListVmsResponse:
        vms, token = await self._fleet.list_vms(
            page_size=request.page_size, page_token=request.page_token
        )
        return vm_service_pb2.ListVmsResponse(vms=vms, next_page_token=token)

    async def GetUserfaultBitmap(
        self, request: vm_service_pb2.GetUserfaultBitmapRequest, context: _Context
    ) -> vm_service_pb2.GetUserfaultBitmapResponse:
        return await self._fleet.userfault_bitmap(
            request.vm_id, page_size=request.page_size, page_token=request.page_token
        )

    async def GetResidency(
        self, request: vm_service_pb2.GetResidencyRequest, context: _Context
    ) -> vm_service_pb2.GetResidencyResponse:
        return await self._fleet.residency(request.vm_id)


def services(fleet: Fleet, operations: Operations, events: Events) -> tuple[Service, ...]:
    """What the orchestrator serves."""
    return (
        Service(
            name="godwit.fleet.v1.MigrationService",
            add=lambda server: migration_service_pb2_grpc.add_MigrationServiceServicer_to_server(
                MigrationServicer(fleet, events), server
            ),
        ),
        Service(
            name="godwit.fleet.v1.NodeService",
            add=lambda server: node_service_pb2_grpc.add_NodeServiceServicer_to_server(
                NodeServicer(fleet), server
            ),
        ),
        Service(
            name="godwit.fleet.v1.VmService",
            add=lambda server: vm_service_pb2_grpc.add_VmServiceServicer_to_server(
                VmServicer(fleet), server
            ),
        ),
        Service(
            name="godwit.fleet.v1.ScheduleService",
            add=lambda server: schedule_service_pb2_grpc.add_ScheduleServiceServicer_to_server(
                ScheduleServicer(fleet), server
            ),
        ),
        Service(
            name="godwit.fleet.v1.OperationService",
            add=lambda server: operation_service_pb2_grpc.add_OperationServiceServicer_to_server(
                OperationServicer(operations, events), server
            ),
        ),
        Service(
            name="godwit.fleet.v1.EventService",
            add=lambda server: event_service_pb2_grpc.add_EventServiceServicer_to_server(
                EventServicer(events), server
            ),
        ),
    )
