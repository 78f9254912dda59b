# SPDX-License-Identifier: Apache-2.0
"""The device state on its way from agent to agent (ADR 4).

    source VMM -pipe-> agent -gRPC-> agent -pipe-> destination VMM

It is loaded while it is still being saved. The last chunk is held back until length and hash are
known to be right, so that a VMM has not finished loading a state that is not what was saved. QEMU
itself would not notice: it takes a stream that ends in the description behind its devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
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
from services.common.hooks import reach
from services.fault_agent.drivers.api import Vmm
from services.fault_agent.evidence import write_fence
from services.fault_agent.fence import Fence
from services.fault_agent.journal import Transferred

log = logging.getLogger(__name__)

CHUNK_BYTES_MAX = 1 << 20
LOAD_TIMEOUT_S = 120.0
"""Before the decision a deadline is harmless: the orchestrator aborts long before this one."""
ASK_TIMEOUT_S = 5.0


@dataclass(slots=True)
class Saved:
    """What the source's VMM has written so far."""

    len_bytes: int = 0
    save_ns: int = 0
    error: Exception | None = None
    complete: bool = False


async def send_device_state(
    vmm: Vmm, fence: Fence, generation: int, destination_address: str
) -> Transferred:
    """Save from `vmm` and let the agent at `destination_address` load it.

    Raises:
        GodwitError: what failed: the save first, else what the destination said.
    """
    async with grpc_client.open_channel(destination_address) as channel:
        stub = fault_agent_service_pb2_grpc.FaultAgentServiceStub(channel)
        # Nothing is saved before there is somebody to take it.
        await grpc_client.wait_connected(
            channel, timeout_s=ASK_TIMEOUT_S, peer=f"the agent at {destination_address}"
        )
        if await vmm.has_saved():
            await _require_loaded(channel, stub, fence)
            return Transferred(epoch=fence.epoch, len_bytes=0, sha256="", save_ns=0, load_ns=0)
        outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()
        saved, digest = Saved(), hashlib.sha256()
        # Gathered, not grouped: a destination that gives up does not stop the save, whose end
        # leaves the source's VMM in a state that is known.
        loading: Awaitable[pb.LoadDeviceStateResponse] = grpc_client.call(
            channel,
            stub.LoadDeviceState,
            _messages(fence, generation, outgoing, saved, digest),
            timeout_s=LOAD_TIMEOUT_S,
            peer=f"the agent at {destination_address}",
        )
        _, answer = await asyncio.gather(
            _save(vmm, outgoing, saved), loading, return_exceptions=True
        )
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
    if answer.evidence.epoch_loaded != fence.epoch:
        raise FailedPreconditionError(
            "WRONG_STATE",
            f"the device state of {fence.vm_id} was saved before, and the destination has not"
            " loaded it",
            hint="abort: the guest can run on here",
        )


async def _save(vmm: Vmm, outgoing: asyncio.Queue[bytes | None], saved: Saved) -> None:
    began = time.monotonic_ns()
    try:
        async with contextlib.aclosing(vmm.save()) as chunks:
            async for chunk in chunks:
                outgoing.put_nowait(chunk)
        saved.complete = True
    except GodwitError as error:
        saved.error = error
    finally:
        saved.save_ns = time.monotonic_ns() - began
        outgoing.put_nowait(None)


async def _messages(
    fence: Fence,
    generation: int,
    outgoing: asyncio.Queue[bytes | None],
    saved: Saved,
    digest: hashlib._Hash,
) -> AsyncIterator[pb.LoadDeviceStateRequest]:
    yield pb.LoadDeviceStateRequest(
        header=pb.DeviceStateHeader(fence=write_fence(fence), generation=generation)
    )
    while (data := await outgoing.get()) is not None:
        digest.update(data)
        saved.len_bytes += len(data)
        for start in range(0, len(data), CHUNK_BYTES_MAX):
            yield pb.LoadDeviceStateRequest(chunk=data[start : start + CHUNK_BYTES_MAX])
    await reach("agent.transfer.after_save")
    # Without a trailer the destination knows that what it got is not a whole state.
    if saved.complete:
        yield pb.LoadDeviceStateRequest(
            trailer=pb.DeviceStateTrailer(len_bytes=saved.len_bytes, sha256=digest.digest())
        )


class Incoming:
    """A device state as it comes in."""

    def __init__(self, requests: AsyncIterator[pb.LoadDeviceStateRequest]) -> None:
        self._requests = requests
        self.first_byte_ns = 0
        """time.monotonic_ns() of the first byte; 0 before it."""

    async def header(self) -> pb.DeviceStateHeader:
        """The first message.

        Raises:
            InvalidArgumentError: FIELD_INVALID.
        """
        request = await anext(self._requests, None)
        if request is None or request.WhichOneof("body") != "header":
            raise InvalidArgumentError("FIELD_INVALID", "the first message must carry a header")
        if request.header.generation < 1:
            raise InvalidArgumentError("FIELD_INVALID", "header.generation must be >= 1")
        return request.header

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes; the last of them only after length and hash were found right.

        Raises:
            DataLossError: STATE_CORRUPT.
            InvalidArgumentError: FIELD_INVALID: a second header, or a chunk too long.
        """
        digest, len_bytes, held = hashlib.sha256(), 0, b""
        async for request in self._requests:
            self.first_byte_ns = self.first_byte_ns or time.monotonic_ns()
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
        raise DataLossError(
            "STATE_CORRUPT", f"the device state was cut off after {len_bytes} bytes"
        )

    async def drain(self) -> None:
        """Read the rest and forget it: the state is in the VMM already."""
        async for _ in self._requests:
            pass

    def _check(self, trailer: pb.DeviceStateTrailer, len_bytes: int, sha256: bytes) -> None:
        if trailer.len_bytes != len_bytes or trailer.sha256 != sha256 or len_bytes == 0:
            raise DataLossError(
                "STATE_CORRUPT",
                f"the device state has {len_bytes} bytes and hash {sha256.hex()},"
                f" sent were {trailer.len_bytes} with {trailer.sha256.hex()}",
            )
