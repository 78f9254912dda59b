# SPDX-License-Identifier: Apache-2.0
"""The JSON of REST: snake_case, enums as lower-case words, times RFC 3339, units in names."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import Header, Query
from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from godwit.common.v1 import common_pb2
from godwit.fleet.v1 import types_pb2, vm_service_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel, ConfigDict, Field

from services.common.vm_spec import VM_ID_PATTERN
from services.orchestrator.paging import PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX, TOKEN_LEN_MAX
from services.orchestrator.residency import POINT_COUNT_MAX

_PORT = r"([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5])"
_EPOCH_MAX = (1 << 53) - 1
"""What every JSON reader can tell from its neighbours."""

PageSize = Annotated[
    int,
    Query(ge=0, le=PAGE_SIZE_MAX, description=f"items at most; 0: {PAGE_SIZE_DEFAULT}"),
]
PageToken = Annotated[
    str, Query(max_length=TOKEN_LEN_MAX, description="next_page_token of the page before")
]

IdempotencyKey = Annotated[
    str,
    Header(
        max_length=255,
        description="draw one for each request, repeat it with the request: it is done once",
    ),
]

Name = Annotated[str, Field(pattern=VM_ID_PATTERN)]
"""Of a VM or a node."""


class Strict(BaseModel):
    """A request: unknown fields are refused, a misspelt option must not be ignored."""

    model_config = ConfigDict(extra="forbid")


class NodeRequest(Strict):
    """A node and where its agent listens."""

    name: Name
    agent_address: str = Field(
        description="host:port, [v6]:port",
        pattern=rf"^(\[[0-9A-Fa-f:.%\w]+\]|[^:\[\]\s/]+):{_PORT}$",
        max_length=255,
    )


class VmRequest(Strict):
    """A VM to start."""

    node: Name
    spec: dict[str, Any] = Field(description="docs/vm-spec.md")


class LinkLossPolicy(Strict):
    """What becomes of a guest that touches pages which cannot be fetched; docs/recovery.md."""

    freeze_after_ms: int = Field(
        default=0,
        ge=0,
        le=86_400_000,
        description="freeze the whole VMM once the guest has been held this long; 0 = never",
    )


class MigrationRequest(Strict):
    """A VM to move."""

    vm: Name
    destination_node: Name | Literal[""] = Field(
        default="", description="empty: the best when it is admitted"
    )
    priority: Literal["background", "maintenance", "user", "system"] | None = Field(
        default=None, description="what the policies say, or user"
    )
    bulk_bytes_per_s_max: int = Field(
        default=0, ge=0, le=1 << 50, description="limit of the bulk lane; 0 = none"
    )
    on_link_loss: LinkLossPolicy = LinkLossPolicy()


class AbandonRequest(Strict):
    """A guest to give up."""

    epoch: int = Field(ge=1, le=_EPOCH_MAX, description="the migration's, as it is shown")
    confirm: bool = Field(default=False, description="must be true")


class BreakGlassRequest(Strict):
    """A guest to give back without its destination's proof."""

    epoch: int = Field(ge=1, le=_EPOCH_MAX, description="the migration's, as it is shown")
    fenced_vm_id: str = Field(
        max_length=63, description="the guest's id: its destination is fenced, by your word"
    )
    operator: str = Field(
        min_length=1, max_length=100, description="who says so; stays in the history"
    )
    because: str = Field(min_length=1, max_length=500, description="why; stays in the history")


class Capabilities(BaseModel):
    """What a node can do."""

    kernel_release: str
    uffd_features: list[str]
    drivers: list[str]
    vmm_versions: dict[str, str]
    memory_total_bytes: int
    memory_available_bytes: int


class Node(BaseModel):
    """A node."""

    name: str
    agent_address: str
    reachable: bool
    message: str = Field(description="why it is not reachable; empty if it is")
    capabilities: Capabilities | None
    vm_ids: list[str]
    closed_by: str = Field(description="the operation that keeps it empty")
    labels: dict[str, str]
    taints: list[str]
    link: str = Field(description="the shared uplink behind which it is")
    placement_etag: str = Field(description="of labels, taints and link; for If-Match")

    @classmethod
    def of(cls, node: types_pb2.Node) -> Node:
        """From the message."""
        said = node.capabilities if node.HasField("capabilities") else None
        return cls(
            name=node.name,
            agent_address=node.agent_address,
            reachable=node.reachable,
            message=node.message,
            capabilities=said
            and Capabilities(
                kernel_release=said.kernel_release,
                uffd_features=list(said.uffd_features),
                drivers=list(said.drivers),
                vmm_versions=dict(said.vmm_versions),
                memory_total_bytes=said.memory_total_bytes,
                memory_available_bytes=said.memory_available_bytes,
            ),
            vm_ids=list(node.vm_ids),
            closed_by=node.closed_by,
            labels=dict(node.labels),
            taints=list(node.taints),
            link=node.link,
            placement_etag=node.placement_etag,
        )


