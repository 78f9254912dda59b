# SPDX-License-Identifier: Apache-2.0
"""A guest's memory arrives from a page server that is grpcio's: the agent takes it from any."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from godwit.common.v1 import common_pb2
from godwit.page.v1 import page_service_pb2 as pb
from godwit.page.v1 import page_service_pb2_grpc as pb_grpc

from services.pagecore.api import ArrivalPhase
from tests.harness.page_client import crc32c
from tests.harness.page_server import PAGE, page_node
from tests.native.test_pagecore_arrival import (
    CONTENT,
    PAGE_COUNT,
    Destination,
    arriving,
    expected,
    wait_phase,
)

pytestmark = pytest.mark.requires("uffd", "root")

GENERATION = 4


class GrpcioPageServer(pb_grpc.PageServiceServicer):
    """As page_service.proto says, in the fewest lines; can lie in one checksum."""

    def __init__(self) -> None:
        self.lanes: list[int] = []
        self.wrong_offset: int | None = None

    def pages(self, want: pb.Want) -> pb.Pages:
        data = CONTENT[want.offset_bytes : want.offset_bytes + want.len_bytes]
        zero = not any(data)
        pages = pb.Pages(
            offset_bytes=want.offset_bytes,
            len_bytes=want.len_bytes,
            encoding=pb.ENCODING_ZERO if zero else pb.ENCODING_RAW,
            generation=GENERATION,
            image_state=common_pb2.IMAGE_STATE_FROZEN,
            data=b"" if zero else data,
        )
        header = struct.pack(
            "<QQQII",
            pages.offset_bytes,
            pages.len_bytes,
            pages.generation,
            pages.encoding,
            pages.image_state,
        )
        pages.crc32c = crc32c(header + pages.data)
        if self.wrong_offset == want.offset_bytes:
            self.wrong_offset = None
            pages.crc32c ^= 1
        return pages

    async def DescribeImage(  # noqa: N802
        self, request: pb.DescribeImageRequest, context: Any
    ) -> pb.DescribeImageResponse:
        raise NotImplementedError

    async def Fetch(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.FetchRequest], context: Any
    ) -> AsyncIterator[pb.FetchResponse]:
        async for request in request_iterator:
            match request.WhichOneof("body"):
                case "hello":
                    self.lanes.append(request.hello.lane)
                    image = common_pb2.Image(
                        image_id=request.hello.image_id,
                        vm_id="web",
                        epoch=7,
                        boot_id="b",
                        generation=GENERATION,
                        state=common_pb2.IMAGE_STATE_FROZEN,
                        regions=[common_pb2.Region(size_bytes=len(CONTENT), page_size_bytes=PAGE)],
                    )
                    yield pb.FetchResponse(
                        ready=pb.FetchReady(image=image, want_max_bytes=32 * PAGE)
                    )
                case "want":
                    assert request.want.generation == GENERATION
                    yield pb.FetchResponse(pages=self.pages(request.want))
                case "heartbeat":
                    yield pb.FetchResponse(heartbeat=request.heartbeat)


@contextlib.contextmanager
def serving(servicer: GrpcioPageServer) -> Iterator[str]:
    """Its address. It serves in a loop and thread of its own: the test waits for its guest."""
    ports: queue.Queue[int] = queue.Queue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        server = grpc.aio.server()
        pb_grpc.add_PageServiceServicer_to_server(servicer, server)
        ports.put(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        yield f"127.0.0.1:{ports.get()}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@pytest.mark.parametrize("lies", [False, True], ids=["honest", "one-bad-checksum"])
def test_a_guest_arrives_whole_from_a_grpcio_server(tmp_path: Path, lies: bool) -> None:
    """By demand and by bulk; a page whose checksum is wrong is asked for again, never installed."""
    from services.pagecore.native import NativePageCore

    servicer = GrpcioPageServer()
    with (
        page_node(tmp_path) as node,
        serving(servicer) as address,
        contextlib.closing(
            Destination(NativePageCore(), node, address, minor=False)
        ) as destination,
        arriving(destination.core, destination.config) as arrival,
    ):
        wait_phase(arrival, ArrivalPhase.ARMED)
        if lies:
            servicer.wrong_offset = 500 * PAGE
        arrival.open_gate(GENERATION)
        assert destination.guest.read(500) == expected(500)
        arrival.start_bulk()
        wait_phase(arrival, ArrivalPhase.COMPLETE)
        status = arrival.status()
        assert (status.checksum_error_count > 0) == lies
        assert status.violation_count == 0
        assert status.demand_page_count >= 1
        assert status.zero_page_count > 0
        assert {pb.LANE_DEMAND, pb.LANE_BULK} <= set(servicer.lanes)
        assert destination.guest.read(0, PAGE_COUNT) == expected(0, PAGE_COUNT)
