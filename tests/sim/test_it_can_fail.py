# SPDX-License-Identifier: Apache-2.0
"""The model test can fail: with any one rule broken, it finds an example that shows it.

Each rule is one that the code keeps today; it is taken out, alone, and the same scenarios are
played until one breaks an invariant. A rule whose absence nobody notices would be no rule, or the
model would be blind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa
from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from hypothesis import HealthCheck, Phase, given, settings

from services.fault_agent import arrivals, departures, fence, vms
from services.fault_agent.journal import Decision, Record
from services.orchestrator import evidence, giveback, handover, migration
from services.orchestrator.doubt import Doubt
from services.orchestrator.store import admission, fleet, identity, migrations, schedule, schema
from services.orchestrator.store.migrations import MigrationTable
from tests.sim.cluster import play
from tests.sim.hosts import BrokenError, SimObeyedStore
from tests.sim.scenarios import SCENARIOS, Scenario, scenarios

# By far more than it takes: a slow machine is no failure of the model.
pytestmark = pytest.mark.timeout(900)

EXAMPLES = 1500
"""More than any of them needs."""


def _nothing(*_args: Any) -> None:
    """What a rule does that is taken out."""


@contextlib.contextmanager
def agent_ignores_the_fence() -> Iterator[None]:
    """Any command is obeyed, whatever its epoch and decision (I1, I11)."""

    def admit(record: Record, given: fence.Fence, command: fence.Command) -> Record:
        begins = command in fence._BEGINS
        return replace(
            record,
            epoch_seen=max(record.epoch_seen, given.epoch),
            migration_id=given.migration_id if begins else record.migration_id,
            decision=Decision.NONE if begins else record.decision,
        )

    with mock.patch.object(vms, "admit", admit):
        yield


@contextlib.contextmanager
def store_answers_before_it_is_durable() -> Iterator[None]:
    """The decision is told, and written a moment later (I2)."""
    write = MigrationTable.decide

    async def decide(self: Any, row: Any, decision: Any, *, now_ns: int) -> Any:
        if row.decision is None and decision is migration.Decision.COMMITTED:
            phase = migration.Phase.COMMITTED

            async def later() -> None:
                await asyncio.sleep(0.3)
                await write(self, row, decision, now_ns=now_ns)

            task = asyncio.get_running_loop().create_task(later())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            return replace(row, decision=decision, phase=phase)
        return await write(self, row, decision, now_ns=now_ns)

    with mock.patch.object(MigrationTable, "decide", decide):
        yield


@contextlib.contextmanager
def source_resumes_under_the_old_epoch() -> Iterator[None]:
    """ABORTED issues no fresh epoch, and the agent does not look (I1)."""
    real = fleet.next_epoch

    def next_epoch(connection: sa.Connection, vm_id: str) -> int:
        columns = schema.migrations.c
        aborted = connection.execute(
            sa.select(columns.epoch).where(columns.decision == "aborted", ~columns.terminal)
        ).scalar_one_or_none()
        return int(aborted) if aborted else real(connection, vm_id)

    with (
        mock.patch.object(migrations, "next_epoch", next_epoch),
        mock.patch.object(departures.Departures, "_check_fresh", _nothing),
    ):
        yield


@contextlib.contextmanager
def decision_is_overwritten() -> Iterator[None]:
    """The write looks at nothing: it swaps without comparing (I2)."""
    columns = schema.migrations.c

    def decide(decision: migration.Decision, phase: migration.Phase) -> Any:
        return (
            sa.update(schema.migrations)
            .where(columns.migration_id == sa.bindparam("of"))
            .values(decision=decision, phase=phase, phase_at_ns=sa.bindparam("now_ns"))
            .returning(schema.migrations)
        )

    swapped = {
        migration.Decision.COMMITTED: decide(
            migration.Decision.COMMITTED, migration.Phase.COMMITTED
        ),
        migration.Decision.ABORTED: decide(migration.Decision.ABORTED, migration.Phase.ABORTED),
    }
    with mock.patch.object(migrations, "_DECIDE", swapped):
        yield


@contextlib.contextmanager
def memory_is_released_early() -> Iterator[None]:
    """The orchestrator takes any memory for complete (I3)."""
    with mock.patch.object(evidence, "is_complete", return_value=True):
        yield


@contextlib.contextmanager
def cont_before_activating() -> Iterator[None]:
    """The mark is believed, and not written (I5)."""
    real = vms.Vm.write

    async def write(self: vms.Vm, record: Record, *, durable: bool = True) -> None:
        if record.epoch_activating and not self.record.epoch_activating:
            self.record = record
        else:
            await real(self, record, durable=durable)

    with mock.patch.object(vms.Vm, "write", write):
        yield


@contextlib.contextmanager
def source_is_never_sealed() -> Iterator[None]:
    """Nobody tells it (I5)."""

    async def seal(*_args: Any) -> None:
        """Nothing."""

    with mock.patch.object(handover, "seal", seal):
        yield


@contextlib.contextmanager
def memory_is_forgotten() -> Iterator[None]:
    """A restored store is believed, by itself and by the agents (I2)."""

    async def require(self: Any, _incarnation: str) -> None:
        """Anybody's command."""

    real = identity.Identity.__init__

    def __init__(self: Any, database: Any, known: dict[str, str]) -> None:  # noqa: N807
        real(self, database, known)
        self.in_doubt = ""

    with (
        mock.patch.object(SimObeyedStore, "require", require),
        mock.patch.object(identity, "refuse_in_doubt", _nothing),
        mock.patch.object(migrations, "refuse_in_doubt", _nothing),
        mock.patch.object(fleet, "refuse_in_doubt", _nothing),
        mock.patch.object(schedule, "refuse_in_doubt", _nothing),
        mock.patch.object(admission, "_doubt", return_value=""),
        mock.patch.object(identity.Identity, "__init__", __init__),
        mock.patch.object(Doubt, "found", _nothing),
    ):
        yield


