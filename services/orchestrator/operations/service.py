# SPDX-License-Identifier: Apache-2.0
"""The part of the service layer that is about operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from godwit.fleet.v1 import operation_service_pb2 as pb
from google.protobuf.message import Message
from ulid import ULID

from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.orchestrator.agents import node_unknown
from services.orchestrator.events.model import Kind as EventKind
from services.orchestrator.fleet import (
    Fleet,
    field_invalid,
)
from services.orchestrator.migration import Phase
from services.orchestrator.move import Context
from services.orchestrator.operations import windows
from services.orchestrator.operations.model import (
    RETRIES_DEFAULT,
    Item,
    ItemState,
    Kind,
    Operation,
    Options,
)
from services.orchestrator.operations.runner import OperationRunner
from services.orchestrator.operations.views import item_view, operation_view, plan_view
from services.orchestrator.paging import cut, page_count, read_token
from services.orchestrator.queue import Fleet as Seen
from services.orchestrator.queue import Queue
from services.orchestrator.scheduling.model import Priority, Request, Rules, VmView
from services.orchestrator.scheduling.plan import Plan, Rate, learn_rate, plan
from services.orchestrator.scheduling.rebalance import rebalance
from services.orchestrator.scheduling_api import RETRIES_MAX, read_priority
from services.orchestrator.store.fleet import vm_unknown

PARALLEL_MAX = 10_000
DEADLINE_S_MAX = 30 * 86_400
SPREAD_DEFAULT = 0.1
_PLANNED = "plan."

Answer = tuple[pb.Operation | None, pb.Plan | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What an operation would be."""

    kind: Kind
    node: str = ""
    moves: tuple[tuple[VmView, str], ...] = ()
    """(VM, target or empty), in order."""


