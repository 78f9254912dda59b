# SPDX-License-Identifier: Apache-2.0
"""A page core in memory, for unit tests of the services: nothing faults, nothing is fetched.

A test plays the guest and the network: `FakeArrival.install`, `lose_link`, `refuse`, ... The rules
of the headers hold all the same (a gate opens once, finish() only when COMPLETE, a closed handle
raises ValueError), so that a service that breaks them fails its unit test.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from services.pagecore import uffd_names
from services.pagecore.api import (
    ArrivalConfig,
    ArrivalPhase,
    ArrivalRegion,
    ArrivalStatus,
    Injection,
    LatencySummary,
    Pacer,
    PageRun,
    SandboxMode,
    ServeImage,
    ServeStats,
    TlsIdentity,
)

_NO_LATENCY = LatencySummary(sample_count=0, p50_ns=0, p99_ns=0, p999_ns=0, max_ns=0)
LANES = ("demand", "bulk", "zero", "removed")


def _error(code: int, call: str) -> OSError:
    return OSError(code, f"{os.strerror(code)} [{call}]")


class _Closable:
    def __init__(self) -> None:
        self.closed = False

    def _need_open(self) -> None:
        if self.closed:
            raise ValueError("call on a closed handle of the page core")


class FakePacer(_Closable):
    """Keeps its rate in `rate`."""

    def __init__(self, bytes_per_s_max: int) -> None:
        super().__init__()
        self.rate = bytes_per_s_max

    def set_rate(self, bytes_per_s_max: int) -> None:
        """Kept in `rate`."""
        self._need_open()
        self.rate = bytes_per_s_max

    def close(self) -> None:
        """Idempotent."""
        self.closed = True


class FakeTlsIdentity(_Closable):
    """Counts what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.reload_count = 0
        self.pins: Counter[bytes] = Counter()
        self.pinned = 0
        """What `pinned_count` says; a test sets it."""

    def reload(self) -> None:
        """Counted."""
        self._need_open()
        self.reload_count += 1

    def pin(self, key: bytes) -> None:
        """Counted by key."""
        self._need_open()
        self.pins[key] += 1

    def unpin(self, key: bytes) -> None:
        """ENOENT: it is not pinned."""
        self._need_open()
        if not self.pins[key]:
            raise _error(errno.ENOENT, "gw_tls_identity_unpin")
        self.pins[key] -= 1

    def pinned_count(self) -> int:
        """As `pinned` says."""
        return self.pinned

    def close(self) -> None:
        """Idempotent."""
        self.closed = True


