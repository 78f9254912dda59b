# SPDX-License-Identifier: Apache-2.0
"""The part of the service layer that is about the queue, limits and policies."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from godwit.fleet.v1 import schedule_service_pb2 as pb
from godwit.fleet.v1 import types_pb2

from services.common.errors import InvalidArgumentError, UnimplementedError
from services.common.vm_spec import VM_ID_PATTERN
from services.orchestrator.agents import node_unknown
from services.orchestrator.etags import etag_of, node_etag, require_match, vm_etag
from services.orchestrator.events.model import Kind as EventKind
from services.orchestrator.move import Context
from services.orchestrator.paging import cut, page_count, read_token
from services.orchestrator.queue import Queue
from services.orchestrator.scheduling.limits import Kind, LimitSet
from services.orchestrator.scheduling.model import Placing, Priority
from services.orchestrator.scheduling.policy import Mode, Policy, Settings, effective
from services.orchestrator.store.fleet import vm_unknown
from services.orchestrator.store.schedule import NodeSettings, VmSettings

WORD_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$"
"""Of labels, taints, links and groups."""
BECAUSE_LEN_MAX = 200
PAUSE_MS_MAX = 60_000
RETRIES_MAX = 100
_WIRE_OFFSET = 1  # of the enum, whose zero is "not set"


def _invalid(name: str, must: str, got: object) -> InvalidArgumentError:
    return InvalidArgumentError(
        "FIELD_INVALID", f"{name} {must}, got {got!r}", metadata={"field": name}
    )


def check_word(field: str, word: str) -> str:
    """Refuse what is no word.

    Raises:
        InvalidArgumentError: FIELD_INVALID.
    """
    if not re.fullmatch(WORD_PATTERN, word):
        raise _invalid(field, f"must match {WORD_PATTERN}", word)
    return word


def _labels(field: str, labels: Mapping[str, str]) -> dict[str, str]:
    return {check_word(field, key): check_word(field, value) for key, value in labels.items()}


def read_priority(given: types_pb2.Priority.ValueType) -> Priority | None:
    """None: not set.

    Raises:
        InvalidArgumentError: FIELD_INVALID.
    """
    if not given:
        return None
    try:
        return Priority(given - _WIRE_OFFSET)
    except ValueError as error:
        raise _invalid("priority", "must be one of the enum", given) from error


def wire_priority(priority: Priority | None) -> types_pb2.Priority.ValueType:
    """For the wire."""
    if priority is None:
        return types_pb2.PRIORITY_UNSPECIFIED
    return types_pb2.Priority.Value(f"PRIORITY_{priority.name}")


class Scheduling:
    """What can be asked of the queue."""

    def __init__(self, context: Context, queue: Queue) -> None:
        self._context = context
        self._queue = queue
        self._changing = asyncio.Lock()
        """Held from the look at an etag until the write: nobody but the leader's process writes."""

    # --- the queue ---

    async def queue(self, *, page_size: int = 0, page_token: str = "") -> pb.GetQueueResponse:
        """A page of what waits, in order. Its token names a place."""
        count, token = page_count(page_size), read_token("queue", page_token)
        if token and not token.isdecimal():
            raise _invalid("page_token", "must be a next_page_token of queue", page_token)
        waits, snapshot = await self._queue.waiting()
        later = [each for each in waits if each[0].place > int(token or 0)]
        page, token = cut("queue", later, count, lambda each: str(each[0].place))
        now_ns = self._context.now_ns()
        return pb.GetQueueResponse(
            frozen=snapshot.frozen,
            entries=[
                pb.QueueEntry(
                    migration_id=wait.request.request_id,
                    vm_id=wait.request.vm.vm_id,
                    source_node=wait.request.vm.node,
                    destination_node=wait.request.target,
                    priority=wire_priority(wait.request.priority),
                    place=wait.place,
                    reason=wait.reason,
                    message=wait.message,
                    hint=wait.hint,
                    operation_id=each.admission.operation_id if each.admission else "",
                    waited_s=max(now_ns - each.migration.created_at_ns, 0) / 1e9,
                )
                for wait, each in page
            ],
            next_page_token=token,
        )

    async def freeze(self, because: str) -> None:
        """The emergency stop."""
        self._context.role.require()
        if not 0 < len(because.strip()) <= BECAUSE_LEN_MAX:
            raise _invalid("because", f"must have 1..{BECAUSE_LEN_MAX} characters", because)
        await self._context.store.schedule.freeze(because.strip())
        self._queue.wake()

    async def thaw(self) -> None:
        """Its end."""
        self._context.role.require()
        await self._context.store.schedule.freeze("")
        self._queue.wake()

    # --- limits ---

    async def limits(self, *, page_size: int = 0, page_token: str = "") -> pb.GetLimitsResponse:
        """A page: kinds first, then what was set for one, and what is used. All of one look."""
        count, after = page_count(page_size), read_token("limits", page_token)
        limits, used = await self._context.store.schedule.limits()
        kinds: list[str] = [*Kind]
        keys = [*kinds, *sorted({*limits.overrides, *used} - set(kinds))]
        if after in kinds:
            keys = keys[kinds.index(after) + 1 :]
        elif after:
            keys = [key for key in keys[len(kinds) :] if key > after]
        page, token = cut("limits", keys, count, str)
        return pb.GetLimitsResponse(
            limits=[pb.Limit(key=key, value=limits.of(key), used=used.get(key, 0)) for key in page],
            next_page_token=token,
            etag=_limits_etag(limits),
        )

    async def set_limits(
        self, values: Mapping[str, int], remove: list[str], *, etag: str = ""
    ) -> pb.GetLimitsResponse:
        """Change some, at once, if they are as they were read. The first page then."""
        self._context.role.require()
        changed: dict[str, int | None] = {**values, **dict.fromkeys(remove)}
        async with self._changing:
            if etag:
                now, _used = await self._context.store.schedule.limits()
                require_match(etag, _limits_etag(now), "limits")
            await self._context.store.schedule.set_limits(changed)
        self._queue.wake()
        return await self.limits()

    # --- policies ---

    async def policies(
        self, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[pb.Policy], str]:
        """A page, by name, and the token of the next one."""
        count = page_count(page_size)
        found = await self._context.store.schedule.policies(
            after=read_token("policies", page_token), count=count + 1
        )
        page, token = cut("policies", found, count, lambda each: each.name)
        return [_policy_view(each) for each in page], token

    async def put_policy(self, given: pb.Policy) -> pb.Policy:
        """Write one, if it is as it was read (`etag`)."""
        self._context.role.require()
        policy = _read_policy(given)
        async with self._changing:
            await self._require_policy(given.name, given.etag)
            await self._context.store.schedule.put_policy(policy)
        return _policy_view(policy)

    async def delete_policy(self, name: str, *, etag: str = "") -> None:
        """Remove one, if it is as it was read."""
        self._context.role.require()
        async with self._changing:
            await self._require_policy(name, etag)
            await self._context.store.schedule.delete_policy(name)

    async def _require_policy(self, name: str, etag: str) -> None:
        if not etag:
            return
        found = await self._context.store.schedule.policies()
        now = next((_policy_view(each).etag for each in found if each.name == name), "")
        require_match(etag, now, f"policy {name}")

    async def effective(self, vm_id: str) -> tuple[Settings, tuple[str, ...]]:
        """What counts for a VM now, and who says so."""
        table = self._context.store.schedule
        said = (await table.vm_settings([vm_id])).get(vm_id, VmSettings())
        found = effective(said.labels, await table.policies())
        return found.settings, found.policies

    # --- placement ---

    async def set_node_placement(self, request: pb.SetNodePlacementRequest) -> None:
        """What a node is for placement."""
        self._context.role.require()
        if await self._context.store.fleet.node(request.name) is None:
            raise node_unknown(request.name)
        settings = NodeSettings(
            labels=_labels("labels", request.labels),
            taints=frozenset(check_word("taints", taint) for taint in request.taints),
            link=check_word("link", request.link) if request.link else "",
        )
        table = self._context.store.schedule
        async with self._changing:
            if request.etag:
                said = (await table.node_settings()).get(request.name, NodeSettings())
                require_match(request.etag, node_etag(said), f"placement of {request.name}")
            await table.put_node_settings(request.name, settings)
        self._context.changes.publish(request.name, EventKind.NODE)

    async def set_vm_placement(self, request: pb.SetVmPlacementRequest) -> None:
        """Where a VM may be."""
        self._context.role.require()
        if await self._context.store.fleet.vm(request.vm_id) is None:
            raise vm_unknown(request.vm_id)
        asked = request.placement
        words = {
            name: check_word(f"placement.{name}", getattr(asked, name))
            for name in ("apart", "near", "group")
            if getattr(asked, name)
        }
        tolerations = (check_word("placement.tolerations", each) for each in asked.tolerations)
        placing = Placing(
            selector=_labels("placement.selector", asked.selector),
            tolerations=frozenset(tolerations),
            **words,
        )
        settings = VmSettings(labels=_labels("labels", request.labels), placing=placing)
        table = self._context.store.schedule
        async with self._changing:
            if request.etag:
                said = (await table.vm_settings([request.vm_id])).get(request.vm_id, VmSettings())
                require_match(request.etag, vm_etag(said), f"placement of {request.vm_id}")
            await table.put_vm_settings(request.vm_id, settings)
        self._queue.wake()


