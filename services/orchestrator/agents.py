# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's end of FaultAgentService: one open channel a node, evidence checked."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import grpc.aio
from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from godwit.agent.v1 import fault_agent_service_pb2_grpc as agent_grpc
from google.protobuf.message import Message

from services.common import grpc_client
from services.common.errors import GodwitError, InternalError, NotFoundError, UnavailableError
from services.common.peer_tls import PeerTls, node_name

if TYPE_CHECKING:
    from services.common.tls import Certificates

PROTOCOL_VERSION_MIN = 1
PROTOCOL_VERSION_MAX = 1

_Response = TypeVar("_Response", bound=Message)

log = logging.getLogger(__name__)


Observe = Callable[[agent_pb2.Evidence], None]
"""Hears every evidence that any answer carries."""
RefusedBy = Callable[[str, str], None]
"""Hears (node, incarnation) of a node that obeys another store than ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long an answer may take, by what is asked. Seconds. Expiry proves nothing (I8)."""

    hello_s: float = 2.0
    describe_s: float = 2.0
    preflight_s: float = 15.0
    start_s: float = 60.0
    prepare_s: float = 60.0
    pause_s: float = 5.0
    transfer_s: float = 20.0
    activate_s: float = 10.0
    seal_s: float = 10.0
    undo_s: float = 10.0
    release_s: float = 30.0
    connect_s: float = 2.0
    beat_s: float = 1.5
    silence_s: float = 3.0
    """Of a stream of progress, which speaks several times a second."""


