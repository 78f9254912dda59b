# SPDX-License-Identifier: Apache-2.0
"""The REST face of the service layer. /openapi.json (3.1) describes it, /docs shows it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from services.common.auth.access import Access
from services.common.errors import GodwitError, UnavailableError
from services.orchestrator import (
    problems,
    rest_events,
    rest_models,
    rest_operations,
    rest_schedule,
)
from services.orchestrator.auth.middleware import AccessMiddleware
from services.orchestrator.election import Role
from services.orchestrator.events.service import Events
from services.orchestrator.fleet import RUN_COUNT_DEFAULT, RUN_COUNT_MAX, Fleet
from services.orchestrator.operations.service import Operations
from services.orchestrator.rest_models import IdempotencyKey, PageSize, PageToken
from services.orchestrator.scheduling.model import Priority


def _nodes(fleet: Fleet) -> APIRouter:
    router = APIRouter(prefix="/v1/nodes", tags=["nodes"], responses=problems.RESPONSES)

    @router.get("")
    async def list_nodes(page_size: PageSize = 0, page_token: PageToken = "") -> rest_models.Nodes:
        nodes, token = await fleet.list_nodes(page_size=page_size, page_token=page_token)
        return rest_models.Nodes(
            nodes=[rest_models.Node.of(node) for node in nodes], next_page_token=token
        )

    @router.post(
        "",
        responses={
            200: {"description": "It was there; it has this address now"},
            201: {"description": "It is new", "model": rest_models.Node},
        },
    )
    async def register_node(body: rest_models.NodeRequest, response: Response) -> rest_models.Node:
        node, is_new = await fleet.register_node(body.name, body.agent_address)
        response.status_code = 201 if is_new else 200
        response.headers["Location"] = f"/v1/nodes/{node.name}"
        return rest_models.Node.of(node)

    @router.get("/{name}")
    async def get_node(name: str) -> rest_models.Node:
        return rest_models.Node.of(await fleet.get_node(name))

    return router


def _vms(fleet: Fleet) -> APIRouter:
    router = APIRouter(prefix="/v1/vms", tags=["vms"], responses=problems.RESPONSES)

    @router.get("")
    async def list_vms(page_size: PageSize = 0, page_token: PageToken = "") -> rest_models.Vms:
        vms, token = await fleet.list_vms(page_size=page_size, page_token=page_token)
        return rest_models.Vms(vms=[rest_models.Vm.of(vm) for vm in vms], next_page_token=token)

    @router.post("", status_code=201)
    async def start_vm(
        body: rest_models.VmRequest, response: Response, idempotency_key: IdempotencyKey = ""
    ) -> rest_models.Vm:
        vm = await fleet.start_vm(body.node, json.dumps(body.spec), key=idempotency_key)
        response.headers["Location"] = f"/v1/vms/{vm.vm_id}"
        return rest_models.Vm.of(vm)

    @router.get("/{vm}")
    async def get_vm(vm: str) -> rest_models.Vm:
        return rest_models.Vm.of(await fleet.get_vm(vm))

    @router.delete("/{vm}", status_code=204)
    async def stop_vm(vm: str) -> None:
        await fleet.stop_vm(vm)

    @router.get("/{vm}/userfault-bitmap")
    async def get_userfault_bitmap(
        vm: str,
        page_size: Annotated[
            int,
            Query(ge=0, le=RUN_COUNT_MAX, description=f"runs at most; 0: {RUN_COUNT_DEFAULT}"),
        ] = 0,
        page_token: PageToken = "",
    ) -> rest_models.UserfaultBitmap:
        found = await fleet.userfault_bitmap(vm, page_size=page_size, page_token=page_token)
        return rest_models.UserfaultBitmap.of(found)

    @router.get("/{vm}/residency")
    async def get_residency(vm: str) -> rest_models.Residency:
        return rest_models.Residency.of(await fleet.residency(vm))

    return router


def _migrations(fleet: Fleet) -> APIRouter:
    router = APIRouter(prefix="/v1/migrations", tags=["migrations"], responses=problems.RESPONSES)

    @router.get("")
    async def list_migrations(
        vm: str = "",
        unfinished: Annotated[bool, Query(description="only those that have not ended")] = False,
        page_size: PageSize = 0,
        page_token: PageToken = "",
    ) -> rest_models.Migrations:
        migrations, token = await fleet.list_migrations(
            vm, page_size=page_size, page_token=page_token, unfinished=unfinished
        )
        return rest_models.Migrations(
            migrations=[rest_models.Migration.of(each) for each in migrations],
            next_page_token=token,
        )

    @router.post("", status_code=202)
    async def create_migration(
        body: rest_models.MigrationRequest,
        response: Response,
        idempotency_key: IdempotencyKey = "",
    ) -> rest_models.Migration:
        migration = await fleet.create_migration(
            body.vm,
            body.destination_node,
            bulk_bytes_per_s_max=body.bulk_bytes_per_s_max,
            freeze_after_ms=body.on_link_loss.freeze_after_ms,
            priority=Priority[body.priority.upper()] if body.priority else None,
            key=idempotency_key,
        )
        response.headers["Location"] = f"/v1/migrations/{migration.migration_id}"
        return rest_models.Migration.of(migration)

    @router.get("/{migration_id}")
    async def get_migration(migration_id: str) -> rest_models.Migration:
        return rest_models.Migration.of(await fleet.get_migration(migration_id))

    @router.post("/{migration_id}:cancel")
    async def cancel_migration(migration_id: str) -> rest_models.Migration:
        return rest_models.Migration.of(await fleet.cancel_migration(migration_id))

    @router.post("/{migration_id}:recover")
    async def recover_migration(migration_id: str) -> rest_models.Recovery:
        migration, findings = await fleet.recover_migration(migration_id)
        return rest_models.Recovery(
            migration=rest_models.Migration.of(migration), findings=findings
        )

    @router.post("/{migration_id}:abandon")
    async def abandon_migration(
        migration_id: str, body: rest_models.AbandonRequest
    ) -> rest_models.Migration:
        migration = await fleet.abandon_migration(
            migration_id, epoch=body.epoch, confirm=body.confirm
        )
        return rest_models.Migration.of(migration)

    @router.post("/{migration_id}:break-glass")
    async def break_glass(
        migration_id: str, body: rest_models.BreakGlassRequest
    ) -> rest_models.Migration:
        migration = await fleet.break_glass(
            migration_id,
            epoch=body.epoch,
            fenced_vm_id=body.fenced_vm_id,
            operator=body.operator,
            because=body.because,
        )
        return rest_models.Migration.of(migration)

    return router


def _process(registry: CollectorRegistry, ready: Callable[[], Awaitable[Role]]) -> APIRouter:
    router = APIRouter(tags=["process"], responses=problems.RESPONSES)

    @router.get("/healthz")
    async def healthz() -> rest_models.Health:
        return rest_models.Health(status="ok")

    @router.get("/readyz")
    async def readyz() -> rest_models.Readiness:
        try:
            role = await ready()
        except GodwitError as error:
            raise UnavailableError("NOT_READY", str(error), hint=error.hint) from error
        leader = role.leader
        return rest_models.Readiness(
            status="ready",
            leads=role.leads,
            leader=leader.holder,
            leader_rest=leader.rest,
            leader_grpc=leader.grpc,
            term=leader.term,
            hindrance=role.hindrance,
        )

    @router.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    return router


def build_app(
    fleet: Fleet,
    operations: Operations,
    events: Events,
    registry: CollectorRegistry,
    ready: Callable[[], Awaitable[Role]],
    access: Access,
) -> FastAPI:
    """The application. `ready` raises a GodwitError while nothing can be admitted."""
    app = FastAPI(
        title="Godwit",
        version="v1",
        summary="Moves running virtual machines between nodes by post-copy live migration",
        default_response_class=JSONResponse,
        redirect_slashes=False,
    )
    problems.install(app)
    app.add_middleware(AccessMiddleware, access=access)
    for router in (
        _nodes(fleet),
        _vms(fleet),
        _migrations(fleet),
        rest_schedule.schedule(fleet),
        rest_operations.operations(operations),
        rest_events.events(events),
        _process(registry, ready),
    ):
        app.include_router(router)
    return app
