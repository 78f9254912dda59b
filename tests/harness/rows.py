# SPDX-License-Identifier: Apache-2.0
"""Rows for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from services.orchestrator.migration import PAST_ABORT, PAST_COMMIT, PAST_RETURN, Decision, Phase
from services.orchestrator.store.rows import MigrationRow, VmRow, VmState

SOURCE_EPOCH = 3
EPOCH = 4
RESUME_EPOCH = 5
RETURN_EPOCH = 6
SOURCE_BOOT = "boot-a"


def vm_row(vm_id: str = "vm-1", node: str = "a", epoch: int = SOURCE_EPOCH) -> VmRow:
    """A VM that runs."""
    return VmRow(
        vm_id=vm_id,
        node=node,
        epoch=epoch,
        state=VmState.RUNNING,
        spec_json="{}",
        spec_hash="hash",
        memory_bytes=64 << 20,
        created_at_ns=1,
    )


def migration_row(phase: Phase = Phase.PENDING, **fields: Any) -> MigrationRow:
    """A migration from a to b as it is in `phase`."""
    row = MigrationRow.new(
        migration_id="01JAAAAAAAAAAAAAAAAAAAAAAA",
        vm=vm_row(),
        destination_node="b",
        bulk_bytes_per_s_max=0,
        traceparent="",
        now_ns=1,
    )
    decision = None
    if phase in (*PAST_COMMIT, *PAST_RETURN, Phase.SUCCEEDED, Phase.LOST):
        decision = Decision.COMMITTED
    if phase in PAST_ABORT:
        decision = Decision.ABORTED
    values = {
        "phase": phase,
        "decision": decision,
        "epoch": EPOCH,
        "resume_epoch": RESUME_EPOCH if decision is Decision.ABORTED else 0,
        "source_boot_id": SOURCE_BOOT,
        "given_back": phase in PAST_RETURN,
        "return_epoch": RETURN_EPOCH if phase in (Phase.GIVING_BACK, *PAST_RETURN) else 0,
    }
    return replace(row, **(values | fields))
