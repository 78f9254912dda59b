# SPDX-License-Identifier: Apache-2.0
"""Operations as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from services.orchestrator.scheduling.model import Priority

RETRIES_DEFAULT = 3


class Kind(StrEnum):
    """What an operation does."""

    DRAIN = "drain"
    UNDRAIN = "undrain"
    REBALANCE = "rebalance"
    BATCH = "batch"


class State(StrEnum):
    """Where an operation stands."""

    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


class ItemState(StrEnum):
    """Where it stands with one VM."""

    WAITING = "waiting"
    MOVING = "moving"
    MOVED = "moved"
    FAILED = "failed"
    STAYED = "stayed"
    GONE = "gone"


OPEN = frozenset({ItemState.WAITING, ItemState.MOVING})
"""What is left to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an operation goes about it; godwit.fleet.v1.OperationOptions."""

    parallel_max: int = 0
    deadline_s: float = 0.0
    priority: Priority = Priority.MAINTENANCE
    retries: int = RETRIES_DEFAULT
    largest_first: bool = False
    windows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One, as last written."""

    operation_id: str
    kind: Kind
    node: str
    """Empty: none of its own."""
    state: State = State.RUNNING
    paused: bool = False
    options: Options = field(default_factory=Options)
    reason: str = ""
    message: str = ""
    hint: str = ""
    created_at_ns: int = 0
    ended_at_ns: int = 0
    version: int = 1

    @property
    def ended(self) -> bool:
        """It does nothing any more."""
        return self.state in ENDED


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One VM of an operation."""

    vm_id: str
    sequence: int
    source: str
    """Where it was when the operation took it up."""
    target: str = ""
    """Before it moved: where it shall go, empty: anywhere. After: where it went."""
    state: ItemState = ItemState.WAITING
    migration_id: str = ""
    attempts: int = 0
    reason: str = ""
    message: str = ""
    hint: str = ""
