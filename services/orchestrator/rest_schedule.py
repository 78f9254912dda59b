# SPDX-License-Identifier: Apache-2.0
"""REST of the queue, limits, policies and placement: /v1/queue, /v1/limits, /v1/policies."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Header, Response
from godwit.fleet.v1 import schedule_service_pb2 as pb
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from pydantic import BaseModel, BeforeValidator, Field

from services.orchestrator import problems, rest_models
from services.orchestrator.fleet import Fleet
from services.orchestrator.rest_models import PageSize, PageToken, Strict


def _word(text: object) -> object:
    """PRIORITY_USER → user; "" for what is not set."""
    name = str(text).partition("_")[2].lower()
    return "" if name == "unspecified" else name


Priority = Literal["background", "maintenance", "user", "system"]
PriorityWord = Annotated[str, BeforeValidator(_word)]


class FromMessage(BaseModel):
    """An answer, field by field the message of the proto."""

    @classmethod
    def of(cls, message: Message) -> Self:
        """From the message."""
        return cls.model_validate(as_fields(message))


def as_fields(message: Message) -> dict[str, Any]:
    """The message's fields by their own names, unset ones with their defaults."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


class QueueEntry(FromMessage):
    """A migration that waits for admission."""

    migration_id: str
    vm_id: str
    source_node: str
    destination_node: str = Field(description="the node asked for; empty: any")
    priority: PriorityWord
    place: int = Field(description="from 1")
    reason: str = Field(description="what holds it; stable code")
    message: str
    hint: str
    operation_id: str
    waited_s: float


class Queue(FromMessage):
    """What waits for admission, in order."""

    entries: list[QueueEntry]
    frozen: str = Field(description="why admissions are frozen; empty while they are not")
    next_page_token: str = Field(
        description="page_token of the next page; it names a place: what moves up or down in"
        " between may be told twice, or not"
    )


class FreezeRequest(Strict, strict=True):
    """Stop admissions."""

    because: str = Field(min_length=1, max_length=200, description="shown to everybody who waits")


class Limit(FromMessage):
    """How many moves may be under way at a time."""

    key: str = Field(description="a kind, or KIND:NAME for one node, link or group")
    value: int
    used: int


class Limits(FromMessage):
    """A page: kinds first, then what was set for one, and what is used."""

    limits: list[Limit]
    next_page_token: str = rest_models.NEXT_PAGE_TOKEN
    etag: str = Field(description="of all that is set, whatever the page; for If-Match")


class LimitsRequest(Strict, strict=True):
    """Change limits."""

    values: dict[str, int] = Field(default={}, description="by key, e.g. node-in or node-in:b")
    remove: list[str] = Field(default=[], description="keys that shall have their kind's value")


class PolicySettings(Strict, strict=True):
    """What counts for the VMs that a policy picks. Absent: nothing is said."""

    match_labels: dict[str, str] = Field(default={}, description="a VM has all; none: every VM")
    priority: Priority | None = None
    bulk_bytes_per_s_max: int | None = Field(default=None, ge=0, le=1 << 50)
    freeze_after_ms: int | None = Field(default=None, ge=0, le=86_400_000)
    pause_ms_max: int | None = Field(default=None, ge=1, le=60_000)
    prepare_s_per_gib: float | None = Field(default=None, ge=0, le=3600)
    retries: int | None = Field(
        default=None, ge=0, le=100, description="of a migration that failed, each after a back-off"
    )
    mode: Literal["post-copy", "pre-copy", "hybrid"] | None = Field(
        default=None, description="all but post-copy are refused: they are not there yet"
    )


class Policy(PolicySettings, strict=False):
    """A policy."""

    name: str
    etag: str = Field(description="changes with it; for If-Match")

    @classmethod
    def of(cls, message: pb.Policy) -> Self:
        """From the message."""
        said = as_fields(message)
        said["priority"] = _word(said["priority"]) or None
        said["mode"] = rest_models.mode_word(message.mode)
        return cls.model_validate(said)


class Policies(BaseModel):
    """A page of them, by name."""

    policies: list[Policy]
    next_page_token: str = rest_models.NEXT_PAGE_TOKEN


