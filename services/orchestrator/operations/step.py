# SPDX-License-Identifier: Apache-2.0
"""What an operation does next, by what is true now. Sans-IO.

Level-triggered: it asks what is, not what happened, so that it comes to the same answer after a
restart, after a step that was half done, and when others move the same VMs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from services.orchestrator.operations.model import OPEN, Item, ItemState, Kind, Operation, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Active:
    """A migration that is under way."""

    migration_id: str
    source: str
    target: str
    """Empty: not placed yet."""
    operation_id: str
    decided: bool
    """It cannot be cancelled any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a migration ended."""

    succeeded: bool
    reason: str = ""
    message: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """What holds a migration in the queue."""

    reason: str
    message: str
    hint: str
    stuck: bool
    """No token would help it: it does not count as one of those in parallel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is true now."""

    at: Mapping[str, str]
    """The node of every VM of the fleet."""
    active: Mapping[str, Active]
    """By VM."""
    ended: Mapping[str, Ended]
    """By migration; of those that the items name and that are not active."""
    holds: Mapping[str, Hold] = field(default_factory=dict)
    """By migration."""
    retained: str = ""
    """What the node of a drain still has, in words; empty: nothing."""
    window_open: bool = True
    expired: bool = False
    """Its deadline has passed."""
    parallel: int = 1
    """How many may be under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is to be done, and what is then to be written."""

    operation: Operation
    items: tuple[Item, ...]
    """All of them, in order."""
    begin: tuple[Item, ...] = ()
    """Migrations to ask for; to be written down with the answer."""
    cancel: tuple[str, ...] = ()
    """Migrations to cancel. A refusal means that they are past their decision: let them end."""


def step(operation: Operation, items: tuple[Item, ...], facts: Facts) -> Step:
    """The next step. Of an operation that has ended: none."""
    if operation.ended:
        return Step(operation=operation, items=items)
    present = _with_new(operation, items, facts)
    known = {item.vm_id: _seen(operation, item, facts) for item in present}
    stopping = operation.state is State.CANCELLING or facts.expired
    cancel: list[str] = []
    begin: list[Item] = []
    if stopping:
        reason, message = _why_stopped(operation)
        for vm_id, item in known.items():
            if item.state is ItemState.WAITING:
                known[vm_id] = _closed(item, ItemState.STAYED, reason, message)
            elif item.state is ItemState.MOVING and _is_ours(operation, vm_id, facts):
                cancel.append(item.migration_id)
    elif not operation.paused and facts.window_open:
        free = facts.parallel - sum(_counts(item, facts) for item in known.values())
        for item in known.values():
            if free <= 0:
                break
            if item.state is ItemState.WAITING and item.vm_id not in facts.active:
                begin.append(item)
                free -= 1
    after = tuple(known.values())
    return Step(
        operation=_concluded(operation, after, facts, stopping=stopping),
        items=after,
        begin=tuple(begin),
        cancel=tuple(cancel),
    )


def _with_new(operation: Operation, items: tuple[Item, ...], facts: Facts) -> list[Item]:
    """A drain takes up every VM that is there, also one that came, or came back, meanwhile."""
    known = list(items)
    if operation.kind is not Kind.DRAIN or operation.state is State.CANCELLING:
        return known
    there = {vm_id for vm_id, node in facts.at.items() if node == operation.node}
    for index, item in enumerate(known):
        if item.vm_id in there and item.state in (ItemState.MOVED, ItemState.GONE):
            again = replace(item, state=ItemState.WAITING, target="", migration_id="", attempts=0)
            known[index] = again
    sequence = max((item.sequence for item in known), default=0)
    for vm_id in sorted(there - {item.vm_id for item in known}):
        sequence += 1
        known.append(Item(vm_id=vm_id, sequence=sequence, source=operation.node))
    return known


def _seen(operation: Operation, item: Item, facts: Facts) -> Item:
    """An item by what is true of its VM."""
    if item.state not in OPEN:
        return item
    node, active = facts.at.get(item.vm_id), facts.active.get(item.vm_id)
    if item.state is ItemState.MOVING and not (active and active.migration_id == item.migration_id):
        item = _after(operation, item, facts)
        if item.state is not ItemState.WAITING:
            return item
    if node is None:
        return _closed(item, ItemState.GONE, "VM_GONE", f"{item.vm_id} is not there any more")
    if item.state is ItemState.MOVING:
        hold = facts.holds.get(item.migration_id)
        if hold is None:
            return replace(item, reason="", message="", hint="")
        return replace(item, reason=hold.reason, message=hold.message, hint=hold.hint)
    if active and (active.operation_id == operation.operation_id or _leaves(operation, active)):
        # Ours, of a step that was not written down, or somebody else's that does what we want.
        attempts = item.attempts + (active.operation_id == operation.operation_id)
        return replace(
            item, state=ItemState.MOVING, migration_id=active.migration_id, attempts=attempts
        )
    return _elsewhere(operation, item, node)


def _leaves(operation: Operation, active: Active) -> bool:
    return operation.kind is Kind.DRAIN and active.source == operation.node


def _elsewhere(operation: Operation, item: Item, node: str) -> Item:
    """One that waits, and is not where it was, or is where it shall be."""
    if item.target == node or (operation.kind is Kind.DRAIN and node != operation.node):
        return replace(item, state=ItemState.MOVED, target=node, reason="", message="", hint="")
    if node != item.source and operation.kind is not Kind.BATCH:
        return _closed(item, ItemState.STAYED, "VM_ELSEWHERE", f"{item.vm_id} is on {node} by now")
    return item


def _after(operation: Operation, item: Item, facts: Facts) -> Item:
    """One whose migration is over."""
    ended = facts.ended.get(item.migration_id)
    node = facts.at.get(item.vm_id, "")
    if ended is None or node == "":
        return replace(item, state=ItemState.WAITING)
    if ended.succeeded and node != item.source:
        return replace(item, state=ItemState.MOVED, target=node, reason="", message="", hint="")
    noted = replace(item, reason=ended.reason, message=ended.message, hint=ended.hint)
    if item.attempts > operation.options.retries:
        return replace(noted, state=ItemState.FAILED)
    return replace(noted, state=ItemState.WAITING)


def _closed(item: Item, state: ItemState, reason: str, message: str) -> Item:
    return replace(item, state=state, reason=reason, message=message, hint="")


def _is_ours(operation: Operation, vm_id: str, facts: Facts) -> bool:
    active = facts.active.get(vm_id)
    return bool(active and active.operation_id == operation.operation_id and not active.decided)


def _counts(item: Item, facts: Facts) -> bool:
    """Whether it is one of those in parallel: one that no token would help holds up nobody."""
    if item.state is not ItemState.MOVING:
        return False
    hold = facts.holds.get(item.migration_id)
    return not (hold and hold.stuck)


def _why_stopped(operation: Operation) -> tuple[str, str]:
    if operation.state is State.CANCELLING:
        return "CANCELLED", "the operation was cancelled"
    return "DEADLINE_EXCEEDED", f"its {operation.options.deadline_s:g} s are over"


def _concluded(
    operation: Operation, items: tuple[Item, ...], facts: Facts, *, stopping: bool
) -> Operation:
    """The operation, ended if nothing is left to do; else with what it waits for."""
    left = [item for item in items if item.state in OPEN]
    if left:
        return _waits(operation, left, facts)
    if operation.state is State.CANCELLING:
        return _with(operation, State.CANCELLED, "CANCELLED", "cancelled on request")
    missed = [item for item in items if item.state in (ItemState.FAILED, ItemState.STAYED)]
    if operation.kind is Kind.DRAIN and not missed:
        if passing := _passing(operation, facts):
            return _with(operation, State.RUNNING, "NODE_NOT_CLEAR", passing)
        if facts.retained:
            return _with(
                operation,
                State.RUNNING,
                "IMAGES_RETAINED",
                facts.retained,
                "it goes when its destination has all of it; see the node's migrations",
            )
    if missed and (stopping or operation.kind is not Kind.UNDRAIN or _any_failed(missed)):
        reason = "DEADLINE_EXCEEDED" if facts.expired else "VMS_NOT_MOVED"
        return _with(
            operation,
            State.FAILED,
            reason,
            f"{len(missed)} of {len(items)} VMs were not moved: "
            + ", ".join(item.vm_id for item in missed[:5]),
            "see what is said of each of them",
        )
    return _with(operation, State.SUCCEEDED, "", "")


def _any_failed(items: list[Item]) -> bool:
    return any(item.state is ItemState.FAILED for item in items)


def _passing(operation: Operation, facts: Facts) -> str:
    """Migrations that still have to do with the node, though none of its VMs is left to move."""
    found = [
        active.migration_id
        for active in facts.active.values()
        if operation.node in (active.source, active.target)
    ]
    return f"migration {found[0]} is not over" if found else ""


def _waits(operation: Operation, left: list[Item], facts: Facts) -> Operation:
    moving = any(item.state is ItemState.MOVING for item in left)
    if operation.state is State.CANCELLING:
        reason, message = "CANCELLING", "waits for moves past their decision to end"
    elif operation.paused:
        reason, message = "PAUSED", "admits no further move"
    elif not facts.window_open and not moving:
        reason, message = "OUTSIDE_WINDOW", f"waits for {', '.join(operation.options.windows)} UTC"
    elif all(
        (hold := facts.holds.get(item.migration_id)) is not None and hold.stuck for item in left
    ):
        item = left[0]
        return _with(
            operation, operation.state, item.reason, f"{item.vm_id}: {item.message}", item.hint
        )
    else:
        reason, message = "", ""
    return _with(operation, operation.state, reason, message)


def _with(
    operation: Operation, state: State, reason: str, message: str, hint: str = ""
) -> Operation:
    return replace(operation, state=state, reason=reason, message=message, hint=hint)
