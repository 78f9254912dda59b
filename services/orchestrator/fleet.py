# SPDX-License-Identifier: Apache-2.0
"""The service layer: what REST and gRPC both offer. Takes plain values, answers with messages.

A refusal changes nothing: everything is checked before the first write, and again inside the
transaction that writes (I9).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace

import sqlalchemy as sa
from godwit.fleet.v1 import (
    migration_service_pb2,
    types_pb2,
    vm_service_pb2,
)
from google.protobuf.message import Message
from ulid import ULID

from services.common import telemetry
from services.common.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
)
from services.common.listen import parse_address
from services.common.vm_spec import VM_ID_PATTERN, VmSpec
from services.orchestrator.agents import node_unknown
from services.orchestrator.machines import Machines
from services.orchestrator.migration import Phase
from services.orchestrator.move import Context, both
from services.orchestrator.nodes import Nodes
from services.orchestrator.operators import Operators
from services.orchestrator.paging import cut, page_count, read_token
from services.orchestrator.queue import Queue
from services.orchestrator.runner import Runner
from services.orchestrator.scheduling.model import Priority
from services.orchestrator.scheduling_api import Scheduling, wire_priority
from services.orchestrator.store.fleet import migration_active, vm_unknown
from services.orchestrator.store.migrations import migration_unknown
from services.orchestrator.store.rows import IdempotencyRow, MigrationRow, NodeRow, VmRow
from services.orchestrator.store.schedule import (
    AdmissionRow,
    NodeSettings,
    VmSettings,
    new_admission,
)
from services.orchestrator.views import (
    bitmap_view,
    migration_view,
    node_view,
    residency_view,
    vm_view,
)

RUN_COUNT_DEFAULT = 10_000
RUN_COUNT_MAX = 100_000
"""Of a userfault bitmap, in one answer."""
KEY_LEN_MAX = 255
BYTES_PER_S_MAX = 1 << 50
FREEZE_AFTER_MS_MAX = 86_400_000


def field_invalid(name: str, must: str, got: object) -> InvalidArgumentError:
    """The refusal of a value that no state of the fleet would make right."""
    return InvalidArgumentError(
        "FIELD_INVALID", f"{name} {must}, got {got!r}", metadata={"field": name}
    )


def _check_name(field: str, value: str) -> None:
    if not re.fullmatch(VM_ID_PATTERN, value):
        raise field_invalid(field, f"must match {VM_ID_PATTERN}", value)


def check_node(name: str, agent_address: str) -> None:
    """Refuse what cannot be a node.

    Raises:
        InvalidArgumentError: FIELD_INVALID.
    """
    _check_name("name", name)
    try:
        parse_address(agent_address)
    except InvalidArgumentError as error:
        raise field_invalid("agent_address", "must be HOST:PORT", agent_address) from error


class Fleet:
    """Every call of the API."""

    def __init__(
        self, context: Context, nodes: Nodes, machines: Machines, runner: Runner, queue: Queue
    ) -> None:
        self._context = context
        self._nodes = nodes
        self._machines = machines
        self._runner = runner
        self._operators = Operators(context, runner)
        self._queue = queue
        self.scheduling = Scheduling(context, queue)
        """Queue, limits, policies, placement."""

    # --- nodes ---

    async def register_node(self, name: str, agent_address: str) -> tuple[types_pb2.Node, bool]:
        """Add a node or give it a new address. The bool: it is new."""
        self._context.role.require()
        check_node(name, agent_address)
        row, is_new = await self._nodes.put(name, agent_address)
        return await self._node_view(row), is_new

    async def get_node(self, name: str) -> types_pb2.Node:
        """One node."""
        return await self._node_view(await self._node(name))

    async def list_nodes(
        self, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[types_pb2.Node], str]:
        """A page, by name, and the token of the next one."""
        count = page_count(page_size)
        rows = await self._context.store.fleet.nodes_page(
            after=read_token("nodes", page_token), count=count + 1
        )
        page, token = cut("nodes", rows, count, lambda each: each[0].name)
        said = await self._context.store.schedule.node_settings(row.name for row, _ids in page)
        return [self._view_of_node(row, said, vm_ids) for row, vm_ids in page], token

    async def some_nodes(self, names: list[str]) -> list[types_pb2.Node]:
        """Those that there are, without their VMs."""
        said = await self._context.store.schedule.node_settings(names)
        rows = [await self._context.store.fleet.node(name) for name in names]
        return [self._view_of_node(row, said, []) for row in rows if row]

    async def _node(self, name: str) -> NodeRow:
        row = await self._context.store.fleet.node(name)
        if row is None:
            raise node_unknown(name)
        return row

    async def _node_view(self, row: NodeRow) -> types_pb2.Node:
        said = await self._context.store.schedule.node_settings([row.name])
        vm_ids = await self._context.store.fleet.vm_ids_of(row.name)
        return self._view_of_node(row, said, vm_ids)

    def _view_of_node(
        self, row: NodeRow, said: Mapping[str, NodeSettings], vm_ids: list[str]
    ) -> types_pb2.Node:
        status = self._nodes.status(row.name)
        return node_view(
            row,
            reachable=status.reachable,
            message=status.message,
            capabilities=status.capabilities,
            vm_ids=vm_ids,
            settings=said.get(row.name, NodeSettings()),
        )

    # --- VMs ---

    async def start_vm(self, node: str, spec_json: str, *, key: str = "") -> types_pb2.Vm:
        """Start a VM from its spec."""
        self._context.role.require()
        spec = VmSpec.parse(spec_json)
        request = vm_service_pb2.StartVmRequest(node=node, spec_json=spec.canonical_json())
        if answer := await self.answered(key, request):
            return types_pb2.Vm.FromString(answer)
        self._context.doubt.require_none()
        await self._node(node)
        await self._nodes.require(node)
        self._context.doubt.require_none()
        vm = await self._vm_view(await self._machines.start(spec, node), "", VmSettings())
        await self._keep(key, request, vm)
        return vm

    async def stop_vm(self, vm_id: str) -> None:
        """End a VM."""
        self._context.role.require()
        self._context.doubt.require_none()
        vm = await self._vm(vm_id)
        if active := await self._context.store.migrations.active_of(vm_id):
            raise migration_active(vm_id, active)
        await self._nodes.require(vm.node)
        self._context.doubt.require_none()
        await self._machines.stop(vm_id)

    async def get_vm(self, vm_id: str) -> types_pb2.Vm:
        """One VM."""
        vm = await self._vm(vm_id)
        said = (await self._context.store.schedule.vm_settings([vm_id])).get(vm_id, VmSettings())
        active = await self._context.store.migrations.active_of(vm_id)
        return await self._vm_view(vm, active, said)

    async def list_vms(
        self, *, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[types_pb2.Vm], str]:
        """A page, by id, and the token of the next one."""
        count = page_count(page_size)
        rows = await self._context.store.fleet.vms_page(
            after=read_token("vms", page_token), count=count + 1
        )
        page, token = cut("vms", rows, count, lambda each: each[0].vm_id)
        said = await self._context.store.schedule.vm_settings(vm.vm_id for vm, _id in page)
        plain = VmSettings()
        return [
            await self._vm_view(vm, migration_id, said.get(vm.vm_id, plain))
            for vm, migration_id in page
        ], token

    async def userfault_bitmap(
        self, vm_id: str, *, page_size: int = 0, page_token: str = ""
    ) -> vm_service_pb2.GetUserfaultBitmapResponse:
        """Which pages are not yet where the VM runs; at most `page_size` runs of them."""
        if not 0 <= page_size <= RUN_COUNT_MAX:
            raise field_invalid("page_size", f"must be 0..{RUN_COUNT_MAX}", page_size)
        token = read_token("runs", page_token)
        if not token.isdecimal() and token:
            raise field_invalid("page_token", "must be a next_page_token of runs", page_token)
        vm = await self._vm(vm_id)
        bitmap = self._context.bitmaps.get(vm_id, vm.epoch)
        return bitmap_view(vm, bitmap, first=int(token or 0), count=page_size or RUN_COUNT_DEFAULT)

    async def residency(self, vm_id: str) -> vm_service_pb2.GetResidencyResponse:
        """How many of its pages were absent over the time of its last arrival."""
        vm = await self._vm(vm_id)
        return residency_view(vm, self._context.residency.get(vm_id, vm.epoch))

    async def _vm(self, vm_id: str) -> VmRow:
        vm = await self._context.store.fleet.vm(vm_id)
        if vm is None:
            raise vm_unknown(vm_id)
        return vm

    async def _vm_view(self, vm: VmRow, migration_id: str, said: VmSettings) -> types_pb2.Vm:
        return vm_view(
            vm,
            settings=said,
            migration_id=migration_id,
            bitmap=self._context.bitmaps.get(vm.vm_id, vm.epoch),
            vmm_state=self._nodes.vmm_state(vm.node, vm.vm_id),
        )

    # --- migrations ---

    async def create_migration(
        self,
        vm_id: str,
        destination_node: str,
        *,
        bulk_bytes_per_s_max: int = 0,
        freeze_after_ms: int = 0,
        priority: Priority | None = None,
        operation_id: str = "",
        key: str = "",
    ) -> types_pb2.Migration:
        """Ask for a move, to a node or ("") to wherever is best. It goes on by itself."""
        self._context.role.require()
        _check_name("vm_id", vm_id)
        if destination_node:
            _check_name("destination_node", destination_node)
        if not 0 <= bulk_bytes_per_s_max <= BYTES_PER_S_MAX:
            raise field_invalid(
                "bulk_bytes_per_s_max", f"must be 0..{BYTES_PER_S_MAX}", bulk_bytes_per_s_max
            )
        if not 0 <= freeze_after_ms <= FREEZE_AFTER_MS_MAX:
            raise field_invalid(
                "on_link_loss.freeze_after_ms", f"must be 0..{FREEZE_AFTER_MS_MAX}", freeze_after_ms
            )
        request = migration_service_pb2.CreateMigrationRequest(
            vm_id=vm_id,
            destination_node=destination_node,
            bulk_bytes_per_s_max=bulk_bytes_per_s_max,
        )
        if freeze_after_ms:  # else it hashes as it did before there was the field
            request.on_link_loss.freeze_after_ms = freeze_after_ms
        if priority is not None:
            request.priority = wire_priority(priority)
        if answer := await self.answered(key, request):
            return types_pb2.Migration.FromString(answer)
        try:
            settings, policies = await self.scheduling.effective(vm_id)
            row = await self._admissible(
                vm_id, destination_node, bulk_bytes_per_s_max or settings.bulk_bytes_per_s_max or 0
            )
            row = replace(row, freeze_after_ms=freeze_after_ms or settings.freeze_after_ms or 0)
            admission = AdmissionRow(
                migration_id=row.migration_id,
                priority=_first(priority, settings.priority, Priority.USER),
                target=destination_node,
                operation_id=operation_id,
                settings=settings,
                policies=policies,
                # An operation tries its VMs again itself.
                retries_left=0 if operation_id else settings.retries or 0,
            )
            view = migration_view(row, (), admission=admission)
            await self._context.store.migrations.create(
                row, self.idempotency(key, request, view), new_admission(admission)
            )
        except (AlreadyExistsError, sa.exc.IntegrityError) as error:
            # What is in the way may be this very request, given twice at once.
            if answer := await self.answered(key, request):
                return types_pb2.Migration.FromString(answer)
            if isinstance(error, AlreadyExistsError):
                raise
            active = await self._context.store.migrations.active_of(vm_id)
            raise migration_active(vm_id, active) from None
        self._runner.admit(row)
        self._context.changes.publish(row.migration_id)
        return view

    async def _admissible(
        self, vm_id: str, destination_node: str, bulk_bytes_per_s_max: int
    ) -> MigrationRow:
        """The migration as it would be written; raises where it would be refused."""
        self._runner.require_running()
        self._context.doubt.require_none()
        vm = await self._vm(vm_id)
        if destination_node:
            await self._node(destination_node)
        if vm.node == destination_node:
            raise FailedPreconditionError(
                "SAME_NODE",
                f"VM {vm_id} is on node {destination_node} already",
                hint="choose another node",
                metadata={"vm_id": vm_id, "node": destination_node},
            )
        if active := await self._context.store.migrations.active_of(vm_id):
            raise migration_active(vm_id, active)
        if destination_node:
            await both(self._nodes.require(vm.node), self._nodes.require(destination_node))
        else:
            await self._nodes.require(vm.node)
        self._context.doubt.require_none()
        migration_id = str(ULID())
        return MigrationRow.new(
            migration_id=migration_id,
            vm=vm,
            destination_node=destination_node,
            bulk_bytes_per_s_max=bulk_bytes_per_s_max,
            traceparent=telemetry.new_traceparent(
                **{"godwit.migration.id": migration_id, "godwit.vm.id": vm_id}
            ),
            now_ns=self._context.now_ns(),
        )

    async def get_migration(self, migration_id: str) -> types_pb2.Migration:
        """One migration."""
        return (await self._migration(migration_id))[1]

    async def _migration(self, migration_id: str) -> tuple[MigrationRow, types_pb2.Migration]:
        row = await self._context.store.migrations.get(migration_id)
        if row is None:
            raise migration_unknown(migration_id)
        history = await self._context.store.migrations.transitions([migration_id])
        events = await self._context.store.migrations.events(migration_id)
        admission = await self._context.store.schedule.admission(migration_id)
        wait = self._queue.wait_of(migration_id) if row.phase is Phase.PENDING else None
        view = migration_view(row, history[migration_id], events, admission=admission, wait=wait)
        return row, view

    async def list_migrations(
        self,
        vm_id: str = "",
        *,
        page_size: int = 0,
        page_token: str = "",
        unfinished: bool = False,
    ) -> tuple[list[types_pb2.Migration], str]:
        """A page, the newest first, and the token of the next one."""
        count = page_count(page_size)
        rows = await self._context.store.migrations.page(
            vm_id,
            before=read_token("migrations", page_token),
            count=count + 1,
            unfinished=unfinished,
        )
        page, token = cut("migrations", rows, count, lambda row: row.migration_id)
        histories = await self._context.store.migrations.transitions(
            [row.migration_id for row in page]
        )
        return [migration_view(row, histories[row.migration_id]) for row in page], token

    async def set_priority(self, migration_id: str, priority: Priority) -> bool:
        """Change the class of a migration that waits in the queue. False: it was admitted."""
        self._context.role.require()
        changed = await self._context.store.schedule.set_priority(migration_id, priority)
        self._queue.wake()
        return changed

    async def cancel_migration(self, migration_id: str) -> types_pb2.Migration:
        """Ask for a cancel."""
        self._context.role.require()
        await self._context.store.migrations.request_cancel(migration_id)
        self._runner.cancel(migration_id)
        self._context.changes.publish(migration_id)
        return await self.get_migration(migration_id)

    async def recover_migration(self, migration_id: str) -> tuple[types_pb2.Migration, list[str]]:
        """Look anew, do what is safe, say what is missing."""
        self._context.role.require()
        findings = await self._operators.recover(migration_id)
        return await self.get_migration(migration_id), findings

    async def abandon_migration(
        self, migration_id: str, *, epoch: int, confirm: bool
    ) -> types_pb2.Migration:
        """Give its guest up."""
        self._context.role.require()
        await self._operators.abandon(migration_id, epoch=epoch, confirm=confirm)
        return await self.get_migration(migration_id)

    async def break_glass(
        self, migration_id: str, *, epoch: int, fenced_vm_id: str, operator: str, because: str
    ) -> types_pb2.Migration:
        """Give its guest back without the destination's proof."""
        self._context.role.require()
        await self._operators.break_glass(
            migration_id,
            epoch=epoch,
            fenced_vm_id=fenced_vm_id,
            operator=operator,
            because=because,
        )
        return await self.get_migration(migration_id)

    # --- repeated requests ---

    async def answered(self, key: str, request: Message) -> bytes:
        """The answer that was given to the same request under this key, or b""."""
        if not key:
            return b""
        if len(key) > KEY_LEN_MAX:
            raise field_invalid("request_id", f"has at most {KEY_LEN_MAX} characters", len(key))
        row = await self._context.store.idempotency.get(key)
        if row is None:
            return b""
        if row.request_hash != _hash(request):
            raise InvalidArgumentError(
                "IDEMPOTENCY_KEY_REUSED",
                "this key was given with another request lately",
                hint="draw a new key for each request; repeat it only with the same one",
            )
        return row.response

    def idempotency(self, key: str, request: Message, answer: Message) -> IdempotencyRow | None:
        """What is written with the act, so that it is done once; None without a key."""
        if not key:
            return None
        return IdempotencyRow(
            key=key,
            request_hash=_hash(request),
            response=answer.SerializeToString(),
            created_at_ns=self._context.now_ns(),
        )

    async def _keep(self, key: str, request: Message, answer: Message) -> None:
        if row := self.idempotency(key, request, answer):
            await self._context.store.idempotency.put(row)


def _first(*values: Priority | None) -> Priority:
    return next(value for value in values if value is not None)


def _hash(request: Message) -> str:
    text = request.DESCRIPTOR.full_name.encode() + request.SerializeToString(deterministic=True)
    return hashlib.sha256(text).hexdigest()