class Operations:
    """What can be asked for."""

    def __init__(
        self, context: Context, fleet: Fleet, queue: Queue, runner: OperationRunner
    ) -> None:
        self._context = context
        self._fleet = fleet
        self._queue = queue
        self._runner = runner

    # --- beginning ---

    async def drain(self, request: pb.DrainNodeRequest) -> Answer:
        """Empty a node."""
        seen = await self._seen(request.node)
        options = _read_options(request.options)
        moves = tuple((vm, "") for vm in seen.vms.values() if vm.node == request.node)
        wish = _Wish(kind=Kind.DRAIN, node=request.node, moves=_ordered(moves, options))
        return await self._begin(wish, options, request, seen)

    async def undrain(self, request: pb.UndrainNodeRequest) -> Answer:
        """Open a node, and move back what its last drain moved away."""
        seen = await self._seen(request.node)
        options = _read_options(request.options)
        moves: tuple[tuple[VmView, str], ...] = ()
        last = await self._context.store.operations.last_drain(request.node)
        if last and not request.no_return:
            moves = tuple(
                (seen.vms[item.vm_id], request.node)
                for item in last[1]
                if item.state is ItemState.MOVED
                and item.vm_id in seen.vms
                and seen.vms[item.vm_id].node == item.target
            )
        node = seen.schedule.nodes[request.node]
        needs = sum(vm.memory_bytes for vm, _target in moves)
        if needs > node.free_bytes:
            raise FailedPreconditionError(
                "CAPACITY_SHORT",
                f"{request.node} has {node.free_bytes} bytes for {len(moves)} VMs of {needs}",
                hint="free memory there, or open it with no_return and move VMs one by one",
                metadata={"node": request.node},
            )
        wish = _Wish(kind=Kind.UNDRAIN, node=request.node, moves=_ordered(moves, options))
        return await self._begin(wish, options, request, seen)

    async def rebalance(self, request: pb.RebalanceRequest) -> Answer:
        """Even the load."""
        options = _read_options(request.options)
        if not 0 <= request.spread_max <= 1:
            raise field_invalid("spread_max", "must be 0..1", request.spread_max)
        seen, copy = await self._queue.fleet(), await self._queue.fleet()
        moved_s = {
            row.vm_id: row.ended_at_ns / 1e9
            for row in reversed(seen.snapshot.recent)
            if row.phase is Phase.SUCCEEDED
        }
        busy = {
            *(row.vm_id for row, _keys in seen.snapshot.running),
            *(each.migration.vm_id for each in seen.snapshot.waiting),
        }
        found = rebalance(
            copy.schedule.nodes.values(),
            (
                replace(vm, moved_s=moved_s.get(vm.vm_id))
                for vm in copy.vms.values()
                if vm.vm_id not in busy
            ),
            spread_max=request.spread_max or SPREAD_DEFAULT,
            now_s=self._context.now_ns() / 1e9,
            cooldown_s=Rules().cooldown_s,
        )
        moves = tuple((seen.vms[vm.vm_id], target) for vm, target in found)
        wish = _Wish(kind=Kind.REBALANCE, moves=moves)
        return await self._begin(wish, options, request, seen)

    async def batch(self, request: pb.MoveBatchRequest) -> Answer:
        """Move what is given."""
        options = _read_options(request.options)
        seen = await self._queue.fleet()
        target = request.destination_node
        if target and target not in seen.schedule.nodes:
            raise node_unknown(target)
        vm_ids = list(dict.fromkeys(request.vm_ids))
        if not vm_ids:
            raise field_invalid("vm_ids", "names at least one VM", [])
        for vm_id in vm_ids:
            if vm_id not in seen.vms:
                raise vm_unknown(vm_id)
        moves = tuple((seen.vms[vm_id], target) for vm_id in vm_ids)
        if request.options.HasField("largest_first"):
            moves = _ordered(moves, options)
        return await self._begin(_Wish(kind=Kind.BATCH, moves=moves), options, request, seen)

    async def _seen(self, node: str) -> Seen:
        if await self._context.store.fleet.node(node) is None:
            raise node_unknown(node)
        return await self._queue.fleet()

    async def _begin(
        self,
        wish: _Wish,
        options: Options,
        request: pb.DrainNodeRequest
        | pb.UndrainNodeRequest
        | pb.RebalanceRequest
        | pb.MoveBatchRequest,
        seen: Seen,
    ) -> Answer:
        if request.options.dry_run:
            return None, plan_view(self._plan(wish, options, seen))
        key, asked = request.request_id, _without_key(request)
        if answer := await self._fleet.answered(key, asked):
            return pb.Operation.FromString(answer), None
        self._context.role.require()
        self._context.doubt.require_none()
        operation = Operation(
            operation_id=str(ULID()),
            kind=wish.kind,
            node=wish.node,
            options=options,
            created_at_ns=self._context.now_ns(),
        )
        items = tuple(
            Item(vm_id=vm.vm_id, sequence=number, source=vm.node, target=target)
            for number, (vm, target) in enumerate(wish.moves, start=1)
        )
        view = operation_view(operation, items)
        await self._context.store.operations.create(
            operation,
            items,
            close=wish.kind is Kind.DRAIN,
            reopen=wish.kind is Kind.UNDRAIN,
            idempotency=self._fleet.idempotency(key, asked, view),
        )
        self._publish(operation.operation_id, wish.node)
        return view, None

    # --- the dry run ---

    def _plan(self, wish: _Wish, options: Options, seen: Seen) -> Plan:
        """The same schedule, played through. The fleet seen is used up."""
        schedule = seen.schedule
        schedule.frozen = False
        if wish.node:
            schedule.nodes[wish.node].draining = wish.kind is Kind.DRAIN
        schedule.changed()
        others = {row.vm_id for row, _keys in seen.snapshot.running}
        for request in schedule.requests():
            # Of what waits already only that is played along which nobody is about to move anyway.
            if request.vm.vm_id in {vm.vm_id for vm, _target in wish.moves}:
                schedule.withdraw(request.request_id)
        for number, (vm, target) in enumerate(wish.moves):
            if vm.vm_id not in others:
                schedule.put(
                    Request(
                        request_id=f"{_PLANNED}{number:06}",
                        vm=vm,
                        created_s=0.0,
                        priority=options.priority,
                        target=target,
                    )
                )
        found = plan(schedule, _rate(seen), parallel_max=options.parallel_max)
        steps = tuple(each for each in found.steps if each.request_id.startswith(_PLANNED))
        mine = {vm.vm_id for vm, _target in wish.moves}
        return replace(
            found,
            steps=steps,
            impossible=tuple(each for each in found.impossible if each.vm_id in mine),
            ends_s=max((each.ends_s for each in steps), default=0.0),
            waves=max((each.wave for each in steps), default=0),
        )

    # --- reading and changing ---

    async def get(self, operation_id: str) -> pb.Operation:
        """One."""
        operation, items = await self._context.store.operations.get(operation_id)
        progress = {}
        if not operation.ended:
            for row in await self._context.store.migrations.unfinished():
                progress[row.migration_id] = row.progress
        return operation_view(operation, items, progress_of=progress, now_ns=self._context.now_ns())

    async def page(
        self, page_size: int, page_token: str, *, unfinished: bool = False
    ) -> tuple[list[pb.Operation], str]:
        """A page, the newest first, and the token of the next one."""
        count = page_count(page_size)
        found = await self._context.store.operations.page(
            before=read_token("operations", page_token), count=count + 1, unfinished=unfinished
        )
        page, token = cut("operations", found, count, lambda each: each[0].operation_id)
        now_ns = self._context.now_ns()
        return [
            operation_view(each, (), counts=counts, now_ns=now_ns) for each, counts in page
        ], token

    async def vms(
        self, operation_id: str, page_size: int, page_token: str
    ) -> tuple[list[pb.OperationVm], str]:
        """A page of the VMs of one, in order, and the token of the next one."""
        count, of = page_count(page_size), f"vms.{operation_id}"
        found = await self._context.store.operations.vms_page(
            operation_id, after=read_token(of, page_token), count=count + 1
        )
        page, token = cut(of, found, count, lambda item: item.vm_id)
        return [item_view(item) for item in page], token

    async def cancel(self, operation_id: str) -> pb.Operation:
        """Stop it, at any point."""
        return await self._change(operation_id, cancel=True)

    async def pause(self, operation_id: str, *, paused: bool) -> pb.Operation:
        """Admit no further move of it, or go on."""
        return await self._change(operation_id, paused=paused)

    async def _change(
        self, operation_id: str, *, cancel: bool = False, paused: bool | None = None
    ) -> pb.Operation:
        self._context.role.require()
        await self._context.store.operations.change(operation_id, cancel=cancel, paused=paused)
        found = await self.get(operation_id)
        self._publish(operation_id, found.node)
        return found

    def _publish(self, operation_id: str, node: str) -> None:
        """Written: it, and perhaps whether its node is open."""
        self._context.changes.publish(operation_id, EventKind.OPERATION)
        if node:
            self._context.changes.publish(node, EventKind.NODE)


