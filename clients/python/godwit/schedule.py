# SPDX-License-Identifier: Apache-2.0
"""Queue, limits, policies, placement: what the API says of them, and its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from godwit.calls import Call, part, read_list, read_nothing
from godwit.models import Model, Node, Vm, with_many


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueEntry(Model):
    """A migration that waits for admission; `reason` and `message` say what holds it."""

    migration_id: str = ""
    vm_id: str = ""
    source_node: str = ""
    destination_node: str = ""
    priority: str = ""
    place: int = 0
    reason: str = ""
    message: str = ""
    hint: str = ""
    operation_id: str = ""
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue(Model):
    """What waits, in order. `frozen`: why nothing is admitted; empty while it is."""

    entries: tuple[QueueEntry, ...] = ()
    frozen: str = ""

    @classmethod
    def _converted(cls, values: dict[str, Any]) -> dict[str, Any]:
        return with_many(values, entries=QueueEntry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit(Model):
    """How many moves may be under way at a time, and how many are."""

    key: str = ""
    value: int = 0
    used: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(Model):
    """How the VMs that it picks are moved. None: it says nothing."""

    name: str = ""
    match_labels: Mapping[str, str] | None = None
    priority: str | None = None
    bulk_bytes_per_s_max: int | None = None
    freeze_after_ms: int | None = None
    pause_ms_max: int | None = None
    prepare_s_per_gib: float | None = None
    retries: int | None = None
    mode: str | None = None
    etag: str = ""


def get_queue() -> Call[Queue]:
    """What waits for admission."""
    return Call(method="GET", path="/v1/queue", read=Queue.from_json, items="entries")


def freeze(because: str) -> Call[None]:
    """The emergency stop: nothing is admitted any more; what was goes on."""
    body = {"because": because}
    return Call(method="POST", path="/v1/queue:freeze", body=body, read=read_nothing)


def thaw() -> Call[None]:
    """Its end."""
    return Call(method="POST", path="/v1/queue:thaw", read=read_nothing)


def get_limits() -> Call[list[Limit]]:
    """The limits, and what is used of each."""
    read = partial(read_list, "limits", Limit.from_json)
    return Call(method="GET", path="/v1/limits", read=read, items="limits")


def set_limits(values: Mapping[str, int], remove: Sequence[str] = ()) -> Call[list[Limit]]:
    """Change limits, at once; `remove`: keys such as node-in:b that get their kind's again.

    Answered with the first page of the limits.
    """
    return Call(
        method="PATCH",
        path="/v1/limits",
        body={"values": dict(values), "remove": list(remove)},
        read=partial(read_list, "limits", Limit.from_json),
    )


def list_policies() -> Call[list[Policy]]:
    """All of them, by name."""
    read = partial(read_list, "policies", Policy.from_json)
    return Call(method="GET", path="/v1/policies", read=read, items="policies")


def put_policy(name: str, settings: Mapping[str, Any]) -> Call[Policy]:
    """Write one whole; `settings` as Policy has them."""
    path = f"/v1/policies/{part(name)}"
    return Call(method="PUT", path=path, body=dict(settings), read=Policy.from_json)


def delete_policy(name: str) -> Call[None]:
    """Remove one."""
    return Call(method="DELETE", path=f"/v1/policies/{part(name)}", read=read_nothing)


def place_node(
    name: str, *, labels: Mapping[str, str], taints: Sequence[str] = (), link: str = ""
) -> Call[Node]:
    """Say what a node is for placement; replaces what was said."""
    body = {"labels": dict(labels), "taints": list(taints), "link": link}
    path = f"/v1/nodes/{part(name)}/placement"
    return Call(method="PUT", path=path, body=body, read=Node.from_json)


def place_vm(vm_id: str, *, labels: Mapping[str, str], placement: Mapping[str, Any]) -> Call[Vm]:
    """Say where a VM may be; replaces what was said."""
    body = {"labels": dict(labels), "placement": dict(placement)}
    path = f"/v1/vms/{part(vm_id)}/placement"
    return Call(method="PUT", path=path, body=body, read=Vm.from_json)
