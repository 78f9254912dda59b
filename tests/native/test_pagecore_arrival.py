# SPDX-License-Identifier: Apache-2.0
"""An arrival through the Python binding: a real userfaultfd in a real process, a real page server.

The guest is a child process that maps a RAM file and reads it when told to; it knows nothing of
userfaultfd, as a VMM does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.pagecore.api import Arrival, ArrivalConfig, ArrivalPhase, InstallMethod
from tests.harness.page_server import PAGE, PageNode, Process, page_node, pattern

if TYPE_CHECKING:
    from services.pagecore.native import NativeArrival, NativePageCore

pytestmark = pytest.mark.requires("uffd", "root")

PAGE_COUNT = 2048
HOLES = range(1000, 1800)
CONTENT = pattern(PAGE_COUNT, holes=HOLES)
EPOCH = 8
WAIT_MS = 60_000

GUEST = """
import hashlib, mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
print("ready", flush=True)
for line in sys.stdin:
    first, count = map(int, line.split())
    part = memory[first * 4096:(first + count) * 4096]
    print(hashlib.sha256(part).hexdigest(), flush=True)
"""


class Guest:
    """A process whose memory arrives."""

    def __init__(self, ram: Path) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", GUEST, str(ram)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self._popen.pid
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().decode().strip()

    def touch(self, first: int, count: int = 1) -> None:
        """Let it read pages; it may block on them."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(b"%d %d\n" % (first, count))
        self._popen.stdin.flush()

    def answered(self, timeout_ms: int) -> bool:
        """Whether an answer is there."""
        assert self._popen.stdout is not None
        poll = select.poll()
        poll.register(self._popen.stdout, select.POLLIN)
        return bool(poll.poll(timeout_ms))

    def saw(self) -> str:
        """The hash of what it read."""
        assert self.answered(WAIT_MS), "the guest waits for ever"
        return self._line()

    def read(self, first: int, count: int = 1) -> str:
        self.touch(first, count)
        return self.saw()

    def close(self) -> None:
        self._popen.kill()
        self._popen.communicate()


def expected(first: int, count: int = 1) -> str:
    return hashlib.sha256(CONTENT[first * PAGE : (first + count) * PAGE]).hexdigest()


class Destination:
    """A guest with absent memory and what an agent holds of it."""

    def __init__(self, core: NativePageCore, node: PageNode, page: str, *, minor: bool) -> None:
        self.core = core
        self.ram = node.ram_dir / "destination"
        with self.ram.open("wb") as file:
            file.truncate(len(CONTENT))
        self.ram_fd = os.open(self.ram, os.O_RDWR | os.O_CLOEXEC)
        self.guest = Guest(self.ram)
        self.injection = core.inject_uffd(pid=self.guest.pid, ram_fd=self.ram_fd, minor=minor)
        host, port = page.rsplit(":", 1)
        self.config = ArrivalConfig(
            page_size_bytes=PAGE,
            epoch=EPOCH,
            page_map_path=str(node.ram_dir / "map"),
            session_id="session",
            image_id="web.1",
            page_host=host,
            page_port=int(port),
            uffds=(self.injection.uffd,),
            ram_fd=self.ram_fd,
            regions=self.injection.regions,
            install_method=InstallMethod.CONTINUE if minor else InstallMethod.COPY,
        )

    def close(self) -> None:
        self.guest.close()
        os.close(self.injection.uffd)
        os.close(self.ram_fd)


def wait_for(arrival: Arrival, condition: Callable[[], bool]) -> None:
    """Wait on the arrival's own events."""
    poll = select.poll()
    poll.register(arrival.fileno(), select.POLLIN)
    while not condition():
        assert poll.poll(WAIT_MS), arrival.status()
        arrival.drain_events()


def wait_phase(arrival: Arrival, *phases: ArrivalPhase) -> None:
    wait_for(arrival, lambda: arrival.status().phase in phases)


