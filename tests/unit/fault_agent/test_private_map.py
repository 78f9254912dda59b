# SPDX-License-Identifier: Apache-2.0
"""Promise: a private map says the same on both sides, or neither side takes it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.common.v1 import common_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.common.vm_spec import VmSpec
from services.fault_agent import private_map
from services.fault_agent.arrivals import ArrivalOrder
from services.fault_agent.device_state import Incoming
from services.fault_agent.drivers.memory_map import memory_regions
from services.fault_agent.fence import Fence
from services.fault_agent.private_map import (
    PAGES_MAX,
    PrivateMap,
    PrivateMapError,
    PrivateMemoryUnsupportedError,
    refuse_private_pages,
)

PAGES = 100
ONE = PrivateMap(page_count=PAGES, runs=((3, 4),)).message()

BAD_RUNS = {
    "is empty": [(4, 0)],
    "of 1 pages at 2 must begin at 9": [(4, 4), (2, 1)],
    "of 8 pages at 6 must begin at 9": [(4, 4), (6, 8)],
    "of 1 pages at 8 must begin at 9": [(4, 4), (8, 1)],
    "of 2 pages at 99 ends after the guest's 100 pages": [(99, 2)],
    f"at {2**63} ends after the guest's 100 pages": [(2**63, 2**63)],
}


def bits_of(pages: set[int], page_count: int) -> bytes:
    bits = bytearray((page_count + 7) // 8)
    for page in pages:
        bits[page // 8] |= 1 << page % 8
    return bytes(bits)


@given(data=st.data(), page_count=st.integers(1, 400))
def test_it_comes_through_the_wire_as_it_was(data: st.DataObject, page_count: int) -> None:
    bitmap = bits_of(data.draw(st.sets(st.integers(0, page_count - 1))), page_count)
    with pytest.MonkeyPatch.context() as patch:
        # Runs must not be cut at the edges of chunks.
        patch.setattr(private_map, "_CHUNK_BYTES", 3)
        sent = PrivateMap.of_bitmap(bitmap, page_count)
    wire = sent.message().SerializeToString()
    got = PrivateMap.read(pb.PrivateMap.FromString(wire), page_count)
    assert got == sent
    assert got.bitmap() == bitmap
    assert got.private_count == sum(byte.bit_count() for byte in bitmap)


def test_it_is_compact() -> None:
    """A guest of 1 TiB, private but for a thousand pages: 14 KB, not a bitmap of 32 MiB."""
    page_count = 1 << 28
    shared = [i * 250_000 for i in range(1, 1001)]
    ends = [*shared, page_count]
    starts = [0, *(page + 1 for page in shared)]
    runs = tuple((first, end - first) for first, end in zip(starts, ends, strict=True))
    message = PrivateMap(page_count=page_count, runs=runs).message()
    assert message.ByteSize() < 14 * len(runs) + 16


@pytest.mark.parametrize(("why", "runs"), BAD_RUNS.items())
def test_a_sender_cannot_make_a_wrong_one(why: str, runs: list[tuple[int, int]]) -> None:
    with pytest.raises(PrivateMapError, match=why):
        PrivateMap(page_count=PAGES, runs=tuple(runs))


@pytest.mark.parametrize(("why", "runs"), BAD_RUNS.items())
def test_a_receiver_refuses_a_wrong_one(why: str, runs: list[tuple[int, int]]) -> None:
    message = pb.PrivateMap(
        page_count=PAGES,
        private_runs=[pb.PageRun(first_page=first, page_count=count) for first, count in runs],
    )
    with pytest.raises(PrivateMapError, match=why) as refusal:
        PrivateMap.read(message, PAGES)
    assert refusal.value.reason == "PRIVATE_MAP_INVALID"
    assert refusal.value.grpc_status is grpc.StatusCode.INVALID_ARGUMENT


@given(
    runs=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=4),
    page_count=st.integers(0, 2**64 - 1),
)
def test_what_is_taken_keeps_the_rules(runs: list[tuple[int, int]], page_count: int) -> None:
    message = pb.PrivateMap(
        page_count=page_count,
        private_runs=[pb.PageRun(first_page=first, page_count=count) for first, count in runs],
    )
    try:
        taken = PrivateMap.read(message, page_count)
    except PrivateMapError:
        return
    end = -1
    for first, count in taken.runs:
        assert count > 0
        assert first > end
        end = first + count
    assert end <= page_count


@pytest.mark.parametrize("page_count", [0, -1, PAGES_MAX + 1])
def test_a_guest_has_pages(page_count: int) -> None:
    with pytest.raises(PrivateMapError, match="page_count"):
        PrivateMap(page_count=page_count, runs=())


def test_it_is_of_this_guest() -> None:
    with pytest.raises(PrivateMapError, match="it is of 100 pages, the guest has 101"):
        PrivateMap.read(ONE, PAGES + 1)


def test_a_bitmap_has_its_length_and_nothing_after_its_end() -> None:
    with pytest.raises(PrivateMapError, match="no bitmap"):
        PrivateMap.of_bitmap(bytes(12), PAGES)
    with pytest.raises(PrivateMapError, match="ends after"):
        PrivateMap.of_bitmap(bits_of({100}, 104), PAGES)


def test_there_are_not_too_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_map, "RUNS_MAX", 2)
    PrivateMap(page_count=PAGES, runs=((0, 1), (2, 1)))
    with pytest.raises(PrivateMapError, match="3 runs are more than 2"):
        PrivateMap(page_count=PAGES, runs=((0, 1), (2, 1), (4, 1)))


@given(data=st.data(), page_count=st.integers(1, 120))
def test_what_has_changed(data: st.DataObject, page_count: int) -> None:
    pages = st.sets(st.integers(0, page_count - 1))
    before, after = data.draw(pages), data.draw(pages)
    maps = [PrivateMap.of_bitmap(bits_of(each, page_count), page_count) for each in (before, after)]
    runs = list(maps[1].changed_since(maps[0]))
    assert {page for first, count in runs for page in range(first, first + count)} == before ^ after
    assert PrivateMap(page_count=page_count, runs=tuple(runs)).private_count == len(before ^ after)


def test_maps_of_two_guests_have_no_difference() -> None:
    maps = [PrivateMap(page_count=count, runs=()) for count in (1, 2)]
    with pytest.raises(PrivateMapError, match="maps of 1 and 2 pages"):
        list(maps[1].changed_since(maps[0]))


def test_private_pages_are_refused_while_nobody_can_import_them() -> None:
    refuse_private_pages(pb.PrivateMap(), PAGES)
    refuse_private_pages(pb.PrivateMap(page_count=PAGES), PAGES)
    with pytest.raises(PrivateMemoryUnsupportedError, match="4 pages are private") as refusal:
        refuse_private_pages(ONE, PAGES)
    assert refusal.value.grpc_status is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(PrivateMapError):
        refuse_private_pages(ONE, PAGES + 1)


async def _stream(
    *requests: pb.LoadDeviceStateRequest,
) -> AsyncIterator[pb.LoadDeviceStateRequest]:
    for request in requests:
        yield request


async def test_a_device_state_with_private_pages_is_refused_at_its_header() -> None:
    header = pb.DeviceStateHeader(generation=1, private_map=ONE)
    with pytest.raises(PrivateMemoryUnsupportedError):
        await Incoming(_stream(pb.LoadDeviceStateRequest(header=header))).header()


async def test_an_image_with_private_pages_opens_no_gate() -> None:
    header = pb.DeviceStateHeader(generation=1, image_pending=True)
    incoming = Incoming(
        _stream(
            pb.LoadDeviceStateRequest(header=header),
            pb.LoadDeviceStateRequest(image_served=pb.ImageServed(private_map=ONE)),
            pb.LoadDeviceStateRequest(chunk=b"state"),
        )
    )
    await incoming.header()
    opened: list[bool] = []
    incoming.when_served(lambda: opened.append(True))
    with pytest.raises(PrivateMemoryUnsupportedError):
        await incoming.wait_first()
    assert not opened


def _order(private_map: pb.PrivateMap) -> ArrivalOrder:
    spec = VmSpec(vm_id="vm", memory_bytes=64 << 20, kernel="/k")
    image = common_pb2.Image(image_id="vm-1", vm_id="vm", epoch=1, generation=1)
    for region in memory_regions(spec):
        image.regions.add(gpa_bytes=region.gpa, size_bytes=region.size_bytes)
    message = pb.PrepareArrival(
        spec_json=spec.canonical_json(),
        spec_hash=spec.spec_hash,
        image=image,
        private_map=private_map,
    )
    return ArrivalOrder.read(Fence(vm_id="vm", epoch=2), message)


def test_an_arrival_with_private_pages_is_refused_before_anything_is_made() -> None:
    page_count = (64 << 20) // 4096
    assert _order(PrivateMap(page_count=page_count, runs=()).message()).image_id == "vm-1"
    with pytest.raises(PrivateMemoryUnsupportedError):
        _order(PrivateMap(page_count=page_count, runs=((0, page_count),)).message())
    with pytest.raises(PrivateMapError):
        _order(ONE)