NEXT_PAGE_TOKEN = Field(description="page_token of the next page; empty at the end")


class Nodes(BaseModel):
    """A page of the nodes, by name."""

    nodes: list[Node]
    next_page_token: str = NEXT_PAGE_TOKEN


class VmPlacement(BaseModel):
    """Where a VM may be, beside what its spec needs."""

    selector: dict[str, str] = Field(default={}, description="labels that its node must have")
    tolerations: list[str] = Field(default=[], description="taints that do not keep it away")
    apart: str = Field(default="", description="no node has two VMs with the same word")
    near: str = Field(default="", description="better where VMs with the same word are")
    group: str = Field(default="", description="the limit `group` counts their moves together")


class Vm(BaseModel):
    """A VM."""

    vm_id: str
    node: str = Field(description="the owner")
    epoch: int = Field(description="under which it owns the VM")
    spec_hash: str
    memory_bytes: int
    migration_id: str | None = Field(description="the migration under way")
    resident_share: float = Field(description="pages that are where it runs, 0..1")
    vmm_state: str = Field(description="what its VMM does, as its agent said last")
    labels: dict[str, str]
    placement: VmPlacement
    placement_etag: str = Field(description="of labels and placement; for If-Match")

    @classmethod
    def of(cls, vm: types_pb2.Vm) -> Vm:
        """From the message."""
        return cls(
            vm_id=vm.vm_id,
            node=vm.node,
            epoch=vm.epoch,
            spec_hash=vm.spec_hash,
            memory_bytes=vm.memory_bytes,
            migration_id=vm.migration_id or None,
            resident_share=vm.resident_share,
            vmm_state=_word(agent_pb2.VmmState.Name(vm.vmm_state), "VMM_STATE_"),
            labels=dict(vm.labels),
            placement_etag=vm.placement_etag,
            placement=VmPlacement(
                selector=dict(vm.placement.selector),
                tolerations=list(vm.placement.tolerations),
                apart=vm.placement.apart,
                near=vm.placement.near,
                group=vm.placement.group,
            ),
        )


class Vms(BaseModel):
    """A page of the VMs, by id."""

    vms: list[Vm]
    next_page_token: str = NEXT_PAGE_TOKEN


class UserfaultBitmap(BaseModel):
    """Which pages are not yet where the VM runs. A set bit is an absent page."""

    vm_id: str
    epoch: int
    page_count: int
    absent_count: int
    resident_share: float = Field(description="0..1")
    resident_percent: float = Field(description="0..100")
    page_size_bytes: int
    absent_runs: list[Annotated[list[int], Field(min_length=2, max_length=2)]] = Field(
        description="[first page, how many], ascending, from page_token on"
    )
    next_page_token: str = NEXT_PAGE_TOKEN

    @classmethod
    def of(cls, bitmap: vm_service_pb2.GetUserfaultBitmapResponse) -> UserfaultBitmap:
        """From the message."""
        return cls(
            vm_id=bitmap.vm_id,
            epoch=bitmap.epoch,
            page_count=bitmap.page_count,
            absent_count=bitmap.absent_count,
            resident_share=bitmap.resident_share,
            # Rounded down: 100 means all of them.
            resident_percent=int(bitmap.resident_share * 1e4) / 100,
            page_size_bytes=bitmap.page_size_bytes,
            absent_runs=[[run.first_page, run.page_count] for run in bitmap.absent_runs],
            next_page_token=bitmap.next_page_token,
        )


class ResidencyPoint(BaseModel):
    """What was absent at a moment."""

    at: datetime
    absent_count: int


