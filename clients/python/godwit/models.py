# SPDX-License-Identifier: Apache-2.0
"""What the API speaks of, as values. Field by field protos/godwit/fleet/v1/types.proto.

Reading is tolerant: fields that this release does not know are left alone, missing ones have the
default, and words of an enum that it does not know stay the words they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from datetime import datetime
from enum import StrEnum
from typing import Any, Self


class MigrationPhase(StrEnum):
    """Phases that this release knows; each equals its word, as `migration.phase` has it."""

    PENDING = "pending"
    VALIDATING = "validating"
    RESERVING = "reserving"
    PREPARING = "preparing"
    READY = "ready"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    COMMITTED = "committed"
    POSTCOPY = "postcopy"
    POSTCOPY_PAUSED = "postcopy_paused"
    RECOVERING = "recovering"
    FINALIZING = "finalizing"
    SUCCEEDED = "succeeded"
    CANCELLING = "cancelling"
    ROLLING_BACK = "rolling_back"
    ABORTED = "aborted"
    CANCELLED = "cancelled"
    FAILED = "failed"
    NEEDS_ATTENTION = "needs_attention"
    LOST = "lost"
    GIVING_BACK = "giving_back"
    GIVEN_BACK = "given_back"
    RETURNED = "returned"


TERMINAL_PHASES = frozenset(
    {
        MigrationPhase.SUCCEEDED,
        MigrationPhase.CANCELLED,
        MigrationPhase.FAILED,
        MigrationPhase.LOST,
        MigrationPhase.RETURNED,
    }
)
"""Phases that are never left."""


class Model:
    """A dataclass that reads itself from JSON; all its fields have defaults."""

    __slots__ = ()

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read an object; anything else is an object without fields."""
        if not isinstance(data, Mapping):
            data = {}
        defaults = {item.name: item.default for item in fields(cls)}  # type: ignore[arg-type]
        said = {key: value for key, value in data.items() if key in defaults and value is not None}
        read = cls._converted(said)
        return cls(**{key: value for key, value in read.items() if _is_like(value, defaults[key])})

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySummary(Model):
    """A distribution; with sample_count 0 the rest says nothing. Nanoseconds."""

    sample_count: int = 0
    p50_ns: int = 0
    p99_ns: int = 0
    p999_ns: int = 0
    max_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold(Model):
    """A time in which no page could be had while the guest ran.

    Attributes:
        number: counts the outages of an arrival, from 1.
        cause: a word: link_lost, page_server, agent_restart, no_memory.
        outage_ns: how long no page could be had.
        held_ns: how long the guest waited; 0: nobody did.
    """

    number: int = 0
    cause: str = ""
    outage_ns: int = 0
    held_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalCounters(Model):
    """How a guest's memory arrives. Pages unless the name says otherwise.

    Attributes:
        page_count: of the guest.
        absent_count: not there yet.
        demand_page_count: came because a vCPU or the VMM waited.
        bulk_page_count: came in the background.
        zero_page_count: zeros, of which no bytes came.
        removed_page_count: given back by the guest while in flight.
        fault_count: faults seen, further waiters on the same page included.
        received_bytes: page bytes received.
        checksum_error_count: messages fetched again for their checksum.
        reconnect_count: connections made again.
        violation_count: broken invariants; anything but 0 wants a person.
        fault_latency: from a fault to its wake.
        held_total_ns: how long the guest was held by outages.
        holds: the last outages that are over.
        hold_now: the outage that lasts; None: pages can be had.
    """

    page_count: int = 0
    absent_count: int = 0
    demand_page_count: int = 0
    bulk_page_count: int = 0
    zero_page_count: int = 0
    removed_page_count: int = 0
    fault_count: int = 0
    received_bytes: int = 0
    checksum_error_count: int = 0
    reconnect_count: int = 0
    violation_count: int = 0
    fault_latency: LatencySummary = LatencySummary()
    held_total_ns: int = 0
    holds: tuple[Hold, ...] = ()
    hold_now: Hold | None = None

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_many(with_one(values, fault_latency=LatencySummary, hold_now=Hold), holds=Hold)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTransition(Model):
    """A phase entered, when, and why in words. `at` by the orchestrator's clock."""

    phase: str = ""
    at: datetime | None = None
    message: str = ""

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_times(values, "at")


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationEvent(Model):
    """Something that happened to a migration; docs/recovery.md lists the kinds.

    Attributes:
        sequence: counts from 1; a gap says how many were left out.
        at: by the orchestrator's clock.
        message: what happened; `action` what is done about it by itself, `hint` what you can do.
        duration_ns: how long it lasted, where something is over.
        held_ns: how long the guest was held by it.
        evidence: what each node could prove, where a person is needed.
    """

    sequence: int = 0
    at: datetime | None = None
    kind: str = ""
    node: str = ""
    message: str = ""
    action: str = ""
    hint: str = ""
    duration_ns: int = 0
    held_ns: int = 0
    evidence: tuple[str, ...] = ()

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**with_times(values, "at"), "evidence": tuple(_list(values.get("evidence")))}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLossPolicy(Model):
    """Freeze a guest once it has been held that long; 0: never."""

    freeze_after_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration(Model):
    """One attempt to move one VM.

    Attributes:
        phase: a word; see MigrationPhase.
        decision: "committed", "aborted", or "unspecified" until the store has decided.
        epoch: the destination's; 0 = not reserved yet.
        reason: stable code of the last failure or wait; `message` in words, `hint` what to do.
        pause_ns: from the stop of the vCPUs until they run again; 0 = not yet.
        total_ns: from the request until SUCCEEDED; 0 = not yet.
        counters: how the memory arrives; None before PREPARING.
        progress: 0..1, never falls.
        version: rises with every write.
        return_epoch: under which its source gets the guest back; 0 = it does not.
        events: what happened, in words; empty in lists.
        on_link_loss: what is done with the guest when its pages cannot be fetched.
    """

    migration_id: str = ""
    vm_id: str = ""
    source_node: str = ""
    destination_node: str = ""
    phase: str = ""
    decision: str = ""
    epoch: int = 0
    reason: str = ""
    message: str = ""
    hint: str = ""
    created_at: datetime | None = None
    ended_at: datetime | None = None
    pause_ns: int = 0
    total_ns: int = 0
    counters: ArrivalCounters | None = None
    progress: float = 0.0
    transitions: tuple[PhaseTransition, ...] = ()
    cancel_requested: bool = False
    traceparent: str = ""
    version: int = 0
    return_epoch: int = 0
    events: tuple[MigrationEvent, ...] = ()
    on_link_loss: LinkLossPolicy = LinkLossPolicy()
    because: str = ""
    policies: tuple[str, ...] = ()
    operation_id: str = ""
    attempt: int = 0
    retry_of: str = ""

    @property
    def is_terminal(self) -> bool:
        """True if its phase is never left."""
        return self.phase in TERMINAL_PHASES

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = with_one(values, counters=ArrivalCounters, on_link_loss=LinkLossPolicy)
        values = with_times(values, "created_at", "ended_at")
        values = {**values, "policies": tuple(_list(values.get("policies")))}
        return with_many(values, transitions=PhaseTransition, events=MigrationEvent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery(Model):
    """What a look at both nodes has found, in words, and the migration as it is now."""

    migration: Migration = Migration()
    findings: tuple[str, ...] = ()

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = with_one(values, migration=Migration)
        return values | {"findings": tuple(str(line) for line in _list(values.get("findings")))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities(Model):
    """What a node can do, as its agent said last."""

    kernel_release: str = ""
    uffd_features: tuple[str, ...] = ()
    drivers: tuple[str, ...] = ()
    vmm_versions: Mapping[str, str] | None = None
    memory_total_bytes: int = 0
    memory_available_bytes: int = 0

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {
            **values,
            **{name: tuple(_list(values.get(name))) for name in ("uffd_features", "drivers")},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Node(Model):
    """A node of the fleet and its agent; `message` says why it cannot be reached."""

    name: str = ""
    agent_address: str = ""
    reachable: bool = False
    message: str = ""
    capabilities: Capabilities | None = None
    vm_ids: tuple[str, ...] = ()
    closed_by: str = ""
    labels: Mapping[str, str] | None = None
    taints: tuple[str, ...] = ()
    link: str = ""
    placement_etag: str = ""

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = with_one(values, capabilities=Capabilities)
        words = {name: tuple(_list(values.get(name))) for name in ("vm_ids", "taints")}
        return {**values, **words}


@dataclass(frozen=True, slots=True, kw_only=True)
class Vm(Model):
    """A virtual machine.

    Attributes:
        node: the node that owns it, under `epoch`.
        memory_bytes: its memory.
        migration_id: the migration under way, or "".
        resident_share: of its pages, 0..1.
        vmm_state: a word: running, paused, incoming, dead, unresponsive, guest_ended.
    """

    vm_id: str = ""
    node: str = ""
    epoch: int = 0
    spec_hash: str = ""
    memory_bytes: int = 0
    migration_id: str = ""
    resident_share: float = 0.0
    vmm_state: str = ""
    labels: Mapping[str, str] | None = None
    placement: Mapping[str, Any] | None = None
    placement_etag: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserfaultBitmap(Model):
    """Which pages of a VM are not yet where it runs.

    Attributes:
        absent_runs: (first page, page count), ascending.
        resident_share: 0..1; resident_percent is the same times 100.
    """

    vm_id: str = ""
    epoch: int = 0
    page_count: int = 0
    absent_count: int = 0
    resident_share: float = 0.0
    resident_percent: float = 0.0
    page_size_bytes: int = 4096
    absent_runs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        runs = tuple((int(first), int(count)) for first, count in _list(values.get("absent_runs")))
        return {**values, "absent_runs": runs}


def _is_like(value: Any, default: Any) -> bool:
    """What is of another kind than it should be is as good as missing."""
    if default is None or default is MISSING or value is None:
        return True
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, bool) != isinstance(value, bool):
        return False
    return isinstance(value, type(default))


def with_one(values: dict[str, Any], **models: type[Model]) -> dict[str, Any]:
    """Objects become the models named."""
    read = {name: model.from_json(values[name]) for name, model in models.items() if name in values}
    return {**values, **read}


def with_many(values: dict[str, Any], **models: type[Model]) -> dict[str, Any]:
    """Lists of objects become tuples of the models named."""
    read = {
        name: tuple(model.from_json(item) for item in _list(values.get(name)))
        for name, model in models.items()
    }
    return {**values, **read}


def with_times(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """RFC 3339 text becomes a datetime; "" is no time."""
    return {**values, **{name: _time(values[name]) for name in names if name in values}}


def _time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except (ValueError, TypeError):
        return None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
