# SPDX-License-Identifier: Apache-2.0
"""The device state on its way from agent to agent (ADR 4).

    source VMM -pipe-> agent -gRPC-> agent -pipe-> destination VMM

It is loaded while it is still being saved. The last chunk is held back until length and hash are
known to be right, so that a VMM has not finished loading a state that is not what was saved. QEMU
itself would not notice: it takes a stream that ends in the description behind its devices.

The stream is opened before the guest is paused, so that the destination has admitted it by then.
The save begins as soon as the vCPUs are stopped, beside the publishing of the FROZEN image; the
destination's gate stays closed until `image_served` says that this is done, and a trailer before it
is refused: no page is asked for, and nothing is LOADED, before what is read is final.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import grpc.aio
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.agent.v1 import fault_agent_service_pb2_grpc

from services.common import grpc_client
from services.common.errors import (
    DataLossError,
    FailedPreconditionError,
    GodwitError,
    InvalidArgumentError,
)
from services.common.grpc_client import NotExecutedError
from services.common.hooks import reach
from services.common.peer_tls import PeerTls
from services.fault_agent.drivers.api import Vmm
from services.fault_agent.evidence import write_fence
from services.fault_agent.fence import Fence
from services.fault_agent.journal import Transferred
from services.fault_agent.private_map import refuse_private_pages

log = logging.getLogger(__name__)

CHUNK_BYTES_MAX = 1 << 20
LOAD_TIMEOUT_S = 120.0
"""Before the decision a deadline is harmless: the orchestrator aborts long before this one."""
ASK_TIMEOUT_S = 5.0
ADMIT_TIMEOUT_S = 3.0
"""Of the question whether anybody is there, before the guest is paused."""


@dataclass(slots=True)
class Saved:
    """What the source's VMM has written so far."""

    len_bytes: int = 0
    save_ns: int = 0
    error: Exception | None = None
    complete: bool = False


class Peer:
    """A connection to the agent of the destination: opened early, closed with the departure."""

    def __init__(self, address: str, tls: PeerTls | None = None) -> None:
        self.address = address
        self.channel = grpc_client.open_channel(address, tls)
        # Connects now and not when the guest stands still.
        self.channel.get_state(try_to_connect=True)

    async def close(self) -> None:
        """Close it; a transfer on it ends with an unknown outcome."""
        await self.channel.close()


class _Served:
    """In the queue of chunks: the FROZEN image is served."""


_Item = bytes | _Served | None


