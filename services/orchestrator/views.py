# SPDX-License-Identifier: Apache-2.0
"""Rows as the messages of godwit.fleet.v1: what gRPC answers, and what REST spells as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from godwit.common.v1 import common_pb2
from godwit.fleet.v1 import types_pb2, vm_service_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from services.orchestrator.bitmaps import PAGE_BYTES_DEFAULT, Bitmap
from services.orchestrator.etags import node_etag, placement_of, vm_etag
from services.orchestrator.evidence import wire_decision
from services.orchestrator.migration import Phase
from services.orchestrator.paging import cut
from services.orchestrator.residency import Series
from services.orchestrator.scheduling.schedule import Wait
from services.orchestrator.scheduling_api import wire_settings
from services.orchestrator.store.rows import EventRow, MigrationRow, NodeRow, TransitionRow, VmRow
from services.orchestrator.store.schedule import AdmissionRow, NodeSettings, VmSettings

WIRE_PHASE: dict[Phase, types_pb2.MigrationPhase.ValueType] = {
    phase: types_pb2.MigrationPhase.Value(f"MIGRATION_PHASE_{phase.name}") for phase in Phase
}


def timestamp(at_ns: int) -> Timestamp:
    """Nanoseconds since 1970 for the wire."""
    stamp = Timestamp()
    stamp.FromNanoseconds(at_ns)
    return stamp


def migration_view(
    row: MigrationRow,
    history: Iterable[TransitionRow],
    events: Iterable[EventRow] = (),
    *,
    admission: AdmissionRow | None = None,
    wait: Wait | None = None,
) -> types_pb2.Migration:
    """A migration. What it waits for now comes before why it is in its phase.

    `wait`: what holds it in the queue.
    """
    if wait is not None:
        message = f"{wait.message} (place {wait.place})"
        row = replace(row, wait_reason=wait.reason, wait_message=message, wait_hint=wait.hint)
    waits = bool(row.wait_reason)
    view = types_pb2.Migration(
        migration_id=row.migration_id,
        vm_id=row.vm_id,
        source_node=row.source_node,
        destination_node=row.destination_node,
        phase=WIRE_PHASE[row.phase],
        decision=wire_decision(row),
        epoch=row.epoch,
        reason=row.wait_reason if waits else row.reason,
        message=row.wait_message if waits else row.message,
        hint=row.wait_hint if waits else row.hint,
        created_at=timestamp(row.created_at_ns),
        pause_ns=row.pause_ns,
        progress=row.progress,
        transitions=[
            types_pb2.PhaseTransition(
                phase=WIRE_PHASE[each.phase], at=timestamp(each.at_ns), message=each.message
            )
            for each in history
        ],
        cancel_requested=row.cancel_requested,
        traceparent=row.traceparent,
        version=row.version,
        return_epoch=row.return_epoch,
        events=[_event(each) for each in events],
        on_link_loss=common_pb2.LinkLossPolicy(freeze_after_ms=row.freeze_after_ms),
    )
    if admission is not None:
        view.because, view.operation_id = admission.because, admission.operation_id
        view.policies.extend(admission.policies)
        view.attempt, view.retry_of = admission.attempt, admission.retry_of
        view.policy.CopyFrom(wire_settings(admission.settings))
    if row.ended_at_ns:
        view.ended_at.CopyFrom(timestamp(row.ended_at_ns))
    if row.phase is Phase.SUCCEEDED:
        view.total_ns = max(row.ended_at_ns - row.created_at_ns, 1)
    if row.counters:
        view.counters.CopyFrom(common_pb2.ArrivalCounters.FromString(row.counters))
    return view


def _event(event: EventRow) -> types_pb2.MigrationEvent:
    return types_pb2.MigrationEvent(
        sequence=event.sequence,
        at=timestamp(event.at_ns),
        kind=event.kind,
        node=event.node,
        message=event.message,
        action=event.action,
        hint=event.hint,
        duration_ns=event.duration_ns,
        held_ns=event.held_ns,
        evidence=event.evidence,
    )


def node_view(
    row: NodeRow,
    *,
    reachable: bool,
    message: str,
    capabilities: agent_pb2.Capabilities | None,
    vm_ids: Iterable[str],
    settings: NodeSettings,
) -> types_pb2.Node:
    """A node."""
    return types_pb2.Node(
        name=row.name,
        agent_address=row.agent_address,
        reachable=reachable,
        message=message,
        capabilities=capabilities,
        vm_ids=vm_ids,
        closed_by=settings.closed_by,
        labels=settings.labels,
        taints=sorted(settings.taints),
        link=settings.link,
        placement_etag=node_etag(settings),
    )


def vm_view(
    row: VmRow,
    *,
    migration_id: str,
    bitmap: Bitmap | None,
    vmm_state: agent_pb2.VmmState.ValueType,
    settings: VmSettings,
) -> types_pb2.Vm:
    """A VM."""
    return types_pb2.Vm(
        vm_id=row.vm_id,
        node=row.node,
        epoch=row.epoch,
        spec_hash=row.spec_hash,
        memory_bytes=row.memory_bytes,
        migration_id=migration_id,
        resident_share=bitmap.resident_share if bitmap else 1.0,
        vmm_state=vmm_state,
        labels=settings.labels,
        placement=placement_of(settings),
        placement_etag=vm_etag(settings),
    )


def bitmap_view(
    row: VmRow, bitmap: Bitmap | None, *, first: int, count: int
) -> vm_service_pb2.GetUserfaultBitmapResponse:
    """A userfault bitmap, at most `count` runs from page `first` on.

    A VM that never moved has all its memory.
    """
    if bitmap is None or not bitmap.page_count:
        return vm_service_pb2.GetUserfaultBitmapResponse(
            vm_id=row.vm_id,
            epoch=row.epoch,
            page_count=row.memory_bytes // PAGE_BYTES_DEFAULT,
            resident_share=1.0,
            page_size_bytes=PAGE_BYTES_DEFAULT,
        )
    runs = list(itertools.islice(bitmap.absent_runs(first), count + 1))
    page, token = cut("runs", runs, count, lambda run: str(run[0] + run[1]))
    return vm_service_pb2.GetUserfaultBitmapResponse(
        vm_id=row.vm_id,
        epoch=bitmap.epoch,
        page_count=bitmap.page_count,
        absent_count=bitmap.absent_count,
        absent_runs=[
            agent_pb2.PageRun(first_page=first, page_count=count) for first, count in page
        ],
        next_page_token=token,
        resident_share=bitmap.resident_share,
        page_size_bytes=bitmap.page_size_bytes,
    )


def residency_view(row: VmRow, series: Series | None) -> vm_service_pb2.GetResidencyResponse:
    """Residency over time."""
    return vm_service_pb2.GetResidencyResponse(
        vm_id=row.vm_id,
        epoch=row.epoch,
        page_count=series.page_count if series else row.memory_bytes // PAGE_BYTES_DEFAULT,
        points=[
            vm_service_pb2.ResidencyPoint(
                at=timestamp(point.at_ns), absent_count=point.absent_count
            )
            for point in (series.points if series else ())
        ],
    )