@pytest.fixture
def core() -> NativePageCore:
    # Here, not at the top: a machine without userfaultfd may be one without a C compiler.
    from services.pagecore.native import NativePageCore

    return NativePageCore()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[PageNode]:
    with page_node(tmp_path) as node:
        yield node


@pytest.fixture
def source(node: PageNode) -> Iterator[Process]:
    node.write_record(node.make_ram(CONTENT, "source"))
    with node.process() as process:
        yield process


@contextlib.contextmanager
def destination_of(
    core: NativePageCore, node: PageNode, source: Process, *, minor: bool = False
) -> Iterator[Destination]:
    with contextlib.closing(Destination(core, node, source.page, minor=minor)) as destination:
        yield destination


@contextlib.contextmanager
def arriving(core: NativePageCore, config: ArrivalConfig) -> Iterator[NativeArrival]:
    from services.pagecore.native import NativeArrival

    with contextlib.closing(NativeArrival(config)) as arrival:
        arrival.start()
        yield arrival


def absent_in(bitmap: bytes) -> int:
    return int.from_bytes(bitmap, "little").bit_count()


@pytest.mark.parametrize("minor", [False, True], ids=["copy", "continue"])
def test_a_guest_arrives_whole(
    core: NativePageCore, node: PageNode, source: Process, minor: bool
) -> None:
    """Held until the gate opens; then what it touches by demand, the rest by bulk."""
    with (
        destination_of(core, node, source, minor=minor) as destination,
        arriving(core, destination.config) as arrival,
    ):
        guest = destination.guest
        wait_phase(arrival, ArrivalPhase.ARMED)
        guest.touch(5)
        assert not guest.answered(50), "a page came through the closed gate"
        assert absent_in(arrival.bitmap()) == PAGE_COUNT
        arrival.open_gate(1)
        assert guest.saw() == expected(5)
        assert guest.read(1500) == expected(1500)
        status = arrival.status()
        assert (status.phase, arrival.generation()) == (ArrivalPhase.FETCHING, 1)
        with pytest.raises(OSError, match="gw_arrival_finish") as caught:
            arrival.finish()
        assert caught.value.errno == errno.EBUSY
        arrival.start_bulk()
        wait_phase(arrival, ArrivalPhase.COMPLETE)
        assert absent_in(arrival.bitmap()) == 0
        status = arrival.status()  # of a fault it knows only after its wake: not before here
        assert status.fault_latency.sample_count >= 2
        assert status.demand_page_count >= 1
        assert status.zero_page_count == len(HOLES)
        by_lane = status.demand_page_count + status.bulk_page_count + status.zero_page_count
        assert by_lane == PAGE_COUNT
        assert (status.violation_count, status.checksum_error_count) == (0, 0)
        assert guest.read(0, PAGE_COUNT) == expected(0, PAGE_COUNT)
        arrival.finish()
        arrival.close()
        with pytest.raises(ValueError, match="closed"):
            arrival.status()
        assert destination.ram.read_bytes() == CONTENT


def test_a_pacer_is_shared_before_the_start(
    core: NativePageCore, node: PageNode, source: Process
) -> None:
    """Once and with a weight that counts; the pacer may be let go of before its arrival."""
    with (
        destination_of(core, node, source) as destination,
        contextlib.closing(core.create_arrival(destination.config)) as arrival,
    ):
        pacer = core.create_pacer(1 << 30)
        with pytest.raises(OSError, match="gw_arrival_share") as caught:
            arrival.share(pacer, 0)
        assert caught.value.errno == errno.EINVAL
        arrival.share(pacer, 3)
        with pytest.raises(OSError, match="gw_arrival_share") as caught:
            arrival.share(pacer, 3)
        assert caught.value.errno == errno.EALREADY
        arrival.start()
        pacer.set_rate(1 << 31)
        pacer.close()
        with pytest.raises(ValueError, match="closed"):
            pacer.set_rate(0)
        wait_phase(arrival, ArrivalPhase.ARMED)
        arrival.open_gate(1)
        arrival.start_bulk()
        wait_phase(arrival, ArrivalPhase.COMPLETE)
        assert destination.guest.read(0, PAGE_COUNT) == expected(0, PAGE_COUNT)
        prefetch = arrival.status().prefetch
        assert prefetch.hit_count + prefetch.miss_count <= prefetch.window_count