class NodePlacementRequest(Strict, strict=True):
    """What a node is for placement."""

    labels: dict[str, str] = Field(default={}, description="what selectors pick by")
    taints: list[str] = Field(default=[], description="only VMs that tolerate all are placed here")
    link: str = Field(default="", description="the shared uplink behind which it is")


class VmPlacement(rest_models.VmPlacement, Strict):
    """Where a VM may be."""


class VmPlacementRequest(Strict):
    """What is said of a VM."""

    labels: dict[str, str] = Field(default={}, description="what policies pick by")
    placement: VmPlacement = VmPlacement()


def message_of(message: type[Message], body: BaseModel, **more: Any) -> Any:
    """A request message with the fields of a body; what is absent stays unset."""
    fields = body.model_dump(exclude_none=True) | more
    if word := fields.get("priority"):
        fields["priority"] = f"PRIORITY_{word.upper()}"
    if word := fields.get("mode"):
        fields["mode"] = f"MIGRATION_MODE_{word.upper().replace('-', '_')}"
    return message(**fields)


IfMatch = Annotated[
    str,
    Header(
        alias="If-Match",
        max_length=200,
        description="the etag that was read: 412 ETAG_MISMATCH if it has been changed since",
    ),
]


def schedule(fleet: Fleet) -> APIRouter:
    """Queue, limits and policies."""
    router = APIRouter(prefix="/v1", tags=["schedule"], responses=problems.RESPONSES)
    scheduling = fleet.scheduling

    def limits_of(now: pb.GetLimitsResponse, response: Response) -> Limits:
        response.headers["ETag"] = now.etag
        return Limits.of(now)

    @router.get("/queue")
    async def get_queue(page_size: PageSize = 0, page_token: PageToken = "") -> Queue:
        return Queue.of(await scheduling.queue(page_size=page_size, page_token=page_token))

    @router.post("/queue:freeze", status_code=204)
    async def freeze_admissions(body: FreezeRequest) -> None:
        await scheduling.freeze(body.because)

    @router.post("/queue:thaw", status_code=204)
    async def thaw_admissions() -> None:
        await scheduling.thaw()

    @router.get("/limits")
    async def get_limits(
        response: Response, page_size: PageSize = 0, page_token: PageToken = ""
    ) -> Limits:
        now = await scheduling.limits(page_size=page_size, page_token=page_token)
        return limits_of(now, response)

    @router.patch("/limits")
    async def set_limits(body: LimitsRequest, response: Response, if_match: IfMatch = "") -> Limits:
        now = await scheduling.set_limits(body.values, body.remove, etag=if_match)
        return limits_of(now, response)

    @router.get("/policies")
    async def list_policies(page_size: PageSize = 0, page_token: PageToken = "") -> Policies:
        found, token = await scheduling.policies(page_size=page_size, page_token=page_token)
        return Policies(policies=[Policy.of(each) for each in found], next_page_token=token)

    @router.put("/policies/{name}")
    async def put_policy(
        name: str, body: PolicySettings, response: Response, if_match: IfMatch = ""
    ) -> Policy:
        given = message_of(pb.Policy, body, name=name, etag=if_match)
        policy = Policy.of(await scheduling.put_policy(given))
        response.headers["ETag"] = policy.etag
        return policy

    @router.delete("/policies/{name}", status_code=204)
    async def delete_policy(name: str, if_match: IfMatch = "") -> None:
        await scheduling.delete_policy(name, etag=if_match)

    @router.put("/nodes/{name}/placement")
    async def set_node_placement(
        name: str, body: NodePlacementRequest, response: Response, if_match: IfMatch = ""
    ) -> rest_models.Node:
        request = message_of(pb.SetNodePlacementRequest, body, name=name, etag=if_match)
        await scheduling.set_node_placement(request)
        node = rest_models.Node.of(await fleet.get_node(name))
        response.headers["ETag"] = node.placement_etag
        return node

    @router.put("/vms/{vm}/placement")
    async def set_vm_placement(
        vm: str, body: VmPlacementRequest, response: Response, if_match: IfMatch = ""
    ) -> rest_models.Vm:
        request = message_of(pb.SetVmPlacementRequest, body, vm_id=vm, etag=if_match)
        await scheduling.set_vm_placement(request)
        found = rest_models.Vm.of(await fleet.get_vm(vm))
        response.headers["ETag"] = found.placement_etag
        return found

    return router