class AgentClient:
    """Calls to one node's agent. Raises what grpc_client raises."""

    def __init__(
        self,
        node: str,
        address: str,
        incarnation: str,
        deadlines: Deadlines,
        observe: Observe,
        refused_by: RefusedBy,
        certificates: Certificates | None = None,
    ) -> None:
        self.node = node
        self.address = address
        self._observe = observe
        self._refused_by = refused_by
        self._incarnation = incarnation
        self._deadlines = deadlines
        self._certificates = certificates
        self.pin = b""
        """The node's continuation certificate (services.common.continuation), PEM; empty: none."""
        self.certificate_ends_unix_s = 0
        """The node's, as it said last; 0: it has not."""
        tls = (
            PeerTls(certificates=certificates, name=node_name(node), pin=lambda: self.pin)
            if certificates
            else None
        )
        self._channel = grpc_client.open_channel(address, tls)
        self._stub = agent_grpc.FaultAgentServiceStub(self._channel)

    @property
    def is_by_pin(self) -> bool:
        """The node is known by its key alone: no certificate has made the connection."""
        return bool(getattr(self._channel, "is_by_pin", False))

    async def close(self) -> None:
        """Close the channel; calls under way end with an unknown outcome."""
        await self._channel.close()

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Any, _Response],
        request: Message,
        timeout_s: float,
        traceparent: str = "",
    ) -> _Response:
        if "fence" in request.DESCRIPTOR.fields_by_name:
            request.fence.store_incarnation = self._incarnation  # type: ignore[attr-defined]
        try:
            answer = await self._send(method, request, timeout_s, traceparent)
        except GodwitError as error:
            if error.reason == "STORE_IN_DOUBT":
                self._refused_by(self.node, error.metadata.get("store_incarnation", "another"))
            raise
        if "evidence" in answer.DESCRIPTOR.fields_by_name:
            self._observe(answer.evidence)  # type: ignore[attr-defined]
        return answer

    async def _send(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Any, _Response],
        request: Message,
        timeout_s: float,
        traceparent: str,
    ) -> _Response:
        return await grpc_client.call(
            self._channel,
            method,
            request,
            timeout_s=timeout_s,
            connect_s=self._deadlines.connect_s,
            traceparent=traceparent,
            peer=self.node,
        )

    async def beat(self) -> None:
        """Nothing but: is the agent there?"""
        await grpc_client.beat(self._channel, timeout_s=self._deadlines.beat_s, peer=self.node)

    async def hello(self, *, adopt_store: bool = False) -> agent_pb2.HelloResponse:
        """Agree on a version. With `adopt_store` the node obeys this store only, from then on.

        Raises:
            UnavailableError: WRONG_NODE: another node listens at this address.
        """
        answer = await self._call(
            self._stub.Hello,
            agent_pb2.HelloRequest(
                version_min=PROTOCOL_VERSION_MIN,
                version_max=PROTOCOL_VERSION_MAX,
                store_incarnation=self._incarnation,
                adopt_store=adopt_store,
                continuation=(
                    self._certificates.loaded.continuation_der if self._certificates else b""
                ),
            ),
            self._deadlines.hello_s,
        )
        self._check_node(answer.node)
        self._take_pin(answer)
        if answer.store_incarnation and answer.store_incarnation != self._incarnation:
            self._refused_by(self.node, answer.store_incarnation)
        return answer

    def _take_pin(self, answer: agent_pb2.HelloResponse) -> None:
        self.certificate_ends_unix_s = answer.certificate_ends_unix_s
        # What came over a connection by keys alone proves nothing new.
        if self._certificates is None or not answer.continuation or self.is_by_pin:
            return
        from services.common import continuation

        try:
            self.pin = continuation.check(
                answer.continuation, dns_name=node_name(self.node), key=answer.certificate_key
            )
        except GodwitError as error:
            log.warning("%s cannot be pinned: %s", self.node, error)

    def _check_node(self, says: str) -> None:
        if says != self.node:
            raise UnavailableError(
                "WRONG_NODE",
                f"the agent at {self.address} is node {says!r}, not {self.node!r}",
                hint="register both nodes with their own addresses",
                metadata={"node": self.node},
            )

    async def describe(self, vm_id: str) -> agent_pb2.Evidence:
        """What the node can prove about a VM."""
        answer = await self._call(
            self._stub.Describe,
            agent_pb2.DescribeRequest(vm_id=vm_id),
            self._deadlines.describe_s,
        )
        self._check_node(answer.evidence.node)
        if answer.evidence.vm_id != vm_id:
            raise InternalError(
                "EVIDENCE_MISPLACED",
                f"{self.node} was asked about {vm_id} and spoke of {answer.evidence.vm_id!r}",
            )
        return answer.evidence

    async def list_vms(self) -> list[agent_pb2.Evidence]:
        """What the node can prove about every VM that it knows."""
        answer = await self._call(
            self._stub.ListVms, agent_pb2.ListVmsRequest(), self._deadlines.describe_s
        )
        return list(answer.vms)

    async def preflight(self, request: agent_pb2.PreflightRequest) -> agent_pb2.PreflightResponse:
        """Check one side."""
        return await self._call(self._stub.Preflight, request, self._deadlines.preflight_s)

    async def start_vm(self, request: agent_pb2.StartVmRequest) -> agent_pb2.Evidence:
        """Start a VM."""
        answer = await self._call(self._stub.StartVm, request, self._deadlines.start_s)
        return answer.evidence

    async def stop_vm(self, request: agent_pb2.StopVmRequest) -> agent_pb2.Evidence:
        """Stop a VM."""
        answer = await self._call(self._stub.StopVm, request, self._deadlines.undo_s)
        return answer.evidence

    async def prepare(
        self, request: agent_pb2.PrepareRequest, *, traceparent: str
    ) -> agent_pb2.PrepareResponse:
        """Make one side ready."""
        return await self._call(self._stub.Prepare, request, self._deadlines.prepare_s, traceparent)

    async def pause(
        self, request: agent_pb2.PauseRequest, *, traceparent: str
    ) -> agent_pb2.PauseResponse:
        """Stop the vCPUs, and send the device state across if the request says where to."""
        timeout_s = self._deadlines.pause_s
        if request.transfer_to:
            timeout_s += self._deadlines.transfer_s
        return await self._call(self._stub.Pause, request, timeout_s, traceparent)

    async def transfer(
        self, request: agent_pb2.TransferDeviceStateRequest, *, traceparent: str
    ) -> agent_pb2.TransferDeviceStateResponse:
        """Send the device state across."""
        return await self._call(
            self._stub.TransferDeviceState, request, self._deadlines.transfer_s, traceparent
        )

    async def activate(
        self, request: agent_pb2.ActivateRequest, *, traceparent: str
    ) -> agent_pb2.ActivateResponse:
        """Let the guest run at the destination."""
        return await self._call(
            self._stub.Activate, request, self._deadlines.activate_s, traceparent
        )

    async def seal(
        self, request: agent_pb2.SealRequest, *, traceparent: str
    ) -> agent_pb2.SealResponse:
        """Never let it run at the source again."""
        return await self._call(self._stub.Seal, request, self._deadlines.seal_s, traceparent)

    async def resume(self, request: agent_pb2.ResumeRequest) -> agent_pb2.Evidence:
        """Let the guest run on at the source."""
        answer = await self._call(self._stub.Resume, request, self._deadlines.undo_s)
        return answer.evidence

    async def abort(self, request: agent_pb2.AbortRequest) -> agent_pb2.Evidence:
        """Take back what Prepare did."""
        answer = await self._call(self._stub.Abort, request, self._deadlines.undo_s)
        return answer.evidence

    async def recall(self, request: agent_pb2.RecallRequest) -> agent_pb2.Evidence:
        """Take a COMMITTED back."""
        answer = await self._call(self._stub.Recall, request, self._deadlines.undo_s)
        return answer.evidence

    async def release(self, request: agent_pb2.ReleaseRequest) -> agent_pb2.Evidence:
        """Free the memory, or end the arrival's bookkeeping."""
        answer = await self._call(self._stub.Release, request, self._deadlines.release_s)
        return answer.evidence

    def watch(
        self, request: agent_pb2.WatchProgressRequest
    ) -> AsyncGenerator[agent_pb2.WatchProgressResponse, None]:
        """How memory arrives, until COMPLETE or ENDED. Use under aclosing."""
        return grpc_client.stream(
            self._channel,
            self._stub.WatchProgress,
            request,
            connect_s=self._deadlines.connect_s,
            silence_s_max=self._deadlines.silence_s,
            peer=self.node,
        )


