# SPDX-License-Identifier: Apache-2.0
"""What the agents' journals make of a store that may have forgotten something. Sans-IO.

`merge` takes what the store has of one VM and what every node can prove of it, and returns what the
store must say. It is called only once every node obeys this store (`rebuild.py`): no command that
the forgotten store gave can change the evidence any more, or be admitted later.

| evidence of a migration | then |
|---|---|
| SEALED, ACTIVATING, or COMMITTED was told | it is COMMITTED: the destination owns the guest |
| none of them | it is ABORTED: the guest never ran there, the source owns it under a fresh epoch |
| nobody has it under way any more | it ended; how is told by whoever owns the guest |
| COMMITTED and ABORTED were told; two nodes run the guest | RebuildConflictError: a person's work |

A decision that was written and told to nobody is forgotten with the store, and that is no harm:
nobody acted on it. Nothing here starts or stops a guest; the orchestrator does, by its rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.common.v1 import common_pb2

from services.common.errors import FailedPreconditionError
from services.common.vm_spec import VmSpec
from services.orchestrator.migration import PAST_COMMIT, TERMINAL, Decision, Phase
from services.orchestrator.store.rows import MigrationRow, VmRow, VmState

EPOCH_JUMP = 1000
"""Above everything that was seen: what the forgotten store issued and nobody has seen yet."""

REASON = "STORE_REBUILT"

_LEAVES = frozenset({pb.VM_ROLE_DEPARTING, pb.VM_ROLE_SEALED})
_COMES = frozenset({pb.VM_ROLE_ARRIVING, pb.VM_ROLE_ARRIVED})
_LIVES = frozenset({pb.VM_ROLE_RESIDENT, pb.VM_ROLE_DEPARTING})


class RebuildConflictError(FailedPreconditionError):
    """The journals contradict each other: an invariant broke before the store was lost."""

    def __init__(self, vm_id: str, why: str) -> None:
        super().__init__(
            "REBUILD_CONFLICT",
            f"{vm_id}: {why}",
            hint="find out which guest is the true one, stop the other, and rebuild again",
            metadata={"vm_id": vm_id},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of one VM."""

    vm_id: str
    vm: VmRow | None
    """As the store has it."""
    last_epoch: int
    """The highest that the store remembers to have issued."""
    migrations: Mapping[str, MigrationRow]
    """Of this VM, by id; ended ones too."""
    evidence: Sequence[pb.Evidence]
    """Of every node that knows the VM."""
    silent: frozenset[str] = frozenset()
    """Nodes that were left out."""


@dataclass(slots=True, kw_only=True)
class Merged:
    """What the store must say of one VM."""

    vm: VmRow | None
    """None: there is no such VM any more."""
    last_epoch: int
    migrations: list[MigrationRow] = field(default_factory=list)
    """To be written; at most one of them, and of all of the VM, has not ended."""
    notes: list[str] = field(default_factory=list)
    """What was found, for people."""


def merge(known: Known, *, now_ns: int) -> Merged:
    """Merge what is known of one VM.

    Raises:
        RebuildConflictError: a person must look.
    """
    return _Merge(known, now_ns).run()


