# SPDX-License-Identifier: Apache-2.0
"""A plain PageService on grpcio, as one would write it: the peer of ours for the same Fetch.

    python -m tests.bench.grpcio_server FILE

It sums nothing, which no client of ours would take: a checksum in Python would be unfair to it.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import sys
from collections.abc import AsyncIterator, Awaitable

import grpc.aio
from godwit.common.v1 import common_pb2
from godwit.page.v1 import page_service_pb2 as pb
from godwit.page.v1 import page_service_pb2_grpc as pb_grpc

MESSAGE_BYTES_MAX = 8 << 20


class Servicer(pb_grpc.PageServiceServicer):
    """Answers wants from a mapping."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    async def DescribeImage(  # noqa: N802 - the name of the rpc
        self,
        request: pb.DescribeImageRequest,
        context: grpc.aio.ServicerContext[
            pb.DescribeImageRequest, Awaitable[pb.DescribeImageResponse]
        ],
    ) -> pb.DescribeImageResponse:
        raise NotImplementedError

    async def Fetch(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.FetchRequest],
        context: grpc.aio.ServicerContext[
            AsyncIterator[pb.FetchRequest], AsyncIterator[pb.FetchResponse]
        ],
    ) -> AsyncIterator[pb.FetchResponse]:
        async for request in request_iterator:
            if request.HasField("hello"):
                yield pb.FetchResponse(ready=pb.FetchReady(want_max_bytes=1 << 20))
            elif request.HasField("want"):
                yield self._answer(request.want)

    def _answer(self, want: pb.Want) -> pb.FetchResponse:
        end = want.offset_bytes + want.len_bytes
        return pb.FetchResponse(
            pages=pb.Pages(
                offset_bytes=want.offset_bytes,
                len_bytes=want.len_bytes,
                encoding=pb.ENCODING_RAW,
                generation=want.generation,
                image_state=common_pb2.IMAGE_STATE_FROZEN,
                data=self._memory[want.offset_bytes : end],
            )
        )


async def serve(path: str) -> None:
    """Serve the file until killed."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    server = grpc.aio.server(options=[("grpc.max_send_message_length", MESSAGE_BYTES_MAX)])
    pb_grpc.add_PageServiceServicer_to_server(Servicer(memory), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
