# SPDX-License-Identifier: Apache-2.0
"""The journal's terms and the wire's, both ways."""

from __future__ import annotations

import contextlib
from pathlib import Path

from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.common.v1 import common_pb2

from services.common.errors import InvalidArgumentError
from services.common.vm_spec import VmSpec
from services.fault_agent import kept_state
from services.fault_agent.drivers.api import VmmState
from services.fault_agent.drivers.memory_map import memory_regions
from services.fault_agent.fence import Fence
from services.fault_agent.images import image_message
from services.fault_agent.journal import Counters, Decision, ExportState, Held, Record, Role
from services.pagecore.api import ArrivalStatus, Hold

_ROLES = {
    Role.UNKNOWN: pb.VM_ROLE_UNKNOWN,
    Role.RESIDENT: pb.VM_ROLE_RESIDENT,
    Role.DEPARTING: pb.VM_ROLE_DEPARTING,
    Role.SEALED: pb.VM_ROLE_SEALED,
    Role.ARRIVING: pb.VM_ROLE_ARRIVING,
    Role.ARRIVED: pb.VM_ROLE_ARRIVED,
    Role.GONE: pb.VM_ROLE_GONE,
}

_VMM_STATES = {
    VmmState.DEAD: pb.VMM_STATE_DEAD,
    VmmState.RUNNING: pb.VMM_STATE_RUNNING,
    VmmState.PAUSED: pb.VMM_STATE_PAUSED,
    VmmState.INCOMING: pb.VMM_STATE_INCOMING,
    VmmState.UNRESPONSIVE: pb.VMM_STATE_UNRESPONSIVE,
    VmmState.GUEST_ENDED: pb.VMM_STATE_GUEST_ENDED,
}

_DECISIONS = {
    Decision.NONE: common_pb2.DECISION_UNSPECIFIED,
    Decision.COMMITTED: common_pb2.DECISION_COMMITTED,
    Decision.ABORTED: common_pb2.DECISION_ABORTED,
    Decision.RETURNED: common_pb2.DECISION_RETURNED,
    Decision.LOST: common_pb2.DECISION_LOST,
}
_DECISIONS_READ = {number: decision for decision, number in _DECISIONS.items()}


def read_fence(message: common_pb2.Fence) -> Fence:
    """The fence of a command.

    Raises:
        InvalidArgumentError: FIELD_INVALID: an unknown decision.
    """
    decision = _DECISIONS_READ.get(message.decision)
    if decision is None:
        raise InvalidArgumentError("FIELD_INVALID", f"fence.decision {message.decision} is unknown")
    return Fence(
        vm_id=message.vm_id,
        epoch=message.epoch,
        migration_id=message.migration_id,
        decision=decision,
        store_incarnation=message.store_incarnation,
    )


def write_fence(fence: Fence) -> common_pb2.Fence:
    """A fence as it is handed on to the other agent."""
    return common_pb2.Fence(
        vm_id=fence.vm_id,
        epoch=fence.epoch,
        migration_id=fence.migration_id,
        decision=_DECISIONS[fence.decision],
        store_incarnation=fence.store_incarnation,
    )


def final_counters(status: ArrivalStatus) -> Counters:
    """What the journal keeps of an arrival that is over."""
    latency = status.fault_latency
    return Counters(
        page_count=status.page_count,
        absent_count=status.absent_count,
        demand_page_count=status.demand_page_count,
        bulk_page_count=status.bulk_page_count,
        zero_page_count=status.zero_page_count,
        removed_page_count=status.removed_page_count,
        fault_count=status.fault_count,
        received_bytes=status.received_bytes,
        checksum_error_count=status.checksum_error_count,
        reconnect_count=status.reconnect_count,
        violation_count=status.violation_count,
        fault_sample_count=latency.sample_count,
        fault_p50_ns=latency.p50_ns,
        fault_p99_ns=latency.p99_ns,
        fault_p999_ns=latency.p999_ns,
        fault_max_ns=latency.max_ns,
        held_total_ns=status.held_total_ns,
        holds=tuple(_held(hold) for hold in status.holds),
        hold_now=_held(status.hold_now) if status.hold_now.cause else None,
    )


