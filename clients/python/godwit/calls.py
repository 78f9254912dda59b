# SPDX-License-Identifier: Apache-2.0
"""The REST calls as values, so that the sync and the async client cannot differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

from godwit.models import Migration, Node, Recovery, UserfaultBitmap, Vm

ValueT = TypeVar("ValueT")
_ItemT = TypeVar("_ItemT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[ValueT]):
    """One request, and how its answer is read.

    Attributes:
        body: JSON, or None for no body.
        read: the decoded answer in, the value out.
        items: of a list that comes by pages: the key of its items.
        headers: beside those of every call.
    """

    method: str
    path: str
    read: Callable[[Any], ValueT]
    body: Mapping[str, Any] | None = None
    query: Mapping[str, str] | None = None
    items: str = ""
    headers: Mapping[str, str] | None = None

    def matching(self, etag: str) -> Call[ValueT]:
        """The same, done only if what it changes is as it was read: else ETAG_MISMATCH."""
        return replace(self, headers={**(self.headers or {}), "If-Match": etag})

    def once(self, key: str) -> Call[ValueT]:
        """The same under an idempotency key: repeated with it, it is answered and not done again.

        Draw a new key for each thing that shall happen; it is remembered for a day.
        """
        return replace(self, headers={**(self.headers or {}), "Idempotency-Key": key})

    def first(self, count: int) -> Call[ValueT]:
        """The same, of so many items at most; 0: as many as there are."""
        if not 0 < count < PAGE_SIZE_DEFAULT:
            return self
        return replace(self, query={**(self.query or {}), "page_size": str(count)})

    def after(self, token: str) -> Call[ValueT]:
        """The same of the next page."""
        more = {"page_token": token, "page_size": str(PAGE_SIZE_MAX)}
        if self.items == RUNS:
            del more["page_size"]
        return replace(self, query={**(self.query or {}), **more})


PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000
RUNS = "absent_runs"


def next_page(data: Any) -> str:
    """The token of the page after an answer; empty at the end, and of a server without pages."""
    return str(data.get("next_page_token") or "") if isinstance(data, dict) else ""


def joined(call: Call[ValueT], pages: Sequence[Any], count: int = 0) -> Answer[ValueT]:
    """Pages of one list as one answer, of `count` items if that is given.

    What stands beside the items is the last page's.
    """
    items = [item for page in pages for item in page.get(call.items) or ()]
    items = items[:count] if count else items
    data = {**pages[-1], call.items: items}
    return Answer(call.read(data), data)


@dataclass(frozen=True, slots=True)
class Answer(Generic[ValueT]):
    """What came back: as a value, and `json` exactly as the API sent it (None: no content)."""

    value: ValueT
    json: Any


def list_nodes() -> Call[list[Node]]:
    """Nodes by name."""
    read = partial(read_list, "nodes", Node.from_json)
    return Call(method="GET", path="/v1/nodes", read=read, items="nodes")


def get_node(name: str) -> Call[Node]:
    """One node."""
    return Call(method="GET", path=f"/v1/nodes/{part(name)}", read=Node.from_json)


def register_node(name: str, agent_address: str) -> Call[Node]:
    """Say where a node's agent listens; a new address replaces the old one."""
    return Call(
        method="POST",
        path="/v1/nodes",
        body={"name": name, "agent_address": agent_address},
        read=Node.from_json,
    )


def list_vms() -> Call[list[Vm]]:
    """VMs by id."""
    read = partial(read_list, "vms", Vm.from_json)
    return Call(method="GET", path="/v1/vms", read=read, items="vms")


def get_vm(vm_id: str) -> Call[Vm]:
    """One VM."""
    return Call(method="GET", path=f"/v1/vms/{part(vm_id)}", read=Vm.from_json)


def start_vm(node: str, spec: Mapping[str, Any]) -> Call[Vm]:
    """Start a VM; `spec` as docs/vm-spec.md has it."""
    return Call(
        method="POST", path="/v1/vms", body={"node": node, "spec": dict(spec)}, read=Vm.from_json
    )


def stop_vm(vm_id: str) -> Call[None]:
    """End a VM and free its memory."""
    return Call(method="DELETE", path=f"/v1/vms/{part(vm_id)}", read=read_nothing)