@contextlib.contextmanager
def guest_goes_back_without_a_proof() -> Iterator[None]:
    """Neither the orchestrator nor the destination looks for ACTIVATING (I5)."""
    with (
        mock.patch.object(evidence, "never_ran", _is_dead),
        mock.patch.object(giveback, "never_ran", _is_dead),
        mock.patch.object(evidence, "_stuck_destination", _never_ran),
        mock.patch.object(arrivals, "was_activated", return_value=False),
    ):
        yield


def _is_dead(_row: Any, destination: Any) -> bool:
    return bool(destination.vmm_state == agent_pb2.VMM_STATE_DEAD)


def _never_ran(_row: Any, invariants: tuple[str, ...]) -> evidence.Judgement:
    event = migration.NeverRan(reason="TEST", message="believed")
    return evidence.Judgement(verdict=evidence.Verdict.EVENT, event=event, invariants=invariants)


@contextlib.contextmanager
def destination_is_not_fenced_first() -> Iterator[None]:
    """The owner is swapped without a recall: an Activate on its way is still obeyed (I5)."""

    async def nothing(_move: Any) -> None:
        """Believe the evidence of a moment ago."""

    with mock.patch.object(giveback, "_recall_destination", nothing):
        yield


@contextlib.contextmanager
def return_is_written_blindly() -> Iterator[None]:
    """The second compare-and-swap compares nothing, neither the phase nor the owner (I5)."""
    columns, owners = schema.migrations.c, schema.vms.c

    def write_return(connection: sa.Connection, migration_id: str, now_ns: int) -> None:
        row = connection.execute(
            sa.update(schema.migrations)
            .where(columns.migration_id == migration_id)
            .values(given_back=True, phase=migration.Phase.GIVEN_BACK, phase_at_ns=now_ns)
            .returning(schema.migrations)
        ).one()
        migrations.add_transition(connection, migration_id, migration.Phase.GIVEN_BACK, now_ns, "")
        owner = {"node": row.source_node, "epoch": row.return_epoch}
        connection.execute(sa.update(schema.vms).where(owners.vm_id == row.vm_id).values(owner))

    with mock.patch.object(migrations, "_write_return", write_return):
        yield


RULES: dict[Callable[[], contextlib.AbstractContextManager[None]], Any] = {
    agent_ignores_the_fence: scenarios("cancel", "move", weather=("late",), at_least=4),
    store_answers_before_it_is_durable: SCENARIOS,
    source_resumes_under_the_old_epoch: SCENARIOS,
    decision_is_overwritten: scenarios("twin", "cancel", weather=("calm",), at_least=5),
    memory_is_released_early: SCENARIOS,
    cont_before_activating: SCENARIOS,
    source_is_never_sealed: SCENARIOS,
    guest_goes_back_without_a_proof: scenarios("end_at_commit", "reboot_at_commit", at_least=1),
    destination_is_not_fenced_first: scenarios("end_at_commit", "reboot_at_commit", at_least=1),
    return_is_written_blindly: scenarios("end_at_commit", "twin", weather=("calm",), at_least=5),
    memory_is_forgotten: scenarios("backup", "restore", "kill", at_least=3),
}
"""Each with what it takes: the whole of SCENARIOS finds them too, in up to 1 400 examples."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("broken", RULES, ids=[rule.__name__ for rule in RULES])
def test_rule_that_is_broken_is_found(
    broken: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    """Somebody notices."""
    tries = 0

    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.generate],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(RULES[broken])
    def search(scenario: Scenario) -> None:
        nonlocal tries
        tries += 1
        try:
            play(scenario.seed, scenario)
        except BrokenError as error:
            # A process that ended by an error of its own proves nothing of any invariant.
            if not str(error).startswith("BUG:"):
                raise

    with broken(), pytest.raises(BrokenError) as found:
        search()
    print(f"{broken.__name__}: example {tries}: {str(found.value).splitlines()[0][:120]}")