class Residency(BaseModel):
    """How many pages were absent over the time of a VM's last arrival, as the leader saw it."""

    vm_id: str
    epoch: int
    page_count: int
    points: list[ResidencyPoint] = Field(
        max_length=POINT_COUNT_MAX, description="in order, the newest last"
    )

    @classmethod
    def of(cls, residency: vm_service_pb2.GetResidencyResponse) -> Residency:
        """From the message."""
        return cls(
            vm_id=residency.vm_id,
            epoch=residency.epoch,
            page_count=residency.page_count,
            points=[
                ResidencyPoint(at=_time(point.at), absent_count=point.absent_count)
                for point in residency.points
            ],
        )


class FaultLatency(BaseModel):
    """From the fault event to the wake."""

    sample_count: int
    p50_ns: int
    p99_ns: int
    p999_ns: int
    max_ns: int


class Hold(BaseModel):
    """A time in which no page could be had while the guest ran."""

    number: int = Field(description="counts the outages of an arrival")
    cause: str = Field(description="link_lost, page_server, agent_restart or no_memory")
    outage_ns: int
    held_ns: int = Field(description="how long the guest waited; 0: nobody did")

    @classmethod
    def of(cls, hold: common_pb2.Hold) -> Hold:
        """From the message."""
        return cls(
            number=hold.number,
            cause=_word(common_pb2.HoldCause.Name(hold.cause), "HOLD_CAUSE_"),
            outage_ns=hold.outage_ns,
            held_ns=hold.held_ns,
        )


class Counters(BaseModel):
    """How the memory arrives."""

    page_count: int
    absent_count: int
    demand_page_count: int
    bulk_page_count: int
    zero_page_count: int
    removed_page_count: int
    fault_count: int
    received_bytes: int
    checksum_error_count: int
    reconnect_count: int
    violation_count: int
    fault_latency: FaultLatency
    held_total_ns: int = Field(description="how long the guest was held by outages")
    holds: list[Hold] = Field(description="the last outages that are over")
    hold_now: Hold | None = Field(description="the outage that lasts")

    @classmethod
    def of(cls, counters: common_pb2.ArrivalCounters) -> Counters:
        """From the message."""
        latency = FaultLatency(
            **{name: getattr(counters.fault_latency, name) for name in FaultLatency.model_fields}
        )
        built = ("fault_latency", "holds", "hold_now")
        rest = {name: getattr(counters, name) for name in cls.model_fields if name not in built}
        return cls(
            **rest,
            fault_latency=latency,
            holds=[Hold.of(hold) for hold in counters.holds],
            hold_now=Hold.of(counters.hold_now) if counters.HasField("hold_now") else None,
        )


class PhaseTransition(BaseModel):
    """A phase that was entered."""

    phase: str
    at: datetime
    message: str


class MigrationEvent(BaseModel):
    """Something that an operator will want explained; docs/recovery.md lists the kinds."""

    sequence: int = Field(description="a gap says how many were left out")
    at: datetime
    kind: str
    node: str
    message: str = Field(description="what happened")
    action: str = Field(description="what is done about it by itself")
    hint: str = Field(description="what an operator can do")
    duration_ns: int = Field(description="how long it lasted, where something is over")
    held_ns: int = Field(description="how long the guest was held by it")
    evidence: list[str] = Field(description="what each node could prove")


def mode_word(mode: types_pb2.MigrationMode.ValueType) -> str | None:
    """As JSON has it; None: not set."""
    word = types_pb2.MigrationMode.Name(mode).removeprefix("MIGRATION_MODE_")
    return word.lower().replace("_", "-") if mode else None


class EffectivePolicy(BaseModel):
    """What counted for one migration, from whichever policies; null: none said anything."""

    priority: str | None
    bulk_bytes_per_s_max: int | None
    freeze_after_ms: int | None
    pause_ms_max: int | None
    prepare_s_per_gib: float | None
    retries: int | None
    mode: str | None

    @classmethod
    def of(cls, policy: types_pb2.EffectivePolicy) -> EffectivePolicy:
        """From the message."""

        def said(name: Any) -> Any:
            return getattr(policy, name) if policy.HasField(name) else None

        priority = types_pb2.Priority.Name(policy.priority).removeprefix("PRIORITY_").lower()
        return cls(
            priority=priority if policy.priority else None,
            bulk_bytes_per_s_max=said("bulk_bytes_per_s_max"),
            freeze_after_ms=said("freeze_after_ms"),
            pause_ms_max=said("pause_ms_max"),
            prepare_s_per_gib=said("prepare_s_per_gib"),
            retries=said("retries"),
            mode=mode_word(policy.mode),
        )


