# SPDX-License-Identifier: Apache-2.0
"""The page codec accepts, refuses, reads and writes exactly what protobuf does."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from godwit.common.v1 import common_pb2
from godwit.page.v1 import page_service_pb2 as pb
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.page_client import crc32c
from tests.native.programs import Program, program

U64 = st.integers(0, (1 << 64) - 1)
U32 = st.integers(0, (1 << 32) - 1)
ENUM = st.one_of(st.integers(0, 4), st.integers(-(1 << 31), (1 << 31) - 1))
TEXT = st.text(max_size=20)

REGION = st.builds(
    common_pb2.Region, region_id=U32, gpa_bytes=U64, size_bytes=U64, page_size_bytes=U32
)
IMAGE = st.builds(
    common_pb2.Image,
    image_id=TEXT,
    vm_id=TEXT,
    boot_id=TEXT,
    epoch=U64,
    inode=U64,
    generation=U64,
    state=ENUM,
    regions=st.lists(REGION, max_size=5),
)
HELLO = st.builds(
    pb.FetchHello,
    session_id=TEXT,
    image_id=TEXT,
    epoch=U64,
    lane=ENUM,
    traceparent=TEXT,
    zero_run_max_bytes=U64,
    accepts_lz4=st.booleans(),
    token=st.binary(max_size=40),
)
WANT = st.builds(pb.Want, offset_bytes=U64, len_bytes=U64, generation=U64)
HEARTBEAT = st.builds(pb.Heartbeat, sequence=U64)
PAGES = st.builds(
    pb.Pages,
    offset_bytes=U64,
    len_bytes=U64,
    encoding=ENUM,
    generation=U64,
    image_state=ENUM,
    crc32c=U32,
    data=st.binary(max_size=300),
)
READY = st.builds(pb.FetchReady, image=IMAGE, want_max_bytes=U64)
EXTENT = st.builds(common_pb2.Extent, offset_bytes=U64, len_bytes=U64)

REQUEST = st.one_of(
    st.builds(pb.FetchRequest, hello=HELLO),
    st.builds(pb.FetchRequest, want=WANT),
    st.builds(pb.FetchRequest, heartbeat=HEARTBEAT),
)
RESPONSE = st.one_of(
    st.builds(pb.FetchResponse, ready=READY),
    st.builds(pb.FetchResponse, pages=PAGES),
    st.builds(pb.FetchResponse, heartbeat=HEARTBEAT),
)
DESCRIBE_REQUEST = st.builds(pb.DescribeImageRequest, image_id=TEXT)
DESCRIBE_RESPONSE = st.builds(
    pb.DescribeImageResponse, image=IMAGE, data_extents=st.lists(EXTENT, max_size=8)
)

TYPES: dict[str, tuple[type[Message], st.SearchStrategy[Any]]] = {
    "request": (pb.FetchRequest, REQUEST),
    "response": (pb.FetchResponse, RESPONSE),
    "describe_request": (pb.DescribeImageRequest, DESCRIBE_REQUEST),
    "describe_response": (pb.DescribeImageResponse, DESCRIBE_RESPONSE),
}

REUSE = settings(
    max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@pytest.fixture(name="codec", scope="module")
def codec_fixture() -> Iterator[Program]:
    with program("page_wire_main") as codec:
        yield codec


def through(codec: Program, kind: str, data: bytes) -> bytes | None:
    """Decoded and encoded again by ours; None if it is refused."""
    answer = codec.ask(f"{kind} {data.hex()}")
    if answer == "malformed":
        return None
    assert answer.startswith("ok"), answer
    return bytes.fromhex(answer[3:])


def read_by_protobuf(kind: str, data: bytes) -> Message | None:
    """What protobuf makes of it, without what it does not know; None if it is refused."""
    message = TYPES[kind][0]()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return None
    message.DiscardUnknownFields()
    # Ours writes an image always; whether an empty one was there is not worth a flag.
    if isinstance(message, pb.FetchResponse) and message.HasField("ready"):
        message.ready.image.SetInParent()
    if isinstance(message, pb.DescribeImageResponse):
        message.image.SetInParent()
    return message


def check_agreement(codec: Program, kind: str, data: bytes) -> None:
    expected = read_by_protobuf(kind, data)
    got = through(codec, kind, data)
    if expected is None:
        assert got is None, f"protobuf refuses {data.hex()}, ours does not"
        return
    assert got is not None, f"ours refuses {data.hex()}, protobuf does not"
    assert TYPES[kind][0].FromString(got) == expected


@pytest.mark.parametrize("kind", TYPES)
@REUSE
@given(draw=st.data())
def test_messages_survive(codec: Program, kind: str, draw: st.DataObject) -> None:
    """What protobuf writes ours reads, what ours writes protobuf reads, to the same bytes."""
    message = draw.draw(TYPES[kind][1])
    data = message.SerializeToString(deterministic=True)
    expected = read_by_protobuf(kind, data)
    assert expected is not None
    got = through(codec, kind, data)
    assert got is not None
    assert got == expected.SerializeToString(deterministic=True)


@pytest.mark.parametrize("kind", TYPES)
@REUSE
@given(draw=st.data())
def test_joined_messages_are_merged(codec: Program, kind: str, draw: st.DataObject) -> None:
    """Two messages end to end are one, merged: the last of a oneof and of a scalar wins."""
    first, second = draw.draw(TYPES[kind][1]), draw.draw(TYPES[kind][1])
    check_agreement(codec, kind, first.SerializeToString() + second.SerializeToString())


@pytest.mark.parametrize("kind", TYPES)
@REUSE
@given(draw=st.data())
def test_unknown_fields_are_passed_over(codec: Program, kind: str, draw: st.DataObject) -> None:
    """Messages of another type: known numbers of other wire types, unknown ones, groups."""
    other = draw.draw(st.sampled_from(sorted(TYPES)))
    group = draw.draw(st.sampled_from([b"", b"\xa3\x06\x08\x01\xa4\x06", b"\xa3\x06", b"\xa4\x06"]))
    message = draw.draw(TYPES[other][1])
    check_agreement(codec, kind, message.SerializeToString() + group)


@pytest.mark.parametrize("kind", TYPES)
@REUSE
@given(draw=st.data())
def test_wounded_messages_are_judged_alike(codec: Program, kind: str, draw: st.DataObject) -> None:
    """Cut anywhere, a few bytes changed: refused by both or read alike."""
    data = bytearray(draw.draw(TYPES[kind][1]).SerializeToString())
    for _ in range(draw.draw(st.integers(0, 3))):
        if data:
            data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.integers(0, len(data)))
    check_agreement(codec, kind, bytes(data[: cut if draw.draw(st.booleans()) else len(data)]))


@pytest.mark.parametrize("kind", TYPES)
@REUSE
@given(data=st.binary(max_size=60))
def test_noise_is_judged_alike(codec: Program, kind: str, data: bytes) -> None:
    """Bytes from anywhere."""
    check_agreement(codec, kind, data)


@REUSE
@given(pages=PAGES)
def test_the_checksum_is_the_protos(codec: Program, pages: pb.Pages) -> None:
    """CRC-32C over the 32 bytes that the proto spells out, then the data; by another table."""
    header = struct.pack(
        "<QQQII",
        pages.offset_bytes,
        pages.len_bytes,
        pages.generation,
        pages.encoding & 0xFFFFFFFF,
        pages.image_state & 0xFFFFFFFF,
    )
    data = pb.FetchResponse(pages=pages).SerializeToString()
    assert codec.ask(f"crc {data.hex()}") == f"crc {crc32c(header + pages.data)}"