def _without_key(request: Message) -> Message:
    copy = type(request)()
    copy.CopyFrom(request)
    copy.ClearField("request_id")
    return copy


def _read_options(given: pb.OperationOptions) -> Options:
    if given.parallel_max > PARALLEL_MAX:
        raise field_invalid("parallel_max", f"must be 0..{PARALLEL_MAX}", given.parallel_max)
    if not 0 <= given.deadline_s <= DEADLINE_S_MAX:
        raise field_invalid("deadline_s", f"must be 0..{DEADLINE_S_MAX}", given.deadline_s)
    if given.retries > RETRIES_MAX:
        raise field_invalid("retries", f"must be 0..{RETRIES_MAX}", given.retries)
    for window in given.windows:
        try:
            windows.read(window)
        except InvalidArgumentError as error:
            raise field_invalid("windows", "are HH:MM-HH:MM, UTC", window) from error
    tight = bool(given.deadline_s)
    priority = read_priority(given.priority)
    return Options(
        parallel_max=given.parallel_max,
        deadline_s=given.deadline_s,
        priority=Priority.MAINTENANCE if priority is None else priority,
        retries=given.retries if given.HasField("retries") else RETRIES_DEFAULT,
        largest_first=given.largest_first if given.HasField("largest_first") else tight,
        windows=tuple(given.windows),
    )


def _ordered(
    moves: Iterable[tuple[VmView, str]], options: Options
) -> tuple[tuple[VmView, str], ...]:
    """Smallest first shows progress early; largest first ends sooner."""
    sign = -1 if options.largest_first else 1
    return tuple(sorted(moves, key=lambda move: (sign * move[0].memory_bytes, move[0].vm_id)))


def _rate(seen: Seen) -> Rate:
    memory = {vm_id: size for vm_id, _node, size in seen.snapshot.homes}
    admitted = seen.snapshot.admitted_ns
    return learn_rate(
        (
            (memory[row.vm_id], (row.ended_at_ns - admitted[row.migration_id]) / 1e9)
            for row in seen.snapshot.recent
            if row.phase is Phase.SUCCEEDED
            and row.vm_id in memory
            and admitted.get(row.migration_id)
        ),
        Rate(),
    )