def _held(hold: Hold) -> Held:
    return Held(
        number=hold.number, cause=int(hold.cause), outage_ns=hold.outage_ns, held_ns=hold.held_ns
    )


def _hold_message(held: Held) -> common_pb2.Hold:
    return common_pb2.Hold(
        number=held.number,
        cause=common_pb2.HoldCause.ValueType(held.cause),
        outage_ns=held.outage_ns,
        held_ns=held.held_ns,
    )


def counters_message(counters: Counters) -> common_pb2.ArrivalCounters:
    """The counters as the wire has them."""
    return common_pb2.ArrivalCounters(
        page_count=counters.page_count,
        absent_count=counters.absent_count,
        demand_page_count=counters.demand_page_count,
        bulk_page_count=counters.bulk_page_count,
        zero_page_count=counters.zero_page_count,
        removed_page_count=counters.removed_page_count,
        fault_count=counters.fault_count,
        received_bytes=counters.received_bytes,
        checksum_error_count=counters.checksum_error_count,
        reconnect_count=counters.reconnect_count,
        violation_count=counters.violation_count,
        fault_latency=common_pb2.LatencySummary(
            sample_count=counters.fault_sample_count,
            p50_ns=counters.fault_p50_ns,
            p99_ns=counters.fault_p99_ns,
            p999_ns=counters.fault_p999_ns,
            max_ns=counters.fault_max_ns,
        ),
        held_total_ns=counters.held_total_ns,
        holds=[_hold_message(held) for held in counters.holds],
        hold_now=_hold_message(counters.hold_now) if counters.hold_now else None,
    )


def retained_bytes(record: Record, boot_id: str) -> int:
    """Memory of a guest that has left, as it takes room now."""
    if record.role is not Role.SEALED or record.boot_id != boot_id:
        return 0
    with contextlib.suppress(OSError):
        return Path(record.ram_path).stat().st_blocks * 512
    return 0


def returnable(record: Record, boot_id: str, vmm_state: VmmState) -> bool:
    """True if the whole guest is here as it was at its pause, and has not run since."""
    if record.role not in (Role.DEPARTING, Role.SEALED) or record.boot_id != boot_id:
        return False
    if record.role is Role.DEPARTING and vmm_state is VmmState.PAUSED:
        return record.export is not None and record.export.state is ExportState.FROZEN
    ran = vmm_state in (VmmState.RUNNING, VmmState.GUEST_ENDED)
    mute = record.role is Role.DEPARTING and vmm_state is VmmState.UNRESPONSIVE
    return not ran and not mute and kept_state.is_kept(record)


def evidence(
    record: Record,
    *,
    node: str,
    boot_id: str,
    incarnation: str,
    vmm_state: VmmState,
    counters: Counters | None,
    frozen: bool = False,
) -> pb.Evidence:
    """What this node can prove about a VM."""
    message = pb.Evidence(
        vm_id=record.vm_id,
        node=node,
        boot_id=boot_id,
        incarnation=incarnation,
        role=_ROLES[record.role],
        vmm_state=_VMM_STATES[vmm_state],
        epoch_seen=record.epoch_seen,
        epoch_owned=record.epoch_owned,
        # The last migration's id and decision are told too: a late asker wants to know its end.
        migration_id=record.migration_id if record.migrating else "",
        epoch_prepared=record.epoch_prepared,
        epoch_loaded=record.epoch_loaded,
        epoch_activating=record.epoch_activating,
        epoch_memory_complete=record.epoch_memory_complete,
        epoch_sealed=record.epoch_sealed,
        decision=_DECISIONS[record.decision],
        retained_bytes=retained_bytes(record, boot_id),
        returnable=returnable(record, boot_id, vmm_state),
        frozen=frozen,
    )
    if record.spec_json:
        spec = VmSpec.parse(record.spec_json)
        message.spec_hash = spec.spec_hash
        message.memory_bytes = spec.memory_bytes
        message.spec_json = record.spec_json
        if record.export is not None:
            message.image.CopyFrom(image_message(record, record.export, memory_regions(spec)))
    if counters is not None and record.role in (Role.ARRIVING, Role.ARRIVED):
        message.counters.CopyFrom(counters_message(counters))
    return message
