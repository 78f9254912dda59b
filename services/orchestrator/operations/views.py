# SPDX-License-Identifier: Apache-2.0
"""Operations and plans as the messages of godwit.fleet.v1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from godwit.fleet.v1 import operation_service_pb2 as pb

from services.orchestrator.operations.model import OPEN, Item, ItemState, Operation
from services.orchestrator.paging import PAGE_SIZE_MAX
from services.orchestrator.scheduling.plan import Plan
from services.orchestrator.scheduling_api import wire_priority
from services.orchestrator.views import timestamp


def operation_view(
    operation: Operation,
    items: tuple[Item, ...],
    *,
    counts: Mapping[str, int] | None = None,
    progress_of: Mapping[str, float] | None = None,
    now_ns: int = 0,
) -> pb.Operation:
    """An operation. `progress_of`: by migration, of those that are under way."""
    counted = Counter(item.state.value for item in items) if counts is None else Counter(counts)
    total = sum(counted.values())
    done = float(total - sum(counted[state] for state in OPEN))
    for item in items:
        if item.state is ItemState.MOVING and progress_of:
            done += progress_of.get(item.migration_id, 0.0)
    share = done / total if total else 1.0
    options = operation.options
    view = pb.Operation(
        operation_id=operation.operation_id,
        kind=pb.OperationKind.Value(f"OPERATION_KIND_{operation.kind.name}"),
        node=operation.node,
        state=pb.OperationState.Value(f"OPERATION_STATE_{operation.state.name}"),
        paused=operation.paused,
        progress=1.0 if operation.ended else min(share, 0.99),
        eta_s=_eta_s(operation, share, now_ns),
        reason=operation.reason,
        message=operation.message,
        hint=operation.hint,
        created_at=timestamp(operation.created_at_ns),
        options=pb.OperationOptions(
            parallel_max=options.parallel_max,
            deadline_s=options.deadline_s,
            priority=wire_priority(options.priority),
            retries=options.retries,
            largest_first=options.largest_first,
            windows=options.windows,
        ),
        vms=[item_view(item) for item in items[:PAGE_SIZE_MAX]],
        counts=dict(counted),
        version=operation.version,
    )
    if operation.ended_at_ns:
        view.ended_at.CopyFrom(timestamp(operation.ended_at_ns))
    return view


def _eta_s(operation: Operation, share: float, now_ns: int) -> float:
    """As long again for what is left as it took for what is done."""
    if operation.ended or operation.paused or not 0.0 < share < 1.0:
        return 0.0
    elapsed_s = max(now_ns - operation.created_at_ns, 0) / 1e9
    return elapsed_s * (1.0 - share) / share


def item_view(item: Item) -> pb.OperationVm:
    """What it does with one VM."""
    return pb.OperationVm(
        vm_id=item.vm_id,
        state=pb.OperationVmState.Value(f"OPERATION_VM_STATE_{item.state.name}"),
        source_node=item.source,
        destination_node=item.target,
        migration_id=item.migration_id,
        attempts=item.attempts,
        reason=item.reason,
        message=item.message,
        hint=item.hint,
    )


def plan_view(plan: Plan) -> pb.Plan:
    """A plan."""
    return pb.Plan(
        steps=[
            pb.PlanStep(
                vm_id=each.vm_id,
                source_node=each.source,
                destination_node=each.target,
                because=each.because,
                wave=each.wave,
                starts_s=each.starts_s,
                ends_s=each.ends_s,
            )
            for each in plan.steps
        ],
        impossible=[
            pb.PlanImpossible(
                vm_id=each.vm_id,
                source_node=each.source,
                check=each.check,
                reason=each.reason,
                hint=each.hint,
            )
            for each in plan.impossible
        ],
        ends_s=plan.ends_s,
        waves=plan.waves,
    )