def get_userfault_bitmap(vm_id: str) -> Call[UserfaultBitmap]:
    """Which of its pages are absent."""
    path = f"/v1/vms/{part(vm_id)}/userfault-bitmap"
    return Call(method="GET", path=path, read=UserfaultBitmap.from_json, items=RUNS)


def create_migration(
    vm_id: str,
    destination_node: str = "",
    bulk_bytes_per_s_max: int = 0,
    freeze_after_ms: int = 0,
    priority: str = "",
) -> Call[Migration]:
    """Ask for a move. The answer comes before the move is done.

    `destination_node`: empty: wherever is best. `priority`: empty: what the policies say, or user.
    `bulk_bytes_per_s_max`: 0 = the bulk lane has no limit. `freeze_after_ms`: freeze the guest once
    it has been held that long; 0 = never.
    """
    body: dict[str, Any] = {"vm": vm_id, "destination_node": destination_node}
    if priority:
        body["priority"] = priority
    if freeze_after_ms:
        body["on_link_loss"] = {"freeze_after_ms": freeze_after_ms}
    if bulk_bytes_per_s_max:
        body["bulk_bytes_per_s_max"] = bulk_bytes_per_s_max
    return Call(method="POST", path="/v1/migrations", body=body, read=Migration.from_json)


def list_migrations(vm_id: str = "", *, unfinished: bool = False) -> Call[list[Migration]]:
    """The migrations, newest first, of one VM or of all; `unfinished`: that have not ended."""
    query = {"vm": vm_id, "unfinished": "true" if unfinished else ""}
    return Call(
        method="GET",
        path="/v1/migrations",
        query={key: value for key, value in query.items() if value},
        read=partial(read_list, "migrations", Migration.from_json),
        items="migrations",
    )


def get_migration(migration_id: str) -> Call[Migration]:
    """One migration."""
    path = f"/v1/migrations/{part(migration_id)}"
    return Call(method="GET", path=path, read=Migration.from_json)


def cancel_migration(migration_id: str) -> Call[Migration]:
    """Ask that it be cancelled; refused once it is past the decision."""
    path = f"/v1/migrations/{part(migration_id)}:cancel"
    return Call(method="POST", path=path, read=Migration.from_json)


def recover_migration(migration_id: str) -> Call[Recovery]:
    """Look at both nodes anew, do what is safe, say what is missing."""
    path = f"/v1/migrations/{part(migration_id)}:recover"
    return Call(method="POST", path=path, read=Recovery.from_json)


def abandon_migration(migration_id: str, epoch: int, *, confirm: bool) -> Call[Migration]:
    """Give its guest up; refused where one runs, may run, or can still be made to run."""
    path = f"/v1/migrations/{part(migration_id)}:abandon"
    body = {"epoch": epoch, "confirm": confirm}
    return Call(method="POST", path=path, body=body, read=Migration.from_json)


def break_glass(
    migration_id: str, epoch: int, *, fenced_vm_id: str, operator: str, because: str
) -> Call[Migration]:
    """Give its guest back to its source by your word that the destination is fenced."""
    path = f"/v1/migrations/{part(migration_id)}:break-glass"
    body = {
        "epoch": epoch,
        "fenced_vm_id": fenced_vm_id,
        "operator": operator,
        "because": because,
    }
    return Call(method="POST", path=path, body=body, read=Migration.from_json)


def events_path(migration_id: str) -> str:
    """Where the events of a migration are streamed."""
    return f"/v1/migrations/{part(migration_id)}/events"


def fleet_events_path(kinds: Iterable[str] = ()) -> str:
    """Where what changes in the fleet is streamed. `kinds`: of migration, operation, node."""
    query = urlencode([("kind", kind) for kind in kinds])
    return f"/v1/events?{query}" if query else "/v1/events"


def part(name: str) -> str:
    """One part of a path, whatever a user typed: ".." must not name another resource."""
    return (
        quote(name, safe="").replace(".", "%2E") if name.strip(".") == "" else quote(name, safe="")
    )


def read_list(key: str, read: Callable[[Any], _ItemT], data: Any) -> list[_ItemT]:
    """The items under a key of an answer."""
    return [read(item) for item in data.get(key, ())]


def read_nothing(_: Any) -> None:
    """An answer without content."""
    return
