# SPDX-License-Identifier: Apache-2.0
"""What the services need of the native page path.

`native.py` implements it, `fake.py` stands in for unit tests. No function here blocks longer than a
few milliseconds unless it says so, and none needs Python to make progress: between a guest's fault
and its page there are only C threads.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class ArrivalPhase(enum.IntEnum):
    """enum gw_arrival_phase."""

    CONNECTING = 1
    ARMED = 2
    FETCHING = 3
    LINK_LOST = 4
    COMPLETE = 5
    ENDED = 6
    REFUSED = 7
    VIOLATION = 8
    NO_MEMORY = 9
    """Pages come and find no room: tried again by itself."""


class InstallMethod(enum.IntEnum):
    """enum gw_install_method."""

    COPY = 1
    CONTINUE = 2
    WRITE = 3
    """Written to the RAM file: no userfaultfd; only with an exit channel."""


class SandboxMode(enum.IntEnum):
    """enum gw_sandbox_mode: what becomes of a system call that is on no list."""

    OFF = 0
    LOG = 1
    """It is let through, and is in the kernel's log."""
    ENFORCE = 2


class ImageState(enum.IntEnum):
    """enum gw_image_state; equal to godwit.common.v1.ImageState."""

    LIVE = 1
    FROZEN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalRegion:
    """A piece of the guest's memory as its VMM maps it."""

    offset: int
    """Of its first byte, in the image and in the RAM file. Bytes."""
    host_addr: int
    """Of its first byte, in the VMM's process."""
    len_bytes: int
    """> 0, page aligned."""
    uffd_index: int = 0
    """Which of `ArrivalConfig.uffds` it is registered with."""


TLS_KEY_BYTES = 32
"""Of a pinned key: SHA-256 of a SubjectPublicKeyInfo; GW_TLS_KEY_LEN."""


class TlsIdentity(Protocol):
    """Who this process is and whom it believes; see native/include/godwit/tls.h."""

    def reload(self) -> None:
        """Read the files again, for connections from now on.

        Raises:
            OSError: they are unusable, strerror says why; nothing has changed.
        """
        ...

    def pin(self, key: bytes) -> None:
        """Believe a key whatever is wrong with its certificate, its name excepted."""
        ...

    def unpin(self, key: bytes) -> None:
        """Take one `pin` back."""
        ...

    def pinned_count(self) -> int:
        """Handshakes that only a pin let through: somebody should renew a certificate."""
        ...

    def close(self) -> None:
        """Let go of it; connections and engines keep it. Idempotent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalConfig:
    """struct gw_arrival_config; see native/include/godwit/arrival.h."""

    page_size_bytes: int
    epoch: int
    page_map_path: str
    session_id: str
    image_id: str
    page_host: str
    page_port: int
    uffds: Sequence[int]
    """Empty only with InstallMethod.WRITE. Duplicated, like all descriptors here."""
    ram_fd: int
    regions: Sequence[ArrivalRegion]
    exit_channel_fd: int = -1
    """A VMM's (docs/exit-channel.md); -1: its vCPUs make no exits."""
    exit_doorbell_fd: int = -1
    traceparent: str = ""
    install_method: InstallMethod = InstallMethod.COPY
    bulk_connection_count: int = 2
    """Each with a thread at both ends; see docs/design/page-path.md."""
    adopt: bool = False
    bulk_bytes_per_s_max: int = 0
    tls: TlsIdentity | None = None
    """None: plaintext."""
    page_server_name: str = ""
    """With TLS: the name that the page server's certificate must have."""
    token: bytes = b""
    """A FetchToken; empty: none."""
    sandbox: SandboxMode = SandboxMode.OFF
    """Of its threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySummary:
    """Nanoseconds."""

    sample_count: int
    p50_ns: int
    p99_ns: int
    p999_ns: int
    max_ns: int


class HoldCause(enum.IntEnum):
    """enum gw_hold_cause: why no page could be had."""

    NONE = 0
    LINK_LOST = 1
    PAGE_SERVER = 2
    AGENT_RESTART = 3
    NO_MEMORY = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """struct gw_hold: an outage, and how much of it the guest waited."""

    number: int
    """Counts the outages of an arrival, from 1."""
    cause: HoldCause
    outage_ns: int
    held_ns: int
    """0: nobody waited."""


NO_HOLD = Hold(number=1, cause=HoldCause.NONE, outage_ns=0, held_ns=0)
HOLDS_MAX = 8
"""How many past outages a status tells; GW_ARRIVAL_HOLD_COUNT_MAX."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchSummary:
    """struct gw_prefetch_summary: how well it is guessed which pages are wanted next."""

    window_count: int = 0
    """Runs that were asked for because of a fault before them."""
    hit_count: int = 0
    """Of those judged: the guest went on there."""
    miss_count: int = 0
    page_count: int = 0
    off: bool = False
    """It did not pay. Windows are tried again within a second, a recorded order is not."""