def _limits_etag(limits: LimitSet) -> str:
    """Of all that is set."""
    kinds = {str(kind): limits.of(kind) for kind in Kind}
    return etag_of(pb.SetLimitsRequest(values={**kinds, **limits.overrides}))


def _read_policy(given: pb.Policy) -> Policy:
    if not re.fullmatch(VM_ID_PATTERN, given.name):
        raise _invalid("name", f"must match {VM_ID_PATTERN}", given.name)

    def said(name: str, most: float) -> float | None:
        if not given.HasField(name):  # type: ignore[arg-type]
            return None
        value: float = getattr(given, name)
        if not 0 <= value <= most:
            raise _invalid(name, f"must be 0..{most:g}", value)
        return value

    pause_ms_max = said("pause_ms_max", PAUSE_MS_MAX)
    if pause_ms_max == 0:
        raise _invalid("pause_ms_max", f"must be 1..{PAUSE_MS_MAX}", 0)
    bulk, freeze = said("bulk_bytes_per_s_max", 1 << 50), said("freeze_after_ms", 86_400_000)
    retries = said("retries", RETRIES_MAX)
    _require_available(given.mode)
    return Policy(
        name=given.name,
        match_labels=_labels("match_labels", given.match_labels),
        settings=Settings(
            priority=read_priority(given.priority),
            bulk_bytes_per_s_max=None if bulk is None else int(bulk),
            freeze_after_ms=None if freeze is None else int(freeze),
            pause_ms_max=None if pause_ms_max is None else int(pause_ms_max),
            prepare_s_per_gib=said("prepare_s_per_gib", 3600),
            retries=None if retries is None else int(retries),
            mode=Mode.POST_COPY if given.mode else None,
        ),
    )