class _Merge:
    def __init__(self, known: Known, now_ns: int) -> None:
        self._known = known
        self._now_ns = now_ns
        marks = [max(_marks(each)) for each in known.evidence]
        highest = max(known.last_epoch, known.vm.epoch if known.vm else 0, *marks, 0)
        self._fresh = highest + EPOCH_JUMP
        self._owner = self._find_owner()
        self._out = Merged(vm=known.vm, last_epoch=self._fresh)

    def run(self) -> Merged:
        """See `merge`."""
        active: MigrationRow | None = None
        # The latest first: an earlier one that is still somewhere under way can only be cleared.
        for migration_id, parties in sorted(
            self._under_way().items(), key=lambda item: -max(each.epoch_seen for each in item[1])
        ):
            row = self._judge(migration_id, parties, superseded=active is not None)
            if row is not None and row.phase not in TERMINAL:
                active = row
        self._end_forgotten(active)
        self._out.vm = self._vm(active)
        return self._out

    # --- who owns the guest ---

    def _find_owner(self) -> pb.Evidence | None:
        claims = sorted(
            (each for each in self._known.evidence if _claim(each)), key=_claim, reverse=True
        )
        for other in claims[1:]:
            gives_it_away = (
                other.role == pb.VM_ROLE_DEPARTING
                and claims[0].role in _COMES | {pb.VM_ROLE_RESIDENT}
                and other.vmm_state != pb.VMM_STATE_RUNNING
            )
            if not gives_it_away and other.vmm_state != pb.VMM_STATE_DEAD:
                raise RebuildConflictError(
                    self._known.vm_id,
                    f"{claims[0].node} owns it under epoch {_claim(claims[0])} and {other.node} "
                    f"under {_claim(other)}, {pb.VmmState.Name(other.vmm_state)} (I1)",
                )
        return claims[0] if claims else None

    def _vm(self, active: MigrationRow | None) -> VmRow | None:
        known, owner = self._known.vm, self._owner
        if active is not None and active.given_back:
            node, epoch = active.source_node, active.return_epoch
        elif active is not None and active.decision is Decision.COMMITTED:
            node, epoch = active.destination_node, active.epoch
        elif active is not None and active.resume_epoch:
            node, epoch = active.source_node, active.resume_epoch
        elif owner is not None:
            node, epoch = owner.node, _claim(owner)
        else:
            return self._unclaimed()
        if known is not None and known.node == node and known.epoch <= self._highest_seen():
            epoch = max(epoch, known.epoch)  # resumed without a pause: only the fence knows it
        state = VmState.RUNNING
        if known is not None and known.state is VmState.STOPPING and known.node == node:
            state, epoch = VmState.STOPPING, max(epoch, known.epoch)
        base = known or self._of_evidence()
        if base is None:
            self._note("no node has its spec: it is left out")
            return None
        if known is None or (known.node, known.epoch, known.state) != (node, epoch, state):
            self._note(f"belongs to {node} under epoch {epoch}, {state}")
        return replace(base, node=node, epoch=epoch, state=state)

    def _unclaimed(self) -> VmRow | None:
        known = self._known.vm
        if known is None:
            return None
        at_home = [each for each in self._known.evidence if each.node == known.node]
        gone = any(each.role == pb.VM_ROLE_GONE for each in at_home)
        if known.node not in self._known.silent and (gone or known.state is not VmState.RUNNING):
            self._note(f"{known.node} does not have it any more: it is forgotten")
            return None
        self._note(f"no node claims it: it stays with {known.node}, as the store says")
        return known

    def _of_evidence(self) -> VmRow | None:
        for each in sorted(self._known.evidence, key=_claim, reverse=True):
            if each.spec_json:
                spec = VmSpec.parse(each.spec_json)
                return VmRow(
                    vm_id=self._known.vm_id,
                    node=each.node,
                    epoch=0,
                    state=VmState.RUNNING,
                    spec_json=spec.canonical_json(),
                    spec_hash=spec.spec_hash,
                    memory_bytes=spec.memory_bytes,
                    created_at_ns=self._now_ns,
                )
        return None

    def _highest_seen(self) -> int:
        return max((each.epoch_seen for each in self._known.evidence), default=0)

    # --- migrations ---

    def _under_way(self) -> dict[str, list[pb.Evidence]]:
        found: dict[str, list[pb.Evidence]] = {}
        for each in self._known.evidence:
            if each.role in _LEAVES | _COMES and each.migration_id:
                found.setdefault(each.migration_id, []).append(each)
        return found

    def _judge(
        self, migration_id: str, parties: Sequence[pb.Evidence], *, superseded: bool
    ) -> MigrationRow | None:
        source = next((each for each in parties if each.role in _LEAVES), None)
        destination = next((each for each in parties if each.role in _COMES), None)
        committed = _is_committed(source, destination)
        told = {each.decision for each in parties}
        if committed and common_pb2.DECISION_ABORTED in told:
            raise RebuildConflictError(
                self._known.vm_id, f"migration {migration_id} was committed and aborted (I2)"
            )
        present = self._known.migrations.get(migration_id)
        returned = common_pb2.DECISION_RETURNED in told
        returned = returned or (present is not None and present.given_back)
        row = self._base(present, migration_id, source, destination)
        if present is not None and present.phase in TERMINAL:
            if destination is not None and present.decision is Decision.ABORTED:
                return self._write(replace(present, destination_owed=True), "its shell is owed")
            return None
        if present is not None and present.decision is not None:
            expected = Decision.COMMITTED if committed else present.decision
            if expected is not present.decision:
                raise RebuildConflictError(
                    self._known.vm_id,
                    f"the store has {present.decision} for migration {migration_id},"
                    " a node has acted on the contrary (I2)",
                )
            committed = present.decision is Decision.COMMITTED
        if returned:
            return self._returned(row, superseded=superseded)
        if committed:
            return self._committed(row, superseded=superseded)
        return self._aborted(row, source, destination, superseded=superseded)

    def _base(
        self,
        present: MigrationRow | None,
        migration_id: str,
        source: pb.Evidence | None,
        destination: pb.Evidence | None,
    ) -> MigrationRow:
        owner = self._owner
        vm = self._known.vm or self._of_evidence()
        assert vm is not None or present is not None or source or destination
        epochs = [0]
        if destination is not None:
            epochs.append(destination.epoch_prepared or destination.epoch_seen)
        if source is not None:
            epochs.append(source.epoch_sealed or source.epoch_seen)
        fields: dict[str, Any] = {"epoch": (present.epoch if present else 0) or max(epochs)}
        if source is not None:
            fields |= {"source_node": source.node, "source_epoch": source.epoch_owned}
            fields |= {"source_boot_id": source.image.boot_id or source.boot_id}
            if source.image.regions:
                fields["page_size_bytes"] = source.image.regions[0].page_size_bytes
        else:
            # It may have been released already; its seal stays in the journal.
            sealed = (each for each in self._known.evidence if each.epoch_sealed == fields["epoch"])
            if (left := next(sealed, None)) is not None:
                fields |= {"source_node": left.node, "source_epoch": left.epoch_owned}
        if destination is None and source is not None:
            fields |= self._recalled(source)
        if destination is not None:
            fields["destination_node"] = destination.node
        if present is not None:
            return replace(present, **fields)
        at = owner.node if owner is not None and owner is not destination else ""
        row = MigrationRow.new(
            migration_id=migration_id,
            vm=VmRow(
                vm_id=self._known.vm_id,
                node=at,
                epoch=_claim(owner) if owner is not None else 0,
                state=VmState.RUNNING,
                spec_json="",
                spec_hash="",
                memory_bytes=0,
                created_at_ns=0,
            ),
            destination_node="",
            bulk_bytes_per_s_max=0,
            traceparent="",
            now_ns=self._now_ns,
        )
        return replace(row, **fields)

    def _recalled(self, source: pb.Evidence) -> dict[str, Any]:
        """The destination of a departure that was recalled there, or undone: its marks stay."""
        for each in self._known.evidence:
            later = source.epoch_owned < each.epoch_loaded <= source.epoch_seen
            if each.node != source.node and later and each.role not in _COMES:
                return {"epoch": each.epoch_loaded, "destination_node": each.node}
        return {}

    def _returned(self, row: MigrationRow, *, superseded: bool) -> MigrationRow:
        """A node was told that the store had given the guest back: so it has (I5)."""
        back = replace(
            row,
            decision=Decision.COMMITTED,
            given_back=True,
            return_epoch=self._fresh,
            phase=Phase.RETURNED if superseded else Phase.GIVEN_BACK,
        )
        return self._write(back, "its source was told that it has the guest back")

    def _committed(self, row: MigrationRow, *, superseded: bool) -> MigrationRow:
        phase = row.phase if row.phase in PAST_COMMIT else Phase.COMMITTED
        if phase is Phase.GIVING_BACK:
            phase = Phase.COMMITTED  # begun anew, on evidence, under an epoch that is fresh
        row = replace(row, return_epoch=0)
        if superseded:
            phase = Phase.LOST
        elif not row.destination_node:
            phase = Phase.NEEDS_ATTENTION
        return self._write(
            replace(row, decision=Decision.COMMITTED, phase=phase), "a node has acted on COMMITTED"
        )

    def _aborted(
        self,
        row: MigrationRow,
        source: pb.Evidence | None,
        destination: pb.Evidence | None,
        *,
        superseded: bool,
    ) -> MigrationRow:
        row = replace(row, decision=Decision.ABORTED, destination_owed=destination is not None)
        if source is None or superseded:
            # Whoever owns the guest needs no undoing: only a shell is left.
            return self._write(replace(row, phase=Phase.FAILED), "only its shell is left")
        return self._write(
            replace(row, phase=Phase.ABORTED, resume_epoch=self._fresh),
            "nobody has acted on COMMITTED, and nobody can any more",
        )

    def _end_forgotten(self, active: MigrationRow | None) -> None:
        """End what the store has under way and no node does, where it is proved over."""
        owner = self._owner
        for row in self._known.migrations.values():
            over = row.phase in TERMINAL or (active and row.migration_id == active.migration_id)
            if over or any(each.migration_id == row.migration_id for each in self._out.migrations):
                continue
            arrived = row.epoch > 0 and any(
                row.epoch in (each.epoch_activating, each.epoch_sealed)
                for each in self._known.evidence
            )
            decided = row.decision is Decision.COMMITTED or (arrived and row.decision is None)
            if decided and (epoch := self._returned_to(row)):
                back = replace(row, decision=Decision.COMMITTED, given_back=True)
                back = replace(back, return_epoch=epoch, phase=Phase.RETURNED)
                self._write(back, "its source has the guest again, and its destination never had")
            elif row.given_back:
                if active is not None:  # else it stays as it is: the orchestrator asks its source
                    self._outlived(replace(row, phase=Phase.RETURNED), active)
            elif decided:
                done = replace(row, decision=Decision.COMMITTED, phase=Phase.SUCCEEDED)
                if any(each.node == row.destination_node for each in self._known.evidence):
                    self._write(done, "both nodes are done with it")
                elif active is not None:  # else the orchestrator waits for the node that knows
                    self._outlived(done, active)
            elif owner is not None or active is not None or self._can_be_asked(row):
                self._write(
                    replace(row, decision=Decision.ABORTED, phase=Phase.FAILED),
                    "no node has it under way; how it ended is forgotten",
                )

    def _outlived(self, ended: MigrationRow, active: MigrationRow) -> None:
        """End what the store has under way: a later one was admitted, so that it had ended."""
        if active.epoch < max(ended.epoch, ended.return_epoch):
            raise RebuildConflictError(
                self._known.vm_id,
                f"the store has migration {ended.migration_id} under way, and nodes have an"
                f" earlier one, {active.migration_id}",
            )
        self._write(ended, f"migration {active.migration_id} was admitted after it")

    def _returned_to(self, row: MigrationRow) -> int:
        """The epoch under which the source has the guest back; 0: it has not, as far as is seen."""
        owner = self._owner
        if owner is None or owner.node != row.source_node or not 0 < row.epoch < _claim(owner):
            return 0
        unrun = row.given_back or any(
            each.node == row.destination_node
            and each.epoch_loaded == row.epoch
            and each.epoch_activating != row.epoch
            for each in self._known.evidence
        )
        return _claim(owner) if unrun else 0

    def _can_be_asked(self, row: MigrationRow) -> bool:
        return not {row.source_node, row.destination_node} & self._known.silent

    def _write(self, row: MigrationRow, why: str) -> MigrationRow:
        terminal = row.phase in TERMINAL
        message = f"the store was rebuilt from the agents' journals: {why}"
        row = replace(
            row,
            terminal=terminal,
            reason=REASON,
            message=message,
            hint="",
            wait_reason="",
            wait_message="",
            wait_hint="",
            phase_at_ns=self._now_ns,
            ended_at_ns=self._now_ns if terminal else 0,
            version=row.version + 1,
        )
        self._out.migrations.append(row)
        self._note(f"migration {row.migration_id} is {row.phase}: {why}")
        return row

    def _note(self, text: str) -> None:
        self._out.notes.append(f"{self._known.vm_id}: {text}")


def _claim(evidence: pb.Evidence) -> int:
    """The epoch under which the node owns the guest; 0: it does not say that it does."""
    if evidence.role in _LIVES:
        return evidence.epoch_owned
    if evidence.role == pb.VM_ROLE_ARRIVED or _activated(evidence):
        return evidence.epoch_prepared
    return 0


def _activated(evidence: pb.Evidence) -> bool:
    prepared = evidence.epoch_prepared
    return evidence.role in _COMES and prepared > 0 and evidence.epoch_activating == prepared


def _is_committed(source: pb.Evidence | None, destination: pb.Evidence | None) -> bool:
    told = {each.decision for each in (source, destination) if each is not None}
    return (
        common_pb2.DECISION_COMMITTED in told
        or (source is not None and source.role == pb.VM_ROLE_SEALED)
        or (destination is not None and _claim(destination) > 0)
    )


def _marks(evidence: pb.Evidence) -> tuple[int, ...]:
    return (
        evidence.epoch_seen,
        evidence.epoch_owned,
        evidence.epoch_prepared,
        evidence.epoch_loaded,
        evidence.epoch_activating,
        evidence.epoch_memory_complete,
        evidence.epoch_sealed,
    )