def test_a_recorded_order_comes_first(
    core: NativePageCore, node: PageNode, source: Process
) -> None:
    """Bulk goes along it before anything else; what this guest touches is the next order."""
    from services.pagecore.native import NativeArrival

    order = [(1900, 3), (200, 2)]
    with destination_of(core, node, source) as destination:
        slow = replace(destination.config, bulk_bytes_per_s_max=50 * PAGE)
        with contextlib.closing(NativeArrival(slow)) as arrival:
            with pytest.raises(OSError, match="gw_arrival_set_order") as caught:
                arrival.set_order([(PAGE_COUNT - 1, 2)])
            assert caught.value.errno == errno.EINVAL
            arrival.set_order(order)
            arrival.start()
            with pytest.raises(OSError, match="gw_arrival_set_order") as caught:
                arrival.set_order(order)
            assert caught.value.errno == errno.EALREADY
            wait_phase(arrival, ArrivalPhase.ARMED)
            arrival.open_gate(1)
            for page in (5, 6, 1500, 9):
                assert destination.guest.read(page) == expected(page)
            assert arrival.order() == [(5, 2), (1500, 1)]  # 9 may go on yet
            assert arrival.status().recorded.miss_count == 4
            arrival.start_bulk()
            deadline_s = time.monotonic() + WAIT_MS / 1000
            while arrival.status().recorded.page_count < 5:
                assert time.monotonic() < deadline_s, arrival.status()
            assert arrival.status().bulk_page_count <= 5 + arrival.status().prefetch.page_count
            arrival.set_bulk_rate(0)
            wait_phase(arrival, ArrivalPhase.COMPLETE)
            assert destination.guest.read(0, PAGE_COUNT) == expected(0, PAGE_COUNT)


def test_faults_are_served_while_python_stands_still(
    core: NativePageCore, node: PageNode, source: Process
) -> None:
    """The GIL is held from before the guest's faults until they are answered."""
    with (
        destination_of(core, node, source) as destination,
        arriving(core, destination.config) as arrival,
    ):
        wait_phase(arrival, ArrivalPhase.ARMED)
        arrival.open_gate(1)
        destination.guest.touch(0, 64)
        ctypes.PyDLL(None).poll(None, ctypes.c_ulong(0), ctypes.c_int(2000))
        assert destination.guest.answered(0), "no page came while the GIL was held"
        assert destination.guest.saw() == expected(0, 64)


def test_a_successor_adopts_what_is_there(
    core: NativePageCore, node: PageNode, source: Process
) -> None:
    """The engine dies with its threads; the guest waits; the next one takes the VMM's own uffd."""
    with destination_of(core, node, source) as destination:
        guest = destination.guest
        with arriving(core, destination.config) as first:
            wait_phase(first, ArrivalPhase.ARMED)
            first.open_gate(1)
            assert guest.read(7, 3) == expected(7, 3)
        guest.touch(100)
        assert not guest.answered(50), "nobody was there to answer"
        taken = core.take_uffd(
            pid=guest.pid, remote_fd=destination.injection.remote_fd, ram_fd=destination.ram_fd
        )
        assert taken.regions == destination.injection.regions
        config = replace(destination.config, uffds=(taken.uffd,), adopt=True)
        with pytest.raises(OSError, match="gw_arrival_create") as caught:
            core.create_arrival(replace(config, epoch=EPOCH + 1))
        assert caught.value.errno == errno.ESTALE
        with arriving(core, config) as second:
            assert guest.saw() == expected(100)
            assert second.generation() == 1
            second.start_bulk()
            wait_phase(second, ArrivalPhase.COMPLETE)
            assert guest.read(0, PAGE_COUNT) == expected(0, PAGE_COUNT)
            second.finish()
        os.close(taken.uffd)