def _require_available(mode: types_pb2.MigrationMode.ValueType) -> None:
    """Refuse what a policy can ask for and no migration does.

    Raises:
        InvalidArgumentError: FIELD_INVALID.
        UnimplementedError: MODE_NOT_AVAILABLE.
    """
    if mode not in types_pb2.MigrationMode.values():
        raise _invalid("mode", "must be one of the enum", mode)
    if mode in (types_pb2.MIGRATION_MODE_PRE_COPY, types_pb2.MIGRATION_MODE_HYBRID):
        word = types_pb2.MigrationMode.Name(mode).removeprefix("MIGRATION_MODE_")
        raise UnimplementedError(
            "MODE_NOT_AVAILABLE",
            f"mode {word.lower().replace('_', '-')} is not there yet: every migration is post-copy",
            hint="leave mode out, or say post-copy",
            metadata={"field": "mode"},
        )


def wire_mode(mode: Mode | None) -> types_pb2.MigrationMode.ValueType:
    """For the wire."""
    if mode is None:
        return types_pb2.MIGRATION_MODE_UNSPECIFIED
    return types_pb2.MigrationMode.Value(f"MIGRATION_MODE_{mode.name}")


def _fields(said: Settings) -> dict[str, Any]:
    """What a policy says, as Policy and EffectivePolicy spell it."""
    return {
        "priority": wire_priority(said.priority),
        "bulk_bytes_per_s_max": said.bulk_bytes_per_s_max,
        "freeze_after_ms": said.freeze_after_ms,
        "pause_ms_max": said.pause_ms_max,
        "prepare_s_per_gib": said.prepare_s_per_gib,
        "retries": said.retries,
        "mode": wire_mode(said.mode),
    }


def wire_settings(said: Settings) -> types_pb2.EffectivePolicy:
    """For the wire."""
    return types_pb2.EffectivePolicy(**_fields(said))


def _policy_view(policy: Policy) -> pb.Policy:
    view = pb.Policy(name=policy.name, match_labels=policy.match_labels, **_fields(policy.settings))
    view.etag = etag_of(view)
    return view