class AgentPool:
    """The clients of all nodes. Channels stay open: no switchover waits for a handshake."""

    def __init__(
        self,
        incarnation: str,
        deadlines: Deadlines | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        """`certificates`: ours; None: agents are called in plaintext."""
        self._incarnation = incarnation
        self._certificates = certificates
        self._deadlines = deadlines or Deadlines()
        self._clients: dict[str, AgentClient] = {}
        self._retired: list[AgentClient] = []
        self.observe: Observe = lambda _evidence: None
        self.refused_by: RefusedBy = lambda _node, _incarnation: None

    def _heard(self, evidence: agent_pb2.Evidence) -> None:
        self.observe(evidence)

    def _refused_by(self, node: str, incarnation: str) -> None:
        self.refused_by(node, incarnation)

    @property
    def speaks_tls(self) -> bool:
        """Agents are called with TLS."""
        return self._certificates is not None

    def put(self, node: str, address: str) -> AgentClient:
        """Say where a node's agent listens.

        A channel to an older address stays open for the calls that are under way on it.
        """
        present = self._clients.get(node)
        if present and present.address == address:
            return present
        if present:
            self._retired.append(present)
        client = AgentClient(
            node,
            address,
            self._incarnation,
            self._deadlines,
            self._heard,
            self._refused_by,
            self._certificates,
        )
        if present:
            # It is the same node, wherever it listens.
            client.pin = present.pin
            client.certificate_ends_unix_s = present.certificate_ends_unix_s
        self._clients[node] = client
        return client

    def get(self, node: str) -> AgentClient:
        """The client of a node.

        Raises:
            NotFoundError: NODE_UNKNOWN.
        """
        client = self._clients.get(node)
        if client is None:
            raise node_unknown(node)
        return client

    def own_certificate_left_s(self) -> float | None:
        """How long our own certificate is good; negative: it has ended; None: plaintext."""
        if self._certificates is None:
            return None
        return min(self._certificates.seconds_left().values())

    async def describe(self, node: str, vm_id: str) -> agent_pb2.Evidence | None:
        """Evidence, or None where the node cannot be asked now."""
        try:
            return await self.get(node).describe(vm_id)
        except GodwitError:
            return None

    async def close(self) -> None:
        """Close every channel."""
        for client in (*self._clients.values(), *self._retired):
            await client.close()


def node_unknown(name: str) -> NotFoundError:
    """The refusal of a node that the fleet does not have."""
    return NotFoundError(
        "NODE_UNKNOWN",
        f"there is no node {name!r}",
        hint="list the nodes; an agent registers its node when it starts",
        metadata={"node": name},
    )