def test_a_page_server_that_comes_back_is_found_again(
    core: NativePageCore, node: PageNode, source: Process
) -> None:
    """Killed in post-copy: the guest waits on what it touches, and goes on by itself."""
    with (
        destination_of(core, node, source) as destination,
        arriving(core, destination.config) as arrival,
    ):
        guest = destination.guest
        wait_phase(arrival, ArrivalPhase.ARMED)
        arrival.open_gate(1)
        assert guest.read(0) == expected(0)
        source.kill()
        wait_phase(arrival, ArrivalPhase.LINK_LOST)
        guest.touch(42)
        with node.process(listen=source.page):
            assert guest.saw() == expected(42)
            wait_phase(arrival, ArrivalPhase.FETCHING)
            status = arrival.status()
            assert (status.link_lost_ns, status.reconnect_count > 0) == (0, True)
            arrival.start_bulk()
            wait_phase(arrival, ArrivalPhase.COMPLETE)
            assert guest.read(0, PAGE_COUNT) == expected(0, PAGE_COUNT)


def test_another_address_is_another_page_server(
    core: NativePageCore, node: PageNode, source: Process
) -> None:
    with (
        destination_of(core, node, source) as destination,
        arriving(core, destination.config) as arrival,
    ):
        wait_phase(arrival, ArrivalPhase.ARMED)
        arrival.open_gate(1)
        source.kill()
        with node.process() as other:
            host, port = other.page.rsplit(":", 1)
            arrival.set_page_server(host, int(port))
            assert destination.guest.read(9) == expected(9)


def test_memory_that_somebody_has_touched_is_refused(
    core: NativePageCore, node: PageNode, source: Process
) -> None:
    with destination_of(core, node, source) as destination:
        os.pwrite(destination.ram_fd, b"x", 5 * PAGE)
        with pytest.raises(OSError, match="gw_arrival_create") as caught:
            core.create_arrival(destination.config)
        assert caught.value.errno == errno.ENOTEMPTY


def test_the_end_of_the_guest_is_an_end(
    core: NativePageCore, node: PageNode, source: Process
) -> None:
    with (
        destination_of(core, node, source) as destination,
        arriving(core, destination.config) as arrival,
    ):
        wait_phase(arrival, ArrivalPhase.ARMED)
        arrival.open_gate(1)
        destination.guest.close()
        # userfaultfd has no event for it: the next install finds out.
        arrival.start_bulk()
        wait_phase(arrival, ArrivalPhase.ENDED)


def test_who_is_not_there_cannot_be_injected(core: NativePageCore, node: PageNode) -> None:
    ram = node.make_ram(CONTENT)
    fd = os.open(ram, os.O_RDWR | os.O_CLOEXEC)
    other = os.memfd_create("other", os.MFD_CLOEXEC)
    gone = subprocess.Popen(["true"])
    gone.wait()
    with contextlib.closing(Guest(ram)) as guest:
        with pytest.raises(ProcessLookupError):
            core.inject_uffd(pid=gone.pid, ram_fd=fd)
        with pytest.raises(OSError, match="gw_inject_uffd") as caught:
            core.inject_uffd(pid=guest.pid, ram_fd=other)
        assert caught.value.errno == errno.ENXIO
        with pytest.raises(OSError, match="gw_inject_take") as caught:
            core.take_uffd(pid=guest.pid, remote_fd=0, ram_fd=fd)
        assert caught.value.errno == errno.EBADF
        assert guest.read(3) == expected(3), "it is as it was"
    os.close(fd)
    os.close(other)