class Outgoing:
    """One device state on its way out. `run` in a task, the rest from the command that paused."""

    def __init__(
        self,
        vmm: Vmm,
        fence: Fence,
        generation: int,
        peer: Peer,
        *,
        may_have_saved: bool,
        keep: Callable[[bytes], None],
    ) -> None:
        """`keep` is called once, in a thread, with the whole state."""
        self._vmm = vmm
        self._keep = keep
        self._fence = fence
        self._generation = generation
        self._peer = peer
        self._may_have_saved = may_have_saved
        self._paused = asyncio.Event()
        self._queue: asyncio.Queue[_Item] = asyncio.Queue()
        self.ready = asyncio.Event()
        """There is somebody to take it: the guest may be paused. Or `run` has ended."""

    def save(self) -> None:
        """The guest is paused, and the journal says FROZEN."""
        self._paused.set()

    def image_served(self) -> None:
        """The page server serves the FROZEN image, and nothing else, under this generation."""
        self._queue.put_nowait(_Served())

    async def run(self) -> Transferred:
        """Save and let the agent of the destination load it.

        Raises:
            GodwitError: what failed: the save first, else what the destination said.
        """
        try:
            return await self._run()
        finally:
            self.ready.set()

    async def _run(self) -> Transferred:
        channel, peer = self._peer.channel, f"the agent at {self._peer.address}"
        stub = fault_agent_service_pb2_grpc.FaultAgentServiceStub(channel)
        # Nothing is paused or saved before there is somebody to take it.
        await grpc_client.wait_connected(channel, timeout_s=ASK_TIMEOUT_S, peer=peer)
        fence = self._fence
        if self._may_have_saved and await self._vmm.has_saved():
            await _require_loaded(channel, stub, fence)
            return Transferred(epoch=fence.epoch, len_bytes=0, sha256="", save_ns=0, load_ns=0)
        await _require_answer(channel, stub, fence, peer)
        self.ready.set()
        saved, digest = Saved(), hashlib.sha256()
        # Gathered, not grouped: a destination that gives up does not stop the save, whose end
        # leaves the source's VMM in a state that is known.
        loading: Awaitable[pb.LoadDeviceStateResponse] = grpc_client.call(
            channel,
            stub.LoadDeviceState,
            self._messages(saved, digest),
            timeout_s=LOAD_TIMEOUT_S,
            peer=peer,
        )
        _, answer = await asyncio.gather(self._save(saved), loading, return_exceptions=True)
        if saved.error is not None:
            raise saved.error
        if isinstance(answer, BaseException):
            raise answer
        return Transferred(
            epoch=fence.epoch,
            len_bytes=saved.len_bytes,
            sha256=digest.hexdigest(),
            save_ns=saved.save_ns,
            load_ns=answer.load_ns,
        )

    async def _save(self, saved: Saved) -> None:
        await self._paused.wait()
        began, state = time.monotonic_ns(), bytearray()
        try:
            async with contextlib.aclosing(self._vmm.save()) as chunks:
                async for chunk in chunks:
                    self._queue.put_nowait(chunk)
                    state += chunk
            saved.complete = True
        except GodwitError as error:
            saved.error = error
        finally:
            saved.save_ns = time.monotonic_ns() - began
            self._queue.put_nowait(None)
        if saved.complete:
            # While the destination loads it. Before Pause is answered: a Seal may follow.
            try:
                await asyncio.to_thread(self._keep, bytes(state))
            except OSError as error:
                log.warning("the device state of %s is not kept: %s", self._fence.vm_id, error)

    async def _messages(
        self, saved: Saved, digest: hashlib._Hash
    ) -> AsyncIterator[pb.LoadDeviceStateRequest]:
        yield pb.LoadDeviceStateRequest(
            header=pb.DeviceStateHeader(
                fence=write_fence(self._fence), generation=self._generation, image_pending=True
            )
        )
        served = ended = False
        while not (served and ended):
            item = await self._queue.get()
            if isinstance(item, _Served):
                served = True
                yield pb.LoadDeviceStateRequest(image_served=pb.ImageServed())
                continue
            if item is None:
                ended = True
                # Without a trailer the destination knows that what it got is not a whole state.
                if not saved.complete:
                    return
                continue
            digest.update(item)
            saved.len_bytes += len(item)
            for start in range(0, len(item), CHUNK_BYTES_MAX):
                yield pb.LoadDeviceStateRequest(chunk=item[start : start + CHUNK_BYTES_MAX])
        await reach("agent.transfer.after_save")
        yield pb.LoadDeviceStateRequest(
            trailer=pb.DeviceStateTrailer(len_bytes=saved.len_bytes, sha256=digest.digest())
        )


async def _require_answer(
    channel: grpc.aio.Channel,
    stub: fault_agent_service_pb2_grpc.FaultAgentServiceStub,
    fence: Fence,
    peer: str,
) -> None:
    """A connection that was there a minute ago may end in a cut: only an answer proves a way.

    Raises:
        NotExecutedError: there is none; the guest need not be paused for nothing.
    """
    try:
        await grpc_client.call(
            channel,
            stub.Describe,
            pb.DescribeRequest(vm_id=fence.vm_id),
            timeout_s=ADMIT_TIMEOUT_S,
            peer=peer,
        )
    except GodwitError as error:
        raise NotExecutedError(
            "PEER_UNREACHABLE",
            f"{peer} does not answer: {error.message}; nothing was sent",
            hint="check the agent there and the network between the nodes",
        ) from error


async def _require_loaded(
    channel: grpc.aio.Channel,
    stub: fault_agent_service_pb2_grpc.FaultAgentServiceStub,
    fence: Fence,
) -> None:
    """Accept a former attempt, whose answer was lost, if it succeeded.

    Raises:
        FailedPreconditionError: WRONG_STATE: it did not; a state is saved once.
    """
    answer = await grpc_client.call(
        channel,
        stub.Describe,
        pb.DescribeRequest(vm_id=fence.vm_id),
        timeout_s=ASK_TIMEOUT_S,
        peer="the destination's agent",
    )
    dead = answer.evidence.vmm_state == pb.VMM_STATE_DEAD
    if answer.evidence.epoch_loaded != fence.epoch or dead:
        raise FailedPreconditionError(
            "WRONG_STATE",
            f"the device state of {fence.vm_id} was saved before, and the destination has not"
            " loaded it, or what it was loaded into has died",
            hint="abort: the guest can run on here",
        )


