# SPDX-License-Identifier: Apache-2.0
"""What the store holds, as values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Self

from services.orchestrator.migration import TERMINAL, Decision, Phase


class VmState(StrEnum):
    """Where a VM's record stands."""

    STARTING = "starting"
    """Its agent was, or is about to be, told to start it."""
    RUNNING = "running"
    """Its node owns it."""
    STOPPING = "stopping"
    """Its agent was, or is about to be, told to stop it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    """A node of the fleet."""

    name: str
    agent_address: str
    """host:port."""
    registered_at_ns: int
    """Wall clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRow:
    """A VM of the fleet."""

    vm_id: str
    node: str
    """The owner."""
    epoch: int
    """Under which it owns the VM."""
    state: VmState
    spec_json: str
    spec_hash: str
    memory_bytes: int
    created_at_ns: int

    @classmethod
    def of(cls, row: Any) -> Self:
        """From a result row."""
        values = row._asdict()
        return cls(**(values | {"state": VmState(values["state"])}))


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionRow:
    """A phase that was entered."""

    phase: Phase
    at_ns: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """Something that happened to a migration; godwit.fleet.v1.MigrationEvent."""

    kind: str
    message: str
    node: str = ""
    action: str = ""
    hint: str = ""
    duration_ns: int = 0
    held_ns: int = 0
    evidence: tuple[str, ...] = ()
    at_ns: int = 0
    """Wall clock, for people."""
    sequence: int = 0
    """Given by the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRow:
    """A migration, as last written."""

    migration_id: str
    vm_id: str
    source_node: str
    destination_node: str
    bulk_bytes_per_s_max: int
    freeze_after_ms: int
    """The policy on a lost link: freeze a guest that has been held that long; 0: never."""
    traceparent: str
    phase: Phase
    terminal: bool
    decision: Decision | None
    source_epoch: int
    """Under which the source owned the VM when the migration was created."""
    epoch: int
    """E', the destination's; 0 until RESERVING."""
    resume_epoch: int
    """The source's fresh one after ABORTED; 0 if no agent was ever told of `epoch`."""
    source_boot_id: str
    """Of the node that holds the memory, by its image record; empty until PREPARING is done."""
    page_size_bytes: int
    """Unit of the userfault bitmap; 0 until PREPARING is done."""
    cancel_requested: bool
    undo_is_cancel: bool
    """Ends in CANCELLED, not in FAILED."""
    guest_ended: bool
    destination_owed: bool
    """The destination has not yet said that its shell is gone. Outlives the migration."""
    reason: str
    """Why it failed or is in the phase that it is in."""
    message: str
    hint: str
    wait_reason: str
    """What the present step waits for; cleared by the next phase."""
    wait_message: str
    wait_hint: str
    created_at_ns: int
    phase_at_ns: int
    """When the phase was entered. Wall clock."""
    ended_at_ns: int
    pause_ns: int
    progress: float
    counters: bytes
    """godwit.common.v1.ArrivalCounters, serialised; empty: none yet."""
    version: int
    return_epoch: int
    """Under which the source gets its guest back after COMMITTED; 0 unless that was begun."""
    given_back: bool
    """The second compare-and-swap (I5): the source owns the guest again, under `return_epoch`."""
    by_force: bool
    """Given back on an operator's word that the destination is fenced, without its own."""
    source_owed: bool
    """The source has not yet said that it has freed a guest that was given up."""

    @classmethod
    def of(cls, row: Any) -> Self:
        """From a result row."""
        values = row._asdict()
        decision = values["decision"]
        return cls(
            **(
                values
                | {
                    "phase": Phase(values["phase"]),
                    "decision": None if decision is None else Decision(decision),
                }
            )
        )

    @classmethod
    def new(
        cls,
        *,
        migration_id: str,
        vm: VmRow,
        destination_node: str,
        bulk_bytes_per_s_max: int,
        traceparent: str,
        now_ns: int,
        freeze_after_ms: int = 0,
    ) -> Self:
        """As it is admitted."""
        return cls(
            migration_id=migration_id,
            vm_id=vm.vm_id,
            source_node=vm.node,
            destination_node=destination_node,
            bulk_bytes_per_s_max=bulk_bytes_per_s_max,
            freeze_after_ms=freeze_after_ms,
            traceparent=traceparent,
            phase=Phase.PENDING,
            terminal=Phase.PENDING in TERMINAL,
            decision=None,
            source_epoch=vm.epoch,
            epoch=0,
            resume_epoch=0,
            source_boot_id="",
            page_size_bytes=0,
            cancel_requested=False,
            undo_is_cancel=False,
            guest_ended=False,
            destination_owed=False,
            reason="",
            message="",
            hint="",
            wait_reason="",
            wait_message="",
            wait_hint="",
            created_at_ns=now_ns,
            phase_at_ns=now_ns,
            ended_at_ns=0,
            pause_ns=0,
            progress=0.0,
            counters=b"",
            version=1,
            return_epoch=0,
            given_back=False,
            by_force=False,
            source_owed=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapRow:
    """A userfault bitmap, as last written."""

    vm_id: str
    epoch: int
    page_size_bytes: int
    page_count: int
    absent_count: int
    packed: bytes
    """See bitmaps.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyRow:
    """A request that was answered."""

    key: str
    request_hash: str
    response: bytes
    """The answer, serialised; empty: it is still being worked out."""
    created_at_ns: int


def row_values(row: MigrationRow) -> dict[str, Any]:
    """The row's columns."""
    return {name: getattr(row, name) for name in _COLUMNS}


_COLUMNS = tuple(each.name for each in fields(MigrationRow))