class Migration(BaseModel):
    """One attempt to move one VM."""

    migration_id: str
    vm_id: str
    source_node: str
    destination_node: str
    phase: str
    decision: str | None = Field(
        description="committed or aborted, once it was taken; after committed: returned or lost"
    )
    epoch: int = Field(description="the destination's; 0 until it was issued")
    reason: str = Field(description="of the last failure or wait; empty if there is none")
    message: str
    hint: str
    created_at: datetime
    ended_at: datetime | None
    pause_ns: int = Field(description="an upper bound of the guest's pause; 0 = not yet")
    total_ns: int = Field(description="from pending until succeeded; 0 = not yet")
    counters: Counters | None
    progress: float = Field(description="0..1, never falls")
    transitions: list[PhaseTransition]
    cancel_requested: bool
    traceparent: str
    version: int = Field(description="changes with every write")
    return_epoch: int = Field(description="under which its source gets it back; 0 = it does not")
    events: list[MigrationEvent] = Field(description="empty in lists")
    on_link_loss: LinkLossPolicy
    because: str = Field(description="why the destination was chosen; empty in lists")
    policies: list[str] = Field(description="that counted; empty in lists")
    operation_id: str = Field(description="that asked for it; empty in lists")
    attempt: int = Field(description="which try of the move it is, from 1; 0 in lists")
    retry_of: str = Field(description="the one that failed and was tried again as this")
    policy: EffectivePolicy | None = Field(description="what the policies said; null in lists")

    @classmethod
    def of(cls, migration: types_pb2.Migration) -> Migration:
        """From the message."""
        return cls(
            migration_id=migration.migration_id,
            vm_id=migration.vm_id,
            source_node=migration.source_node,
            destination_node=migration.destination_node,
            phase=_phase(migration.phase),
            decision=_word(common_pb2.Decision.Name(migration.decision), "DECISION_")
            if migration.decision
            else None,
            epoch=migration.epoch,
            reason=migration.reason,
            message=migration.message,
            hint=migration.hint,
            created_at=_time(migration.created_at),
            ended_at=_time(migration.ended_at) if migration.HasField("ended_at") else None,
            pause_ns=migration.pause_ns,
            total_ns=migration.total_ns,
            counters=Counters.of(migration.counters) if migration.HasField("counters") else None,
            progress=migration.progress,
            transitions=[
                PhaseTransition(phase=_phase(each.phase), at=_time(each.at), message=each.message)
                for each in migration.transitions
            ],
            cancel_requested=migration.cancel_requested,
            traceparent=migration.traceparent,
            version=migration.version,
            return_epoch=migration.return_epoch,
            events=[
                MigrationEvent(
                    **{
                        name: getattr(each, name)
                        for name in MigrationEvent.model_fields
                        if name not in ("at", "evidence")
                    },
                    at=_time(each.at),
                    evidence=list(each.evidence),
                )
                for each in migration.events
            ],
            on_link_loss=LinkLossPolicy(freeze_after_ms=migration.on_link_loss.freeze_after_ms),
            because=migration.because,
            policies=list(migration.policies),
            operation_id=migration.operation_id,
            attempt=migration.attempt,
            retry_of=migration.retry_of,
            policy=EffectivePolicy.of(migration.policy) if migration.HasField("policy") else None,
        )


class Recovery(BaseModel):
    """What a look at both nodes has found."""

    migration: Migration
    findings: list[str] = Field(description="what each node can prove, and what is missing")


class Migrations(BaseModel):
    """A page of migrations, the newest first."""

    migrations: list[Migration]
    next_page_token: str = Field(description="for page_token; empty at the end")


class Health(BaseModel):
    """How the process is."""

    status: str


class Readiness(BaseModel):
    """Whether the process can be asked, and who leads."""

    status: str = Field(description="ready")
    leads: bool = Field(description="false: it stands by: it answers, and refuses changes")
    leader: str = Field(description="who leads; empty: nobody, or it is not known yet")
    leader_rest: str = Field(description="HOST:PORT of its REST, as far as it is known")
    leader_grpc: str
    term: int = Field(description="raised whenever another one leads")
    hindrance: str = Field(description="why nobody can lead; empty: nothing is known against it")


def _word(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()


def _phase(phase: types_pb2.MigrationPhase.ValueType) -> str:
    return _word(types_pb2.MigrationPhase.Name(phase), "MIGRATION_PHASE_")


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)