class Incoming:
    """A device state as it comes in."""

    def __init__(self, requests: AsyncIterator[pb.LoadDeviceStateRequest]) -> None:
        self._requests = requests
        self._first: pb.LoadDeviceStateRequest | None = None
        self._gate_opens: Callable[[], None] | None = None
        self.first_byte_ns = 0
        """time.monotonic_ns() of the first byte; 0 before it."""

    async def header(self) -> pb.DeviceStateHeader:
        """The first message.

        Raises:
            InvalidArgumentError: FIELD_INVALID, PRIVATE_MAP_INVALID.
            FailedPreconditionError: PRIVATE_MEMORY_UNSUPPORTED.
        """
        request = await anext(self._requests, None)
        if request is None or request.WhichOneof("body") != "header":
            raise InvalidArgumentError("FIELD_INVALID", "the first message must carry a header")
        if request.header.generation < 1:
            raise InvalidArgumentError("FIELD_INVALID", "header.generation must be >= 1")
        refuse_private_pages(request.header.private_map)
        return request.header

    def when_served(self, open_gate: Callable[[], None]) -> None:
        """The header says image_pending: `open_gate` is called once, at `image_served`."""
        self._gate_opens = open_gate

    async def wait_first(self) -> None:
        """Return when the first byte is there: until then the VMM has not been touched.

        Raises:
            DataLossError: STATE_CORRUPT: there is none.
            InvalidArgumentError: FIELD_INVALID.
        """
        self._first = await self._next()
        if self._first is None or self._first.WhichOneof("body") != "chunk":
            raise DataLossError("STATE_CORRUPT", "the device state was cut off before it began")
        self.first_byte_ns = time.monotonic_ns()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes; the last of them only after length and hash were found right.

        Raises:
            DataLossError: STATE_CORRUPT.
            InvalidArgumentError: FIELD_INVALID: a second header, a chunk too long, a trailer before
                the image is served.
        """
        digest, len_bytes, held = hashlib.sha256(), 0, b""
        request, self._first = self._first or await self._next(), None
        while request is not None:
            body = request.WhichOneof("body")
            if body == "trailer":
                self._check(request.trailer, len_bytes, digest.digest())
                yield held
                return
            if body != "chunk" or not 0 < len(request.chunk) <= CHUNK_BYTES_MAX:
                raise InvalidArgumentError(
                    "FIELD_INVALID", f"a chunk has 1..{CHUNK_BYTES_MAX} bytes, this is {body}"
                )
            digest.update(request.chunk)
            len_bytes += len(request.chunk)
            if held:
                yield held
            held = request.chunk
            request = await self._next()
        raise DataLossError(
            "STATE_CORRUPT", f"the device state was cut off after {len_bytes} bytes"
        )

    async def drain(self) -> None:
        """Read the rest and forget it: the state is in the VMM already."""
        async for _ in self._requests:
            pass

    async def _next(self) -> pb.LoadDeviceStateRequest | None:
        """The next chunk or trailer; None at the end. Opens the gate on the way."""
        async for request in self._requests:
            body = request.WhichOneof("body")
            if body == "trailer" and self._gate_opens is not None:
                raise InvalidArgumentError("FIELD_INVALID", "a trailer before image_served")
            if body != "image_served":
                return request
            if self._gate_opens is None:
                raise InvalidArgumentError("FIELD_INVALID", "an image_served that none waits for")
            refuse_private_pages(request.image_served.private_map)
            open_gate, self._gate_opens = self._gate_opens, None
            open_gate()
        return None

    def _check(self, trailer: pb.DeviceStateTrailer, len_bytes: int, sha256: bytes) -> None:
        if trailer.len_bytes != len_bytes or trailer.sha256 != sha256 or len_bytes == 0:
            raise DataLossError(
                "STATE_CORRUPT",
                f"the device state has {len_bytes} bytes and hash {sha256.hex()},"
                f" sent were {trailer.len_bytes} with {trailer.sha256.hex()}",
            )
