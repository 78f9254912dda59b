# SPDX-License-Identifier: Apache-2.0
"""The same Fetch through grpcio: a 4 KiB page and back, and 1 MiB wants with four in flight.

On the asynchronous API at both ends, the faster one here: a synchronous stream is fed by one thread
and written by another.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeAlias

import grpc.aio
from godwit.page.v1 import page_service_pb2 as pb
from godwit.page.v1 import page_service_pb2_grpc as pb_grpc

from tests.bench.grpcio_server import MESSAGE_BYTES_MAX
from tests.bench.processes import line, process

PAGE = 4096
MIB = 1 << 20
IN_FLIGHT = 4
_JUMP = 2654435761

Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.FetchRequest, pb.FetchResponse]"


class GrpcioFetch:
    """A client of one grpcio server over a memory of `mib`."""

    def __init__(self, port: int, mib: int) -> None:
        self._port = port
        self._len = mib * MIB

    def pages(self, count: int) -> list[float]:
        """Microseconds for each of `count` pages."""
        return asyncio.run(self._pages(count))

    def stream(self, mib: int) -> float:
        """MB/s."""
        return asyncio.run(self._stream(mib * MIB))

    @asynccontextmanager
    async def _call(self, lane: pb.Lane.ValueType) -> AsyncIterator[Call]:
        options = [
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.enable_http_proxy", 0),
        ]
        address = f"127.0.0.1:{self._port}"
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            call = pb_grpc.PageServiceStub(channel).Fetch()
            hello = pb.FetchHello(session_id="bench", image_id="bench", epoch=2, lane=lane)
            await call.write(pb.FetchRequest(hello=hello))
            await _read(call)
            yield call
            call.cancel()

    async def _pages(self, count: int) -> list[float]:
        samples = []
        async with self._call(pb.LANE_DEMAND) as call:
            for i in range(count):
                begin_ns = time.perf_counter_ns()
                await call.write(_want(i * _JUMP % (self._len // PAGE) * PAGE, PAGE))
                response = await _read(call)
                samples.append((time.perf_counter_ns() - begin_ns) / 1000)
                assert len(response.pages.data) == PAGE
        return samples

    async def _stream(self, len_bytes: int) -> float:
        async with self._call(pb.LANE_BULK) as call:
            begin_ns = time.perf_counter_ns()
            asked = got = 0
            while got < len_bytes:
                while asked < min(len_bytes, got + IN_FLIGHT * MIB):
                    await call.write(_want(asked % self._len, MIB))
                    asked += MIB
                got += len((await _read(call)).pages.data)
            return got / (time.perf_counter_ns() - begin_ns) * 1000


def _want(offset: int, len_bytes: int) -> pb.FetchRequest:
    return pb.FetchRequest(want=pb.Want(offset_bytes=offset, len_bytes=len_bytes, generation=1))


async def _read(call: Call) -> pb.FetchResponse:
    response = await call.read()
    assert isinstance(response, pb.FetchResponse), "the stream ended"
    return response


@contextmanager
def grpcio_fetch(memory: Path, mib: int) -> Iterator[GrpcioFetch]:
    """A grpcio server over a memory file, in a process of its own, and a client of it."""
    with process(sys.executable, "-m", "tests.bench.grpcio_server", memory) as server:
        yield GrpcioFetch(int(line(server)), mib)
