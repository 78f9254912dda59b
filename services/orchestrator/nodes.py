# SPDX-License-Identifier: Apache-2.0
"""Asks every node each second whether it is there, and every few seconds what runs on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2

from services.common.errors import GodwitError, UnavailableError
from services.orchestrator.events.model import Kind
from services.orchestrator.move import Context
from services.orchestrator.store.rows import NodeRow

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class NodeStatus:
    """What a node said last."""

    reachable: bool = False
    message: str = "not asked yet"
    """Why not reachable; empty if it is."""
    capabilities: agent_pb2.Capabilities | None = None
    vms: dict[str, agent_pb2.Evidence] = field(default_factory=dict)
    """By id; from the last answer, however old."""


VIEW_S_MAX = 1.0
"""How long a new leader waits for the first word of its nodes before it plans without it."""


class Nodes:
    """The nodes' last words."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._status: dict[str, NodeStatus] = {}
        self._viewed = asyncio.Event()
        """Each node was asked since this process leads."""
        self._viewed.set()
        context.agents.observe = self._saw

    def status(self, node: str) -> NodeStatus:
        """What is known of a node."""
        return self._status.get(node, NodeStatus())

    def vmm_state(self, node: str, vm_id: str) -> agent_pb2.VmmState.ValueType:
        """What the VM's VMM does on that node, as its agent said last."""
        evidence = self.status(node).vms.get(vm_id)
        return evidence.vmm_state if evidence else agent_pb2.VMM_STATE_UNSPECIFIED

    def _saw(self, evidence: agent_pb2.Evidence) -> None:
        """An agent has said this just now."""
        self._status.setdefault(evidence.node, NodeStatus()).vms[evidence.vm_id] = evidence

    async def load(self) -> None:
        """Open a channel to every node that the store knows."""
        for row in await self._context.store.fleet.nodes():
            self._context.agents.put(row.name, row.agent_address)

    def begin_view(self) -> None:
        """This process leads from now on: what it knew of the nodes was of another time."""
        self._viewed.clear()

    async def view(self) -> None:
        """Return once each node was asked: at once, but for the first moment of leading.

        Who chose before would choose among those that answer first. A node that does not answer
        holds up nobody for longer than VIEW_S_MAX.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(VIEW_S_MAX):
                await self._viewed.wait()
        self._viewed.set()

    async def put(self, name: str, agent_address: str, *, ask: bool = True) -> tuple[NodeRow, bool]:
        """Write a node, talk to it at its new address, `ask` it now. The bool: it is new."""
        row, is_new = await self._context.store.fleet.put_node(
            name, agent_address, now_ns=self._context.now_ns()
        )
        self._context.agents.put(name, agent_address)
        if ask:
            with contextlib.suppress(UnavailableError):
                await self.require(name)
        self._context.changes.publish(name, Kind.NODE)
        return row, is_new

    async def require(self, name: str) -> NodeStatus:
        """Ask a node now.

        Raises:
            UnavailableError: NODE_UNREACHABLE: it does not answer as the node that it should be.
        """
        status = self._status.setdefault(name, NodeStatus())
        agent = self._context.agents.get(name)
        try:
            hello = await agent.hello()
            vms = await agent.list_vms()
        except GodwitError as error:
            self._lost(name, error)
            raise UnavailableError(
                "NODE_UNREACHABLE",
                f"the agent of {name} at {agent.address} does not answer: {error.message}",
                hint="start the agent on that node, or register the node's present address",
                metadata={"node": name, "agent_address": agent.address},
            ) from error
        issued = await self._context.store.fleet.last_epochs()
        for evidence in vms:
            self._context.doubt.hear_epoch(
                name, evidence.vm_id, evidence.epoch_seen, issued.get(evidence.vm_id, 0)
            )
        status.reachable, status.message = True, ""
        status.capabilities = hello.capabilities
        status.vms = {evidence.vm_id: evidence for evidence in vms}
        metrics = self._context.metrics
        metrics.node_reachable.labels(name).set(1)
        if agent.certificate_ends_unix_s:
            left_s = agent.certificate_ends_unix_s - self._context.now_ns() / 1e9
            metrics.node_certificate.labels(name).set(left_s)
            metrics.node_by_pin.labels(name).set(agent.is_by_pin)
        return status

    async def poll(self) -> None:
        """Ask all nodes, again and again, each at its own pace: a dead one holds up nobody."""
        asked: set[str] = set()
        unheard: set[str] | None = None

        def heard(name: str) -> None:
            assert unheard is not None
            unheard.discard(name)
            if not unheard:
                self._viewed.set()

        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    names = {row.name for row in await self._context.store.fleet.nodes()}
                except GodwitError:
                    log.exception("nodes could not be listed")
                else:
                    if unheard is None:
                        unheard = set(names)
                        if not names:
                            self._viewed.set()
                    for name in names - asked:
                        group.create_task(self._keep_asking(name, heard))
                    asked |= names
                await asyncio.sleep(self._context.limits.beat_s)

    async def _keep_asking(self, name: str, heard: Callable[[str], None]) -> None:
        loop, limits = asyncio.get_running_loop(), self._context.limits
        listed_at = 0.0
        while True:
            was = self.status(name).reachable
            with contextlib.suppress(GodwitError):
                if was and loop.time() - listed_at < limits.poll_s:
                    await self._beat(name)
                else:
                    await self.require(name)
                    listed_at = loop.time()
            status = self.status(name)
            heard(name)
            if status.reachable != was:
                self._context.changes.publish(name, Kind.NODE)
                log.warning(
                    "node %s: %s", name, "reachable" if status.reachable else status.message
                )
            await asyncio.sleep(limits.beat_s)

    async def _beat(self, name: str) -> None:
        try:
            await self._context.agents.get(name).beat()
        except GodwitError as error:
            self._lost(name, error)
            raise

    def _lost(self, name: str, error: GodwitError) -> None:
        status = self._status.setdefault(name, NodeStatus())
        status.reachable, status.message = False, f"{error.reason}: {error.message}"
        self._context.metrics.node_reachable.labels(name).set(0)
