# SPDX-License-Identifier: Apache-2.0
"""The steps up to the decision. What they do to the source can be undone, all of it (I6)."""

from __future__ import annotations

import contextlib
import time

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from godwit.common.v1 import common_pb2

from services.common.errors import FailedPreconditionError, GodwitError
from services.common.hooks import reach
from services.common.peer_tls import node_name
from services.orchestrator.evidence import holds_nothing
from services.orchestrator.migration import (
    ChecksPassed,
    Event,
    Prepared,
    Reserved,
    StateLoaded,
)
from services.orchestrator.move import Move, both


async def check_both_sides(move: Move) -> Event:
    """Ask both agents whether it can work.

    Raises:
        GodwitError: it cannot, and why.
    """
    return await move.attempt(lambda: _check(move), patience_s=move.limits.patience_s)


async def _check(move: Move) -> Event:
    row, source, destination = move.row, move.source, move.destination
    here, there = await both(source.hello(), destination.hello())
    await move.tell_of_certificates()
    runs, arrives = await both(source.describe(row.vm_id), destination.describe(row.vm_id))
    last_epoch = await move.context.store.fleet.last_epoch(row.vm_id)
    for evidence in (runs, arrives):
        move.context.doubt.hear_epoch(evidence.node, row.vm_id, evidence.epoch_seen, last_epoch)
    move.context.doubt.require_none()
    if runs.role != agent_pb2.VM_ROLE_RESIDENT or runs.vmm_state != agent_pb2.VMM_STATE_RUNNING:
        raise FailedPreconditionError(
            "VM_NOT_RUNNING",
            f"{row.vm_id} is {agent_pb2.VmRole.Name(runs.role)} with a VMM that is "
            f"{agent_pb2.VmmState.Name(runs.vmm_state)} on {row.source_node}",
            hint="only a running guest can be moved",
        )
    if not holds_nothing(arrives):
        raise FailedPreconditionError(
            "VM_PRESENT_AT_DESTINATION",
            f"{row.destination_node} still has {row.vm_id}: "
            f"{agent_pb2.VmRole.Name(arrives.role)}, {arrives.retained_bytes} bytes retained",
            hint="let its earlier migration end, or clear it on that node",
        )
    await _preflight(move, here.capabilities, runs.spec_json)
    available = there.capabilities.memory_available_bytes
    if available and available < runs.memory_bytes:
        raise FailedPreconditionError(
            "MEMORY_SHORT",
            f"{row.destination_node} has {available} bytes for {runs.memory_bytes}",
            hint="choose another node",
        )
    return ChecksPassed()


async def _preflight(move: Move, peer: agent_pb2.Capabilities, spec_json: str) -> None:
    vm_id = move.row.vm_id
    leaves, arrives = await both(
        move.source.preflight(agent_pb2.PreflightRequest(side=agent_pb2.SIDE_SOURCE, vm_id=vm_id)),
        move.destination.preflight(
            agent_pb2.PreflightRequest(
                side=agent_pb2.SIDE_DESTINATION,
                vm_id=vm_id,
                spec_json=spec_json,
                peer_capabilities=peer,
            )
        ),
    )
    failed = [
        (node, check)
        for node, said in ((move.row.source_node, leaves), (move.row.destination_node, arrives))
        for check in said.checks
        if not check.passed
    ]
    if failed:
        raise FailedPreconditionError(
            "PREFLIGHT_FAILED",
            "; ".join(f"{node}: {check.check}: {check.reason}" for node, check in failed),
            hint="; ".join(check.hint for _node, check in failed if check.hint),
        )


async def reserve(move: Move) -> Event:
    """Take the destination's epoch from the store."""
    move.row = await move.context.store.migrations.reserve_epoch(move.row)
    return Reserved()


async def prepare_both_sides(move: Move) -> Event:
    """Export the memory, then raise the shell that will fetch it, where there is a place for it."""
    row, tokens = move.row, move.context.fetch_tokens
    await move.context.homes.prepare(row)
    reader = node_name(row.destination_node)
    exported = await move.attempt(
        lambda: move.source.prepare(
            agent_pb2.PrepareRequest(
                fence=move.fence(),
                departure=agent_pb2.PrepareDeparture(
                    destination_address=move.destination.address,
                    destination_name=reader,
                    token_key=tokens.public_key,
                ),
            ),
            traceparent=row.traceparent,
        ),
        patience_s=move.limits.patience_s,
    )
    image = exported.evidence.image
    # Written before the destination hears of it: a proof that the memory is gone needs the boot id.
    page_bytes = image.regions[0].page_size_bytes if image.regions else 0
    await move.record(source_boot_id=image.boot_id, page_size_bytes=page_bytes)
    await reach("orchestrator.prepare.source_done")
    arrival = agent_pb2.PrepareArrival(
        spec_json=exported.spec_json,
        spec_hash=exported.spec_hash,
        image=image,
        page_address=exported.page_address,
        traceparent=row.traceparent,
        bulk_bytes_per_s_max=row.bulk_bytes_per_s_max,
        on_link_loss=common_pb2.LinkLossPolicy(freeze_after_ms=row.freeze_after_ms),
        page_server_name=node_name(row.source_node),
        fetch_token=tokens.issue(image_id=image.image_id, epoch=row.epoch, destination=reader),
    )
    prepared = await move.attempt(
        lambda: move.destination.prepare(
            agent_pb2.PrepareRequest(fence=move.fence(), arrival=arrival),
            traceparent=row.traceparent,
        ),
        patience_s=move.limits.patience_s,
    )
    move.destination_key = prepared.certificate_key
    return Prepared()


async def _know_destination_key(move: Move) -> None:
    """Ask once more where another process prepared the destination.

    Without an answer the move goes on: then its key is as good as its certificate.
    """
    if move.context.agents.speaks_tls and not move.destination_key:
        with contextlib.suppress(GodwitError):
            move.destination_key = (await move.destination.hello()).certificate_key


async def pause_and_transfer(move: Move, *, rejoined: bool) -> Event:
    """Pause the guest and carry its device state across. No write to the store on this path."""
    if rejoined and (event := await move.settled(patience_s=move.limits.doubt_s)):
        return event
    row, fence, patience_s = move.row, move.fence(), move.limits.doubt_s
    await reach("orchestrator.pause.before")
    await _know_destination_key(move)
    move.pause_sent_ns = None if rejoined else time.monotonic_ns()
    # One command for both: no hop lies between the last instruction and the save.
    paused = await move.attempt(
        lambda: move.source.pause(
            agent_pb2.PauseRequest(
                fence=fence,
                transfer_to=move.destination.address,
                destination_key=move.destination_key,
            ),
            traceparent=row.traceparent,
        ),
        patience_s=patience_s,
        settle=True,
    )
    move.ran_ns = paused.before_stop_ns
    await reach("orchestrator.pause.after")
    if not paused.HasField("transferred"):
        await move.attempt(
            lambda: move.source.transfer(
                agent_pb2.TransferDeviceStateRequest(
                    fence=fence, destination_address=move.destination.address
                ),
                traceparent=row.traceparent,
            ),
            patience_s=patience_s,
            settle=True,
        )
    await reach("orchestrator.transfer.after")
    return StateLoaded()
