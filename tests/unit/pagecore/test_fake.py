# SPDX-License-Identifier: Apache-2.0
"""The fake keeps the rules of the headers: what it forgives, the library would not."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from services.pagecore import uffd_names
from services.pagecore.api import (
    ArrivalConfig,
    ArrivalPhase,
    ArrivalRegion,
    ImageState,
    PageCore,
    ServeImage,
    ServeRegion,
)
from services.pagecore.fake import FakePageCore

PAGE = 4096
CONFIG = ArrivalConfig(
    page_size_bytes=PAGE,
    epoch=2,
    page_map_path="/map",
    session_id="s",
    image_id="i",
    page_host="127.0.0.1",
    page_port=1,
    uffds=(-1,),
    ram_fd=-1,
    regions=(ArrivalRegion(offset=0, host_addr=1 << 40, len_bytes=10 * PAGE),),
)


def is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def fails_with(code: int, call: Callable[[], object]) -> bool:
    with pytest.raises(OSError, match=r"\[\w+\]") as caught:
        call()
    return caught.value.errno == code


def test_an_arrival_from_start_to_finish() -> None:
    core = FakePageCore()
    face: PageCore = core
    arrival = face.create_arrival(CONFIG)
    fake = core.arrivals[-1]
    assert arrival.status().phase == ArrivalPhase.CONNECTING
    assert fails_with(errno.EAGAIN, arrival.start_bulk)
    arrival.start()
    assert is_readable(arrival.fileno())
    arrival.drain_events()
    assert not is_readable(arrival.fileno())
    arrival.drain_events()  # nothing there: does not block
    assert arrival.status().phase == ArrivalPhase.ARMED
    arrival.open_gate(5)
    arrival.open_gate(5)
    assert fails_with(errno.EALREADY, lambda: arrival.open_gate(6))
    assert (arrival.status().phase, arrival.generation()) == (ArrivalPhase.FETCHING, 5)
    fake.install(0, 9, lane="demand")
    fake.install(1, lane="zero")
    assert arrival.bitmap() == bytes([0b11111100, 0b01])
    assert fails_with(errno.EBUSY, arrival.finish)
    fake.install_all()
    status = arrival.status()
    assert status.phase == ArrivalPhase.COMPLETE
    assert (status.demand_page_count, status.bulk_page_count, status.zero_page_count) == (2, 7, 1)
    assert (status.absent_count, arrival.bitmap()) == (0, b"\0\0")
    arrival.finish()
    arrival.close()
    arrival.close()
    with pytest.raises(ValueError, match="closed"):
        arrival.status()


def test_adoption_goes_on_where_it_was() -> None:
    core = FakePageCore()
    first = core.create_arrival(CONFIG)
    first.start()
    first.open_gate(3)
    first.install(0, 1, lane="demand")
    first.close()
    adopting = replace(CONFIG, adopt=True)
    second = core.create_arrival(adopting)
    assert (second.generation(), second.status().absent_count) == (3, 8)
    second.start()
    assert second.status().phase == ArrivalPhase.FETCHING
    stale = replace(adopting, epoch=9)
    assert fails_with(errno.ESTALE, lambda: core.create_arrival(stale))
    missing = replace(adopting, page_map_path="/other")
    assert fails_with(errno.ENOENT, lambda: core.create_arrival(missing))
    second.close()


def test_page_server_checks_records(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(4 * PAGE))
    fd = os.open(ram, os.O_RDONLY)
    region = ServeRegion(gpa=0, size_bytes=4 * PAGE, file_offset=0, page_size_bytes=PAGE)
    image = ServeImage(
        image_id="i",
        vm_id="v",
        boot_id="b",
        epoch=1,
        inode=0,
        generation=1,
        state=ImageState.FROZEN,
        ram_fd=fd,
        regions=(region,),
    )
    server = FakePageCore().create_page_server(host="127.0.0.1", port=0)
    server.put_image(image)
    assert server.image_stream_count("i") == 0
    too_far = ServeRegion(gpa=0, size_bytes=4 * PAGE, file_offset=PAGE, page_size_bytes=PAGE)
    wrong = replace(image, image_id="j", regions=(too_far,))
    assert fails_with(errno.EOVERFLOW, lambda: server.put_image(wrong))
    server.remove_image("i")
    assert fails_with(errno.ENOENT, lambda: server.remove_image("i"))
    server.close()
    os.close(fd)
    with pytest.raises(ValueError, match="closed"):
        server.stats()


def test_injection_and_taking_again() -> None:
    core = FakePageCore()
    region = ArrivalRegion(offset=0, host_addr=1 << 40, len_bytes=PAGE)
    core.add_process(7, region)
    first = core.inject_uffd(pid=7, ram_fd=-1)
    again = core.take_uffd(pid=7, remote_fd=first.remote_fd, ram_fd=-1)
    os.close(first.uffd)
    os.close(again.uffd)
    assert again.regions == (region,)
    assert fails_with(errno.ESRCH, lambda: core.inject_uffd(pid=8, ram_fd=-1))
    assert fails_with(
        errno.EBADF, lambda: core.take_uffd(pid=7, remote_fd=first.remote_fd + 1, ram_fd=-1)
    )
    core.errors["inject_uffd"] = errno.EPERM
    assert fails_with(errno.EPERM, lambda: core.inject_uffd(pid=7, ram_fd=-1))


def test_masked_features_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(uffd_names.MASK_ENV, "event-remove, poison")
    names = FakePageCore().uffd_features()
    assert "missing-shmem" in names
    assert not {"event-remove", "poison"} & set(names)
    assert uffd_names.from_bits((1 << 17) - 1) == names
    with pytest.raises(OSError, match="event-remove") as caught:
        uffd_names.to_bits(uffd_names.ARRIVAL_FEATURES)
    assert caught.value.errno == errno.EINVAL


def test_a_misspelt_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a compatibility test would pass because it hid nothing."""
    monkeypatch.setenv(uffd_names.MASK_ENV, "event_remove")
    with pytest.raises(ValueError, match="event_remove"):
        uffd_names.masked()
