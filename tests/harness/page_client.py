# SPDX-License-Identifier: Apache-2.0
"""A PageService client on grpcio: the interop half of every test of our page server.

It believes nothing: each message's CRC, range, generation and state are checked.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self, TypeAlias

import grpc.aio
from godwit.common.v1 import common_pb2
from godwit.page.v1 import page_service_pb2 as pb
from godwit.page.v1 import page_service_pb2_grpc as pb_grpc

PAGE = 4096

Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.FetchRequest, pb.FetchResponse]"


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _bit in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _crc32c_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), slow and independent of ours. Source: RFC 3720 B.4."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF


def check_crc(pages: pb.Pages) -> None:
    """Raise AssertionError unless the message is as it was sent."""
    header = struct.pack(
        "<QQQII",
        pages.offset_bytes,
        pages.len_bytes,
        pages.generation,
        pages.encoding,
        pages.image_state,
    )
    assert crc32c(header + pages.data) == pages.crc32c, f"CRC differs at {pages.offset_bytes:#x}"


class Fetch:
    """One open Fetch stream. `ready` is set when it is entered."""

    def __init__(self, call: Call, ready: pb.FetchReady) -> None:
        self.call = call
        self.ready = ready

    async def _next(self) -> pb.Pages:
        """The next message of pages; heartbeats are passed over."""
        while True:
            response = await self.call.read()
            assert isinstance(response, pb.FetchResponse), "ended with OK, too early"
            if response.WhichOneof("body") == "pages":
                return response.pages
            assert response.WhichOneof("body") == "heartbeat"

    async def end(self) -> grpc.aio.AioRpcError:
        """How the server ends the stream, which must be with an error."""
        try:
            while isinstance(await self.call.read(), pb.FetchResponse):
                pass
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError("the stream ended with OK")

    async def read(
        self, offset: int, len_bytes: int = PAGE, *, generation: int, final: bool = True
    ) -> bytes:
        """What the guest has there. `final`: every message must be of a FROZEN image.

        Raises:
            grpc.aio.AioRpcError: the stream ended instead.
        """
        want = pb.Want(offset_bytes=offset, len_bytes=len_bytes, generation=generation)
        await self.call.write(pb.FetchRequest(want=want))
        content = b""
        while len(content) < len_bytes:
            pages = await self._next()
            check_crc(pages)
            assert pages.offset_bytes == offset + len(content), "out of order"
            assert pages.generation == generation
            assert (pages.image_state == common_pb2.IMAGE_STATE_FROZEN) == final
            if pages.encoding == pb.ENCODING_ZERO:
                assert not pages.data
                content += bytes(pages.len_bytes)
            else:
                assert pages.encoding == pb.ENCODING_RAW
                assert len(pages.data) == pages.len_bytes
                content += pages.data
        assert len(content) == len_bytes, "more than was asked for"
        return content


class PageClient:
    """A destination, as far as a page server can tell."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", 8 << 20),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 200),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self._stub = pb_grpc.PageServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def describe(
        self, image_id: str, *, wait_for_ready: bool = False
    ) -> pb.DescribeImageResponse:
        """The image and where it has data."""
        request = pb.DescribeImageRequest(image_id=image_id)
        return await self._stub.DescribeImage(request, timeout=60, wait_for_ready=wait_for_ready)

    @contextlib.asynccontextmanager
    async def fetch(
        self, image_id: str, *, epoch: int, lane: pb.Lane.ValueType = pb.LANE_DEMAND
    ) -> AsyncIterator[Fetch]:
        """A Fetch stream for the length of the block; half-closed and drained at its end.

        Raises:
            grpc.aio.AioRpcError: the server refused it.
        """
        call = self._stub.Fetch()
        try:
            hello = pb.FetchHello(session_id="test", image_id=image_id, epoch=epoch, lane=lane)
            await call.write(pb.FetchRequest(hello=hello))
            response = await call.read()
            assert isinstance(response, pb.FetchResponse), "ended with OK, unanswered"
            assert response.WhichOneof("body") == "ready"
            yield Fetch(call, response.ready)
            if not call.done():
                await call.done_writing()
                while isinstance(response := await call.read(), pb.FetchResponse):
                    assert response.WhichOneof("body") == "heartbeat", "nobody asked for pages"
        finally:
            call.cancel()
