# SPDX-License-Identifier: Apache-2.0
"""gRPC: the same service layer, with google.rpc errors, health and reflection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from godwit.common.v1 import common_pb2
from godwit.fleet.v1 import (
    migration_service_pb2,
    migration_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    operation_service_pb2,
    operation_service_pb2_grpc,
    schedule_service_pb2,
    schedule_service_pb2_grpc,
    types_pb2,
    vm_service_pb2,
    vm_service_pb2_grpc,
)
from grpc_health.v1 import health_pb2

from services.common import grpc_client
from services.common.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    GodwitError,
    InvalidArgumentError,
    NotFoundError,
)
from tests.harness.fake_agent import spec_json
from tests.harness.fake_fleet import VM, FakeFleet, fake_fleet


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[FakeFleet]:
    async with fake_fleet(tmp_path, listening=True) as running:
        yield running


@pytest.fixture
async def channel(fleet: FakeFleet) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc_client.open_channel(str(fleet.grpc)) as opened:
        yield opened


async def test_move_watched_to_its_end(fleet: FakeFleet, channel: grpc.aio.Channel) -> None:
    fleet.b.pages_per_tick = 2
    migrations = migration_service_pb2_grpc.MigrationServiceStub(channel)
    created = await grpc_client.call(
        channel,
        migrations.CreateMigration,
        migration_service_pb2.CreateMigrationRequest(
            vm_id=VM, destination_node="b", request_id="r", bulk_bytes_per_s_max=1 << 20
        ),
        timeout_s=10,
    )
    assert created.migration.phase == types_pb2.MIGRATION_PHASE_PENDING
    migration_id = created.migration.migration_id
    seen = [
        answer.migration
        async for answer in grpc_client.stream(
            channel,
            migrations.WatchMigration,
            migration_service_pb2.WatchMigrationRequest(migration_id=migration_id),
        )
    ]
    assert seen[-1].phase == types_pb2.MIGRATION_PHASE_SUCCEEDED
    assert seen[-1].decision == common_pb2.DECISION_COMMITTED
    assert seen[-1].pause_ns > 0
    assert seen[-1].total_ns > seen[-1].pause_ns
    assert seen[-1].counters.page_count == 64
    again = await grpc_client.call(
        channel,
        migrations.CreateMigration,
        migration_service_pb2.CreateMigrationRequest(
            vm_id=VM, destination_node="b", request_id="r", bulk_bytes_per_s_max=1 << 20
        ),
        timeout_s=10,
    )
    assert again == created
    listed = await grpc_client.call(
        channel,
        migrations.ListMigrations,
        migration_service_pb2.ListMigrationsRequest(),
        timeout_s=10,
    )
    assert seen[-1].because == "asked for"
    for field in ("because", "attempt", "policy"):  # not in lists
        seen[-1].ClearField(field)
    assert list(listed.migrations) == [seen[-1]]


async def test_key_is_shared_with_rest(fleet: FakeFleet, channel: grpc.aio.Channel) -> None:
    """One table of answers: a retry over the other API is the same request."""
    body = {"vm": VM, "destination_node": "b"}
    first = await fleet.post("/v1/migrations", body, **{"Idempotency-Key": "k"})
    again = await grpc_client.call(
        channel,
        migration_service_pb2_grpc.MigrationServiceStub(channel).CreateMigration,
        migration_service_pb2.CreateMigrationRequest(
            vm_id=VM, destination_node="b", request_id="k"
        ),
        timeout_s=10,
    )
    assert again.migration.migration_id == first.json()["migration_id"]
    await fleet.ended(again.migration.migration_id)


@pytest.mark.parametrize(
    ("vm_id", "node", "error", "reason"),
    [
        ("ghost", "b", NotFoundError, "VM_UNKNOWN"),
        (VM, "zz", NotFoundError, "NODE_UNKNOWN"),
        (VM, "a", FailedPreconditionError, "SAME_NODE"),
        (VM, "B_", InvalidArgumentError, "FIELD_INVALID"),
        ("", "b", InvalidArgumentError, "FIELD_INVALID"),
    ],
)
async def test_refusals_carry_error_info(
    fleet: FakeFleet,
    channel: grpc.aio.Channel,
    vm_id: str,
    node: str,
    error: type[GodwitError],
    reason: str,
) -> None:
    with pytest.raises(error) as refused:
        await grpc_client.call(
            channel,
            migration_service_pb2_grpc.MigrationServiceStub(channel).CreateMigration,
            migration_service_pb2.CreateMigrationRequest(vm_id=vm_id, destination_node=node),
            timeout_s=10,
        )
    assert refused.value.reason == reason


async def test_second_migration_names_the_first(
    fleet: FakeFleet, channel: grpc.aio.Channel
) -> None:
    fleet.b.fetching.clear()
    migrations = migration_service_pb2_grpc.MigrationServiceStub(channel)
    first = await fleet.migrate()
    with pytest.raises(AlreadyExistsError) as refused:
        await grpc_client.call(
            channel,
            migrations.CreateMigration,
            migration_service_pb2.CreateMigrationRequest(vm_id=VM, destination_node="c"),
            timeout_s=10,
        )
    assert refused.value.metadata["migration_id"] == first
    await fleet.in_phase(first, "postcopy")
    with pytest.raises(FailedPreconditionError, match="PAST_COMMIT"):
        await grpc_client.call(
            channel,
            migrations.CancelMigration,
            migration_service_pb2.CancelMigrationRequest(migration_id=first),
            timeout_s=10,
        )
    fleet.b.fetching.set()
    await fleet.ended(first)


async def test_nodes_and_vms(fleet: FakeFleet, channel: grpc.aio.Channel) -> None:
    nodes = node_service_pb2_grpc.NodeServiceStub(channel)
    vms = vm_service_pb2_grpc.VmServiceStub(channel)
    registered = await grpc_client.call(
        channel,
        nodes.RegisterNode,
        node_service_pb2.RegisterNodeRequest(name="b", agent_address=str(fleet.b.address)),
        timeout_s=10,
    )
    assert registered.node.reachable
    started = await grpc_client.call(
        channel,
        vms.StartVm,
        vm_service_pb2.StartVmRequest(node="b", spec_json=spec_json("vm-2")),
        timeout_s=10,
    )
    assert started.vm.vmm_state == agent_pb2.VMM_STATE_RUNNING
    found = await grpc_client.call(
        channel, nodes.GetNode, node_service_pb2.GetNodeRequest(name="b"), timeout_s=10
    )
    assert list(found.node.vm_ids) == ["vm-2"]
    bitmap = await grpc_client.call(
        channel,
        vms.GetUserfaultBitmap,
        vm_service_pb2.GetUserfaultBitmapRequest(vm_id="vm-2"),
        timeout_s=10,
    )
    assert (bitmap.absent_count, bitmap.resident_share) == (0, 1.0)
    await grpc_client.call(
        channel, vms.StopVm, vm_service_pb2.StopVmRequest(vm_id="vm-2"), timeout_s=10
    )
    listed = await grpc_client.call(
        channel, vms.ListVms, vm_service_pb2.ListVmsRequest(), timeout_s=10
    )
    assert [vm.vm_id for vm in listed.vms] == [VM]
    all_nodes = await grpc_client.call(
        channel, nodes.ListNodes, node_service_pb2.ListNodesRequest(), timeout_s=10
    )
    assert [node.name for node in all_nodes.nodes] == ["a", "b", "c"]


async def test_health(fleet: FakeFleet, channel: grpc.aio.Channel) -> None:
    check: grpc.aio.UnaryUnaryMultiCallable[
        health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    ] = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    for service in ("", "godwit.fleet.v1.MigrationService"):
        answer = await grpc_client.call(
            channel,
            check,
            health_pb2.HealthCheckRequest(service=service),
            timeout_s=10,
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_drain_over_grpc_is_the_one_that_rest_shows(
    fleet: FakeFleet, channel: grpc.aio.Channel
) -> None:
    operations = operation_service_pb2_grpc.OperationServiceStub(channel)
    request = operation_service_pb2.DrainNodeRequest(node="a", request_id="r")
    planned = operation_service_pb2.DrainNodeRequest(
        node="a", options=operation_service_pb2.OperationOptions(dry_run=True)
    )
    answer = await grpc_client.call(channel, operations.DrainNode, planned, timeout_s=10)
    assert [step.vm_id for step in answer.plan.steps] == [VM]
    assert not answer.HasField("operation")
    begun = (await grpc_client.call(channel, operations.DrainNode, request, timeout_s=10)).operation
    again = (await grpc_client.call(channel, operations.DrainNode, request, timeout_s=10)).operation
    assert again.operation_id == begun.operation_id
    shown = await fleet.get(f"/v1/operations/{begun.operation_id}")
    assert (shown["kind"], shown["node"]) == ("drain", "a")
    with pytest.raises(NotFoundError):
        await grpc_client.call(
            channel,
            operations.CancelOperation,
            operation_service_pb2.CancelOperationRequest(operation_id="x"),
            timeout_s=10,
        )


async def test_limits_and_queue_over_grpc(fleet: FakeFleet, channel: grpc.aio.Channel) -> None:
    schedule = schedule_service_pb2_grpc.ScheduleServiceStub(channel)
    freeze = schedule_service_pb2.FreezeAdmissionsRequest(because="x")
    await grpc_client.call(channel, schedule.FreezeAdmissions, freeze, timeout_s=10)
    change = schedule_service_pb2.SetLimitsRequest(values={"node-in:b": 1})
    changed = await grpc_client.call(channel, schedule.SetLimits, change, timeout_s=10)
    assert {limit.key: limit.value for limit in changed.limits}["node-in:b"] == 1
    migration_id = await fleet.migrate(to="")
    queue = await grpc_client.call(
        channel, schedule.GetQueue, schedule_service_pb2.GetQueueRequest(), timeout_s=10
    )
    assert [(each.migration_id, each.reason) for each in queue.entries] == [
        (migration_id, "FROZEN")
    ]
    policy = schedule_service_pb2.Policy(name="all", retries=0)
    written = await grpc_client.call(
        channel,
        schedule.PutPolicy,
        schedule_service_pb2.PutPolicyRequest(policy=policy),
        timeout_s=10,
    )
    assert written.policy.HasField("retries"), "0 is said, not unsaid"
    assert not written.policy.HasField("freeze_after_ms")
    wrong = schedule_service_pb2.SetLimitsRequest(values={"speed": 1})
    with pytest.raises(InvalidArgumentError):
        await grpc_client.call(channel, schedule.SetLimits, wrong, timeout_s=10)