PageRun = tuple[int, int]
"""struct gw_page_run: the first page and how many, > 0."""
ORDER_RUNS_MAX = 65536
"""GW_ARRIVAL_ORDER_COUNT_MAX."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalStatus:
    """struct gw_arrival_status."""

    phase: ArrivalPhase
    bulk_done: bool
    grpc_status: int
    page_count: int
    absent_count: int
    demand_page_count: int
    bulk_page_count: int
    zero_page_count: int
    removed_page_count: int
    fault_count: int
    held_fault_count: int
    received_bytes: int
    checksum_error_count: int
    reconnect_count: int
    violation_count: int
    link_lost_ns: int
    fault_latency: LatencySummary
    reason: str
    prefetch: PrefetchSummary = PrefetchSummary()
    """Of the windows behind faults."""
    recorded: PrefetchSummary = PrefetchSummary()
    """Of the order that `Arrival.set_order` was given."""
    hold_count: int = 0
    held_total_ns: int = 0
    """Of all outages, the one that is not over included."""
    holds: tuple[Hold, ...] = ()
    """The last ones that are over, ascending."""
    hold_now: Hold = NO_HOLD
    """cause NONE: pages can be had."""


class Pacer(Protocol):
    """Bandwidth that several arrivals share, by weight; see native/include/godwit/pacer.h."""

    def set_rate(self, bytes_per_s_max: int) -> None:
        """0: no limit."""
        ...

    def close(self) -> None:
        """Let go of it; arrivals go on under its last rate. Idempotent."""
        ...


class Arrival(Protocol):
    """One arriving guest. A call on a closed one raises ValueError."""

    def share(self, pacer: Pacer, weight: int) -> None:
        """Before `start`: bulk takes its share of the pacer, weight 1 to 1000."""
        ...

    def set_order(self, runs: Sequence[PageRun]) -> None:
        """Before `start`: bulk asks for these pages first, in this order."""
        ...

    def order(self) -> list[PageRun]:
        """What the guest touched while it was absent, in the order of the first touch."""
        ...

    def start(self) -> None: ...
    def open_gate(self, generation: int) -> None: ...
    def start_bulk(self) -> None: ...
    def set_bulk_rate(self, bytes_per_s_max: int) -> None: ...
    def set_page_server(self, host: str, port: int) -> None: ...
    def set_token(self, token: bytes) -> None:
        """Show another FetchToken from the next stream on."""
        ...

    def page_server_key(self) -> bytes:
        """By which key the page server was known last; empty: no lane has been up with TLS."""
        ...

    def fileno(self) -> int:
        """The eventfd that is readable after a change of phase; drain it with `drain_events`."""
        ...

    def drain_events(self) -> None: ...
    def status(self) -> ArrivalStatus: ...
    def bitmap(self) -> bytes:
        """The userfault bitmap: bit i (LSB first) = page i, set = absent."""
        ...

    def generation(self) -> int: ...
    def finish(self) -> None: ...
    def close(self) -> None:
        """Stop the threads, close our userfaultfd. May block some milliseconds. Idempotent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRegion:
    """A region of an image and where it lies in the RAM file."""

    gpa: int
    size_bytes: int
    file_offset: int
    page_size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeImage:
    """struct gw_serve_image."""

    image_id: str
    vm_id: str
    boot_id: str
    epoch: int
    inode: int
    generation: int
    state: ImageState
    ram_fd: int
    regions: Sequence[ServeRegion]
    destination: str = ""
    """With TLS: the name that a reader's certificate must have; empty: any node's."""
    destination_epoch: int = 0
    """Streams of an older epoch are refused."""
    destination_key: bytes = b""
    """TLS_KEY_BYTES; good whatever its certificate's dates while the image is FROZEN."""
    token_key: bytes = b""
    """Ed25519 public key of who signs FetchTokens; empty: none is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeStats:
    """struct gw_serve_stats."""

    connection_count: int
    stream_count: int
    connection_total: int
    demand_page_total: int
    bulk_page_total: int
    zero_page_total: int
    sent_bytes_total: int
    want_total: int
    refused_total: int


class PageServer(Protocol):
    """The native PageService listener. Bound when it is made; answers after `start`."""

    @property
    def port(self) -> int: ...
    def start(self) -> None: ...
    def put_image(self, image: ServeImage) -> None: ...
    def remove_image(self, image_id: str) -> None: ...
    def image_stream_count(self, image_id: str) -> int: ...
    def stats(self) -> ServeStats: ...
    def drain(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """A userfaultfd that the VMM holds too."""

    uffd: int
    """Ours; the receiver closes it."""
    remote_fd: int
    """The VMM's own number of it: journal it, it is the way back after our death."""
    features: int
    stopped_ns: int
    regions: tuple[ArrivalRegion, ...]


class PageCore(Protocol):
    """The native module. Failures raise OSError with the errno that the header documents."""

    def create_arrival(self, config: ArrivalConfig) -> Arrival: ...
    def create_pacer(self, bytes_per_s_max: int) -> Pacer: ...
    def create_page_server(
        self,
        *,
        host: str,
        port: int,
        connection_count_max: int = 64,
        tls: TlsIdentity | None = None,
    ) -> PageServer: ...
    def create_tls_identity(self, *, certificate: str, key: str, authority: str) -> TlsIdentity:
        """Read three PEM files. OSError says in strerror what is wrong with them."""
        ...

    def inject_uffd(self, *, pid: int, ram_fd: int, minor: bool = False) -> Injection:
        """Blocks some milliseconds: call it in a thread."""
        ...

    def take_uffd(self, *, pid: int, remote_fd: int, ram_fd: int) -> Injection: ...
    def collapse(self, ram_fd: int, offset: int) -> None:
        """Make the range of 2 MiB at `offset` huge; see native/include/godwit/collapse.h."""

    def filter_process(self, mode: SandboxMode) -> str:
        """Filter the system calls of every thread of a page server, for good; why not, or ""."""
        ...

    def why_no_filter(self, mode: SandboxMode) -> str:
        """Why threads of an arrival are not filtered here; "" if they are."""
        ...

    def uffd_features(self) -> tuple[str, ...]:
        """Names of the userfaultfd features of this kernel; empty if userfaultfd cannot be used."""
        ...
