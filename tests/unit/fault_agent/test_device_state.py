# SPDX-License-Identifier: Apache-2.0
"""Promise: a VMM gets the end of a device state only if all of it is what was sent."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import GodwitError
from services.fault_agent.device_state import CHUNK_BYTES_MAX, Incoming

HEADER = pb.LoadDeviceStateRequest(header=pb.DeviceStateHeader(generation=3))


async def stream(
    *requests: pb.LoadDeviceStateRequest,
) -> AsyncIterator[pb.LoadDeviceStateRequest]:
    for request in requests:
        yield request


def chunk(data: bytes) -> pb.LoadDeviceStateRequest:
    return pb.LoadDeviceStateRequest(chunk=data)


def trailer(data: bytes, *, len_bytes: int | None = None) -> pb.LoadDeviceStateRequest:
    return pb.LoadDeviceStateRequest(
        trailer=pb.DeviceStateTrailer(
            len_bytes=len(data) if len_bytes is None else len_bytes,
            sha256=hashlib.sha256(data).digest(),
        )
    )


async def fed(*requests: pb.LoadDeviceStateRequest) -> tuple[bytes, str]:
    """What reaches the VMM, and the reason why it ended early."""
    incoming, got = Incoming(stream(HEADER, *requests)), b""
    await incoming.header()
    try:
        async for data in incoming.chunks():
            got += data
    except GodwitError as error:
        return got, error.reason
    return got, ""


async def test_a_whole_state_is_fed() -> None:
    parts = [chunk(b"abc"), chunk(b"def"), trailer(b"abcdef")]
    assert await fed(*parts) == (b"abcdef", "")


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([chunk(b"abc"), chunk(b"def")], "STATE_CORRUPT"),
        ([chunk(b"abc"), chunk(b"def"), trailer(b"abcdeg")], "STATE_CORRUPT"),
        ([chunk(b"abc"), chunk(b"def"), trailer(b"abcdef", len_bytes=5)], "STATE_CORRUPT"),
        ([chunk(b"def"), chunk(b"abc"), trailer(b"abcdef")], "STATE_CORRUPT"),
        ([trailer(b"")], "STATE_CORRUPT"),
        ([], "STATE_CORRUPT"),
        ([chunk(b"abc"), HEADER], "FIELD_INVALID"),
        ([chunk(b"abc"), chunk(b""), trailer(b"abc")], "FIELD_INVALID"),
        ([chunk(bytes(CHUNK_BYTES_MAX + 1))], "FIELD_INVALID"),
        ([chunk(b"abc"), pb.LoadDeviceStateRequest()], "FIELD_INVALID"),
    ],
)
async def test_the_last_bytes_of_a_wrong_one_are_held_back(
    requests: Sequence[pb.LoadDeviceStateRequest], reason: str
) -> None:
    whole = b"".join(request.chunk for request in requests)
    got, why = await fed(*requests)
    assert why == reason
    assert len(got) < len(whole) or not whole


@pytest.mark.parametrize(
    "first", [chunk(b"x"), pb.LoadDeviceStateRequest(header=pb.DeviceStateHeader())]
)
async def test_it_begins_with_a_header(first: pb.LoadDeviceStateRequest) -> None:
    with pytest.raises(GodwitError) as refusal:
        await Incoming(stream(first)).header()
    assert refusal.value.reason == "FIELD_INVALID"


SERVED = pb.LoadDeviceStateRequest(image_served=pb.ImageServed())


async def gated(*requests: pb.LoadDeviceStateRequest) -> tuple[list[str], str]:
    """Chunks and the opening of the gate in their order, and the reason why it ended early."""
    seen: list[str] = []
    incoming = Incoming(stream(HEADER, *requests))
    await incoming.header()
    incoming.when_served(lambda: seen.append("gate"))
    try:
        await incoming.wait_first()
        seen.append("begun")
        async for data in incoming.chunks():
            seen += [data.decode()]
    except GodwitError as error:
        return seen, error.reason
    return seen, ""


@pytest.mark.parametrize(
    ("requests", "seen"),
    [
        ([SERVED, chunk(b"a"), trailer(b"a")], ["gate", "begun", "a"]),
        ([chunk(b"a"), SERVED, trailer(b"a")], ["begun", "gate", "a"]),
        ([chunk(b"a"), SERVED, chunk(b"b"), trailer(b"ab")], ["begun", "gate", "a", "b"]),
    ],
)
async def test_the_gate_opens_once_before_the_state_is_whole(
    requests: Sequence[pb.LoadDeviceStateRequest], seen: list[str]
) -> None:
    assert await gated(*requests) == (seen, "")


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([chunk(b"a"), trailer(b"a")], "FIELD_INVALID"),
        ([chunk(b"a"), trailer(b"a"), SERVED], "FIELD_INVALID"),
        ([SERVED, chunk(b"a"), SERVED, trailer(b"a")], "FIELD_INVALID"),
        ([chunk(b"a"), SERVED], "STATE_CORRUPT"),
    ],
)
async def test_a_state_without_a_served_image_is_never_whole(
    requests: Sequence[pb.LoadDeviceStateRequest], reason: str
) -> None:
    """Its memory could still be LIVE."""
    seen, why = await gated(*requests)
    assert why == reason
    assert "a" not in seen


@pytest.mark.parametrize("requests", [[], [SERVED], [SERVED, trailer(b"")]])
async def test_a_state_that_never_began_touches_nothing(
    requests: Sequence[pb.LoadDeviceStateRequest],
) -> None:
    seen, why = await gated(*requests)
    assert why == "STATE_CORRUPT"
    assert "begun" not in seen


async def test_an_image_served_that_was_not_announced_is_refused() -> None:
    assert await fed(chunk(b"a"), SERVED, trailer(b"a")) == (b"", "FIELD_INVALID")