class FakeArrival(_Closable):
    """One arriving guest whose pages a test installs."""

    def __init__(self, config: ArrivalConfig, maps: dict[str, FakeMap]) -> None:
        super().__init__()
        len_bytes = sum(region.len_bytes for region in config.regions)
        if not config.regions or len_bytes <= 0 or config.epoch < 1 or not config.image_id:
            raise _error(errno.EINVAL, "gw_arrival_create")
        page_count = len_bytes // config.page_size_bytes
        if config.adopt:
            if config.page_map_path not in maps:
                raise _error(errno.ENOENT, "gw_arrival_create")
            self._map = maps[config.page_map_path]
            if (self._map.epoch, self._map.page_count) != (config.epoch, page_count):
                raise _error(errno.ESTALE, "gw_arrival_create")
        else:
            self._map = FakeMap(config.epoch, page_count)
            maps[config.page_map_path] = self._map
        self.config = config
        self.page_server = (config.page_host, config.page_port)
        self.bulk_rate = config.bulk_bytes_per_s_max
        self.token = config.token
        self.server_key = b""
        """What `page_server_key` says; a test sets it."""
        self.shares: tuple[Pacer, int] | None = None
        self.given_order: list[PageRun] = []
        self.touched: list[PageRun] = []
        """What `order` tells."""
        self.started = False
        self.bulk_started = False
        self.finished = False
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._status = ArrivalStatus(
            phase=ArrivalPhase.CONNECTING,
            bulk_done=False,
            grpc_status=0,
            page_count=page_count,
            absent_count=page_count,
            demand_page_count=0,
            bulk_page_count=0,
            zero_page_count=0,
            removed_page_count=0,
            fault_count=0,
            held_fault_count=0,
            received_bytes=0,
            checksum_error_count=0,
            reconnect_count=0,
            violation_count=0,
            link_lost_ns=0,
            fault_latency=_NO_LATENCY,
            reason="",
        )

    # --- what a test does ---

    def update(self, **fields: object) -> None:
        """Set fields of the status; a change of `phase` makes the eventfd readable."""
        before = self._status.phase
        self._status = replace(self._status, **fields)  # type: ignore[arg-type]
        if self._status.phase != before:
            os.eventfd_write(self._event_fd, 1)

    def connect(self) -> None:
        """Both lanes are up."""
        gate_open = self._map.generation > 0
        self.update(
            phase=ArrivalPhase.FETCHING if gate_open else ArrivalPhase.ARMED, link_lost_ns=0
        )

    def install(self, *pages: int, lane: str = "bulk") -> None:
        """Page numbers arrive by `lane`, one of LANES; the last one makes it COMPLETE."""
        if self._map.generation == 0:
            raise AssertionError("the engine installs nothing while the gate is closed")
        if lane not in LANES:
            raise AssertionError(f"lane must be one of {LANES}, got {lane!r}")
        new = self._map.absent.intersection(pages)
        self._map.absent -= new
        self._map.installed[lane] += len(new)
        received = len(new) * self.config.page_size_bytes if lane in ("demand", "bulk") else 0
        self.update(received_bytes=self._status.received_bytes + received)
        if lane == "demand":
            self.update(fault_count=self._status.fault_count + len(new))
        if not self._map.absent:
            self.update(phase=ArrivalPhase.COMPLETE, bulk_done=True)

    def install_all(self) -> None:
        """Everything that is absent arrives by bulk."""
        self.install(*self._map.absent)

    def lose_link(self, for_ns: int = 1) -> None:
        """The demand lane goes down; `connect` brings it back."""
        self.update(phase=ArrivalPhase.LINK_LOST, link_lost_ns=for_ns)

    def end(self) -> None:
        """The guest's process is gone."""
        self.update(phase=ArrivalPhase.ENDED)

    def refuse(self, grpc_status: int, reason: str) -> None:
        """The page server refuses for good."""
        self.update(phase=ArrivalPhase.REFUSED, grpc_status=grpc_status, reason=reason)

    def violate(self, reason: str) -> None:
        """An invariant broke."""
        count = self._status.violation_count + 1
        self.update(phase=ArrivalPhase.VIOLATION, violation_count=count, reason=reason)

    # --- what a service does ---

    def share(self, pacer: Pacer, weight: int) -> None:
        """Kept in `shares`."""
        self._need_open()
        if not 1 <= weight <= 1000:
            raise _error(errno.EINVAL, "gw_arrival_share")
        if self.started or self.shares is not None:
            raise _error(errno.EALREADY, "gw_arrival_share")
        self.shares = (pacer, weight)

    def set_order(self, runs: Sequence[PageRun]) -> None:
        """Kept in `given_order`."""
        self._need_open()
        if self.started or self.given_order:
            raise _error(errno.EALREADY, "gw_arrival_set_order")
        self.given_order = list(runs)

    def order(self) -> list[PageRun]:
        """What a test put into `touched`."""
        self._need_open()
        return self.touched

    def start(self) -> None:
        """Both lanes come up at once, unless `FakePageCore.auto_connect` is off."""
        self._need_open()
        if self.started:
            raise _error(errno.EALREADY, "gw_arrival_start")
        self.started = True
        if self._map.auto_connect:
            self.connect()

    def open_gate(self, generation: int) -> None:
        """Faults are answered from now on."""
        self._need_open()
        if generation < 1:
            raise _error(errno.EINVAL, "gw_arrival_open_gate")
        if self._map.generation not in (0, generation):
            raise _error(errno.EALREADY, "gw_arrival_open_gate")
        self._map.generation = generation
        if self._status.phase == ArrivalPhase.ARMED:
            self.update(phase=ArrivalPhase.FETCHING)

    def start_bulk(self) -> None:
        """Idempotent."""
        self._need_open()
        if self._map.generation == 0:
            raise _error(errno.EAGAIN, "gw_arrival_start_bulk")
        self.bulk_started = True

    def set_bulk_rate(self, bytes_per_s_max: int) -> None:
        """Kept in `bulk_rate`."""
        self._need_open()
        self.bulk_rate = bytes_per_s_max

    def set_page_server(self, host: str, port: int) -> None:
        """Kept in `page_server`."""
        self._need_open()
        self.page_server = (host, port)

    def set_token(self, token: bytes) -> None:
        """Kept in `token`."""
        self._need_open()
        self.token = token

    def page_server_key(self) -> bytes:
        """As `server_key` says."""
        self._need_open()
        return self.server_key

    def fileno(self) -> int:
        """A real eventfd: an event loop can watch it."""
        self._need_open()
        return self._event_fd

    def drain_events(self) -> None:
        """Never blocks."""
        self._need_open()
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            return

    def status(self) -> ArrivalStatus:
        """What the test has made of it."""
        self._need_open()
        installed = self._map.installed
        return replace(
            self._status,
            absent_count=len(self._map.absent),
            demand_page_count=installed["demand"],
            bulk_page_count=installed["bulk"],
            zero_page_count=installed["zero"],
            removed_page_count=installed["removed"],
        )

    def bitmap(self) -> bytes:
        """Bit i (LSB first) = page i, set = absent."""
        self._need_open()
        bits = bytearray((self._map.page_count + 7) // 8)
        for page in self._map.absent:
            bits[page // 8] |= 1 << page % 8
        return bytes(bits)

    def generation(self) -> int:
        """0 while the gate is closed."""
        self._need_open()
        return self._map.generation

    def finish(self) -> None:
        """Only in COMPLETE."""
        self._need_open()
        if self._status.phase != ArrivalPhase.COMPLETE:
            raise _error(errno.EBUSY, "gw_arrival_finish")
        self.finished = True

    def close(self) -> None:
        """Idempotent."""
        if not self.closed:
            self.closed = True
            os.close(self._event_fd)


class FakeMap:
    """A page map: what outlives an arrival and is adopted by the next."""

    def __init__(self, epoch: int, page_count: int) -> None:
        self.epoch = epoch
        self.page_count = page_count
        self.generation = 0
        self.absent = set(range(page_count))
        self.installed: Counter[str] = Counter()
        self.auto_connect = True


class FakePageServer(_Closable):
    """A PageService listener that nobody can reach."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self.images: dict[str, ServeImage] = {}
        self.streams: Counter[str] = Counter()
        """Fetch streams by image; a test sets them."""
        self.started = False
        self.draining = False
        self.counters = ServeStats(
            connection_count=0,
            stream_count=0,
            connection_total=0,
            demand_page_total=0,
            bulk_page_total=0,
            zero_page_total=0,
            sent_bytes_total=0,
            want_total=0,
            refused_total=0,
        )
        """A test replaces them."""
        self.put_errors: dict[str, int] = {}
        """errno with which put_image of an image fails."""

    @property
    def port(self) -> int:
        """The port asked for, or 1 for any."""
        self._need_open()
        return self._port

    def start(self) -> None:
        """Kept in `started`."""
        self._need_open()
        if self.started:
            raise _error(errno.EALREADY, "gw_serve_start")
        self.started = True

    def put_image(self, image: ServeImage) -> None:
        """Check the record and its file as the library does."""
        self._need_open()
        if image.image_id in self.put_errors:
            raise _error(self.put_errors[image.image_id], "gw_serve_put_image")
        size = os.fstat(image.ram_fd).st_size
        if not image.regions or image.epoch < 1 or image.generation < 1:
            raise _error(errno.EINVAL, "gw_serve_put_image")
        if any(region.file_offset + region.size_bytes > size for region in image.regions):
            raise _error(errno.EOVERFLOW, "gw_serve_put_image")
        self.images[image.image_id] = image

    def remove_image(self, image_id: str) -> None:
        """Its streams end."""
        self._need_open()
        if self.images.pop(image_id, None) is None:
            raise _error(errno.ENOENT, "gw_serve_remove_image")
        del self.streams[image_id]

    def image_stream_count(self, image_id: str) -> int:
        """What the test has put into `streams`."""
        self._need_open()
        if image_id not in self.images:
            raise _error(errno.ENOENT, "gw_serve_image_stream_count")
        return self.streams[image_id]

    def stats(self) -> ServeStats:
        """`counters`, with the streams that are open."""
        self._need_open()
        return replace(self.counters, stream_count=self.streams.total())

    def drain(self) -> None:
        """Kept in `draining`."""
        self._need_open()
        self.draining = True

    def close(self) -> None:
        """Idempotent."""
        self.closed = True


class FakePageCore:
    """PageCore in memory. Everything it made is in its lists, newest last."""

    def __init__(self) -> None:
        self.arrivals: list[FakeArrival] = []
        self.page_servers: list[FakePageServer] = []
        self.identities: list[FakeTlsIdentity] = []
        self.maps: dict[str, FakeMap] = {}
        """By path; outlive the arrivals."""
        self.auto_connect = True
        """Whether start() brings the lanes up at once."""
        self.injections: dict[int, Injection] = {}
        """What inject_uffd gives for a pid; unknown pids are ESRCH."""
        self.injected_pids: list[int] = []
        self.errors: dict[str, int] = {}
        """errno with which the next call of a method fails, by its name; once."""
        self.features: tuple[str, ...] = uffd_names.NAMES

    def _fail(self, method: str) -> None:
        code = self.errors.pop(method, 0)
        if code:
            raise _error(code, method)

    def add_process(self, pid: int, *regions: ArrivalRegion) -> None:
        """Let `pid` be a VMM whose guest memory is `regions`."""
        self.injections[pid] = Injection(
            uffd=-1, remote_fd=100, features=0, stopped_ns=1, regions=regions
        )

    def create_arrival(self, config: ArrivalConfig) -> FakeArrival:
        """Make a FakeArrival."""
        self._fail("create_arrival")
        arrival = FakeArrival(config, self.maps)
        self.maps[config.page_map_path].auto_connect = self.auto_connect
        self.arrivals.append(arrival)
        return arrival

    def create_pacer(self, bytes_per_s_max: int) -> FakePacer:
        """Make a FakePacer."""
        self._fail("create_pacer")
        return FakePacer(bytes_per_s_max)

    def create_page_server(
        self,
        *,
        host: str,  # noqa: ARG002
        port: int,
        connection_count_max: int = 64,  # noqa: ARG002
        tls: TlsIdentity | None = None,  # noqa: ARG002
    ) -> FakePageServer:
        """Make a FakePageServer."""
        self._fail("create_page_server")
        server = FakePageServer(port or 1)
        self.page_servers.append(server)
        return server

    def create_tls_identity(self, *, certificate: str, key: str, authority: str) -> FakeTlsIdentity:  # noqa: ARG002
        """Make a FakeTlsIdentity."""
        self._fail("create_tls_identity")
        identity = FakeTlsIdentity()
        self.identities.append(identity)
        return identity

    def inject_uffd(self, *, pid: int, ram_fd: int, minor: bool = False) -> Injection:  # noqa: ARG002
        """Give a descriptor of /dev/null: it can be closed, and nothing else."""
        self._fail("inject_uffd")
        return self._take(pid)

    def take_uffd(self, *, pid: int, remote_fd: int, ram_fd: int) -> Injection:  # noqa: ARG002
        """Give it again; EBADF for another number than the one injected."""
        self._fail("take_uffd")
        if pid in self.injections and self.injections[pid].remote_fd != remote_fd:
            raise _error(errno.EBADF, "take_uffd")
        return self._take(pid)

    def _take(self, pid: int) -> Injection:
        if pid not in self.injections:
            raise _error(errno.ESRCH, "inject_uffd")
        self.injected_pids.append(pid)
        uffd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        return replace(self.injections[pid], uffd=uffd)

    def collapse(self, ram_fd: int, offset: int) -> None:
        """As on a kernel that cannot."""
        del ram_fd, offset
        raise _error(errno.EINVAL, "gw_collapse")

    def filter_process(self, mode: SandboxMode) -> str:
        """Nothing is filtered."""
        return "" if mode is SandboxMode.OFF else "the fake filters nothing"

    def why_no_filter(self, mode: SandboxMode) -> str:
        """As above."""
        return self.filter_process(mode)

    def uffd_features(self) -> tuple[str, ...]:
        """`features`, without those that GODWIT_MASK_UFFD_FEATURES hides."""
        hidden = uffd_names.masked()
        return tuple(name for name in self.features if name not in hidden)
