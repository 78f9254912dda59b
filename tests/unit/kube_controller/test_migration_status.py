# SPDX-License-Identifier: Apache-2.0
"""Every phase of a migration as the status that `kubectl` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from godwit.common.v1 import common_pb2
from godwit.fleet.v1 import types_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import NotFoundError
from services.orchestrator.kubernetes.migration_status import (
    TERMINAL,
    UNDECIDED,
    phase_name,
    refused,
    status_of,
)
from services.orchestrator.migration import TERMINAL as STORE_TERMINAL
from services.orchestrator.migration import UNDECIDED as STORE_UNDECIDED
from services.orchestrator.migration import Phase
from services.orchestrator.views import WIRE_PHASE

NOW = "2026-01-02T03:04:05Z"
LATER = "2026-01-02T03:04:06Z"
CRD = Path(__file__).parents[3] / "deploy/helm/godwit/crds/vmmigrations.yaml"
PHASES = list(Phase)


def view(phase: Phase, **fields: Any) -> types_pb2.Migration:
    return types_pb2.Migration(
        migration_id="01", vm_id="vm", source_node="a", phase=WIRE_PHASE[phase], **fields
    )


def made(phase: Phase, before: Any = None, *, now: str = NOW, **fields: Any) -> Any:
    return status_of(view(phase, **fields), before or {}, now=now, generation=3)


def condition(status: Any, name: str) -> Any:
    return next(each for each in status["conditions"] if each["type"] == name)


def test_the_schema_knows_every_phase() -> None:
    schema = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    known = set(schema["properties"]["status"]["properties"]["phase"]["enum"])
    assert known == {phase_name(WIRE_PHASE[phase]) for phase in PHASES} | {"Refused"}


def test_what_is_over_and_what_is_undecided_is_as_the_store_has_it() -> None:
    assert {phase_name(WIRE_PHASE[phase]) for phase in STORE_TERMINAL} == TERMINAL - {"Refused"}
    undecided = {phase_name(WIRE_PHASE[phase]) for phase in STORE_UNDECIDED}
    # ABORTED is decided, and its rollback is what is owed.
    assert undecided | {"", "Aborted"} == UNDECIDED


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_has_its_conditions(phase: Phase) -> None:
    status = made(phase)
    by_type = {each["type"]: each["status"] for each in status["conditions"]}
    assert set(by_type) >= {"Admitted", "Committed", "MemoryComplete", "NeedsAttention"}
    assert by_type["NeedsAttention"] == ("True" if phase is Phase.NEEDS_ATTENTION else "False")
    over = "True" if phase is Phase.SUCCEEDED else "False"
    assert by_type["Succeeded"] == (over if phase in STORE_TERMINAL else "Unknown")


def test_what_holds_it_in_the_queue_is_the_reason() -> None:
    status = made(
        Phase.PENDING, reason="NODE_INBOUND_LIMIT", message="node-in:b 2/2", hint="raise it"
    )
    admitted = condition(status, "Admitted")
    assert (admitted["status"], admitted["reason"]) == ("False", "NODE_INBOUND_LIMIT")
    assert admitted["message"] == "node-in:b 2/2: raise it"


def test_memory_is_known_to_be_incomplete_only_after_the_decision() -> None:
    assert condition(made(Phase.SWITCHOVER), "MemoryComplete")["status"] == "Unknown"
    committed = common_pb2.DECISION_COMMITTED
    after = made(Phase.POSTCOPY, decision=committed)
    assert condition(after, "MemoryComplete")["status"] == "False"
    assert (
        condition(made(Phase.FINALIZING, decision=committed), "MemoryComplete")["status"] == "True"
    )


def test_a_cancel_that_came_too_late_says_so() -> None:
    status = made(Phase.POSTCOPY, cancel_requested=True, decision=common_pb2.DECISION_COMMITTED)
    cancelled = condition(status, "Cancelled")
    assert (cancelled["status"], cancelled["reason"]) == ("False", "PAST_COMMIT")


def test_only_what_turned_has_a_new_time() -> None:
    before = made(Phase.SWITCHOVER)
    after = made(Phase.COMMITTED, before, now=LATER, decision=common_pb2.DECISION_COMMITTED)
    assert condition(after, "Committed")["lastTransitionTime"] == LATER
    assert condition(after, "Admitted")["lastTransitionTime"] == NOW


@given(st.sampled_from(PHASES), st.floats(0, 1), st.integers(0, 2**62), st.text(), st.text())
def test_the_status_is_what_the_schema_takes(
    phase: Phase, progress: float, pause_ns: int, message: str, hint: str
) -> None:
    status = made(phase, progress=progress, pause_ns=pause_ns, message=message, hint=hint)
    schema = yaml.safe_load(CRD.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    known = schema["properties"]["status"]["properties"]
    assert status.keys() <= known.keys()
    assert status.get("phase") in known["phase"]["enum"]
    # 100% is said of what is whole.
    assert (status["progress"] == "100%") == (progress == 1)


def test_what_was_refused_is_over() -> None:
    error = NotFoundError("VM_UNKNOWN", "there is no VM x", hint="see godwit vms")
    status = refused(error, {}, now=NOW, generation=1)
    assert (status["phase"], status["completionTime"]) == ("Refused", NOW)
    assert condition(status, "Succeeded")["reason"] == "VM_UNKNOWN"
