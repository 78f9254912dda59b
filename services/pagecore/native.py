# SPDX-License-Identifier: Apache-2.0
"""The page core over the C library: every contact with it is here.

Threads: cffi lets go of the GIL for the length of each call. A handle serves one caller at a time
(the headers ask for it); its lock also keeps a call from meeting a handle that is being destroyed.
Ownership: what a C struct points to is kept alive until the call returns; the library copies it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from services.pagecore import uffd_names
from services.pagecore.api import (
    HOLDS_MAX,
    ORDER_RUNS_MAX,
    TLS_KEY_BYTES,
    Arrival,
    ArrivalConfig,
    ArrivalPhase,
    ArrivalRegion,
    ArrivalStatus,
    Hold,
    HoldCause,
    Injection,
    LatencySummary,
    Pacer,
    PageRun,
    PageServer,
    PrefetchSummary,
    SandboxMode,
    ServeImage,
    ServeStats,
    TlsIdentity,
)

MODULE_ENV = "GODWIT_NATIVE_MODULE"
"""Path of another build of the module, e.g. the one with test hooks in build/native-plain."""

REGISTER_MISSING = 1
REGISTER_MINOR = 4
"""UFFDIO_REGISTER_MODE_*, linux/userfaultfd.h."""


def _load() -> ModuleType:
    name = "services.pagecore._native"
    path = os.environ.get(MODULE_ENV)
    try:
        if not path:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{MODULE_ENV}={path} is not an extension module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ImportError(
            f"the native page core cannot be loaded, `make native`: {error}"
        ) from error
    sys.modules[name] = module
    return module


_module = _load()
ffi: Any = _module.ffi
lib: Any = _module.lib


def check(call: str, result: int) -> int:
    """What `call` returned, if it is not an error.

    Raises:
        OSError: with the errno that was returned.
    """
    if result < 0:
        raise OSError(-result, f"{os.strerror(-result)} [{call}]")
    return result


class _Handle:
    """A C object and the lock that orders its callers."""

    def __init__(self, pointer: Any, destroy: Callable[[Any], None]) -> None:
        self._pointer = pointer
        self._destroy = destroy
        self._lock = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[Any]:
        """The pointer, for one call.

        Raises:
            ValueError: it is closed.
        """
        with self._lock:
            if self._pointer is None:
                raise ValueError("call on a closed handle of the page core")
            yield self._pointer

    def call(self, name: str, *arguments: object) -> int:
        """`lib.<name>(pointer, *arguments)`, checked."""
        with self.open() as pointer:
            return check(name, getattr(lib, name)(pointer, *arguments))

    def close(self) -> None:
        """Destroy it. Idempotent."""
        with self._lock:
            pointer, self._pointer = self._pointer, None
            if pointer is not None:
                self._destroy(pointer)

    def __del__(self) -> None:
        # The last resort of a forgotten close(): else the threads would outlive their owner.
        self.close()


def _string(text: str) -> Any:
    return ffi.new("char[]", text.encode())


def _latency(summary: Any) -> LatencySummary:
    return LatencySummary(
        sample_count=summary.sample_count,
        p50_ns=summary.p50_ns,
        p99_ns=summary.p99_ns,
        p999_ns=summary.p999_ns,
        max_ns=summary.max_ns,
    )


class NativePacer:
    """Bandwidth that arrivals share; see native/include/godwit/pacer.h."""

    def __init__(self, bytes_per_s_max: int) -> None:
        ret = ffi.new("struct gw_pacer **")
        check("gw_pacer_create", lib.gw_pacer_create(bytes_per_s_max, ret))
        self._handle = _Handle(ret[0], lib.gw_pacer_destroy)

    def set_rate(self, bytes_per_s_max: int) -> None:
        """Change it, now; 0 = no limit."""
        with self._handle.open() as pointer:
            lib.gw_pacer_set_rate(pointer, bytes_per_s_max)

    def add_to(self, arrival: Any, weight: int) -> int:
        """What gw_arrival_share returns for the pointer of an arrival."""
        with self._handle.open() as pointer:
            return int(lib.gw_arrival_share(arrival, pointer, weight))

    def close(self) -> None:
        """Let go of it; its arrivals go on under the last rate."""
        self._handle.close()


class NativeTlsIdentity:
    """Certificates, and keys that are pinned; see native/include/godwit/tls.h."""

    def __init__(self, certificate: str, key: str, authority: str) -> None:
        """Read the files.

        Raises:
            OSError: strerror says what is wrong with them.
        """
        strings = [_string(text) for text in (certificate, key, authority)]
        files = ffi.new("struct gw_tls_files *")
        files.certificate_path, files.key_path, files.authority_path = strings
        reason = ffi.new("char[]", lib.GW_TLS_REASON_LEN_MAX)
        ret = ffi.new("struct gw_tls_identity **")
        self._check_files(lib.gw_tls_identity_create(files, reason, ret), reason)
        self._handle = _Handle(ret[0], lib.gw_tls_identity_unref)

    @staticmethod
    def _check_files(result: int, reason: Any) -> None:
        if result < 0:
            raise OSError(-result, ffi.string(reason).decode() or os.strerror(-result))

    def reload(self) -> None:
        """Read the files again, for connections from now on.

        Raises:
            OSError: strerror says what is wrong with them; nothing has changed.
        """
        reason = ffi.new("char[]", lib.GW_TLS_REASON_LEN_MAX)
        with self._handle.open() as pointer:
            self._check_files(lib.gw_tls_identity_reload(pointer, reason), reason)

    def pin(self, key: bytes) -> None:
        """Believe this key whatever its certificate says. ENOSPC: too many are."""
        self._handle.call("gw_tls_identity_pin", _key(key))

    def unpin(self, key: bytes) -> None:
        """Take one pin back. ENOENT: it is not pinned."""
        self._handle.call("gw_tls_identity_unpin", _key(key))

    def pinned_count(self) -> int:
        """Handshakes that only a pin let through."""
        with self._handle.open() as pointer:
            return int(lib.gw_tls_identity_pinned_count(pointer))

    def reference(self) -> Any:
        """The pointer, for a struct that a call is made with: the callee takes its own."""
        with self._handle.open() as pointer:
            return pointer

    def close(self) -> None:
        """Give our reference back."""
        self._handle.close()


def _key(key: bytes, len_bytes: int = TLS_KEY_BYTES) -> Any:
    if len(key) != len_bytes:
        raise ValueError(f"a key has {len_bytes} bytes, got {len(key)}")
    return ffi.new("uint8_t[]", key)


def _identity(tls: TlsIdentity | None) -> Any:
    if tls is None:
        return ffi.NULL
    if not isinstance(tls, NativeTlsIdentity):
        raise TypeError(f"an identity of the native page core is needed, got {tls!r}")
    return tls.reference()


def _prefetch(native: Any) -> PrefetchSummary:
    return PrefetchSummary(
        window_count=native.window_count,
        hit_count=native.hit_count,
        miss_count=native.miss_count,
        page_count=native.page_count,
        off=bool(native.off),
    )


def _hold(native: Any, number: int) -> Hold:
    return Hold(
        number=number,
        cause=HoldCause(native.cause),
        outage_ns=native.outage_ns,
        held_ns=native.held_ns,
    )


class NativeArrival:
    """One arriving guest; see native/include/godwit/arrival.h."""

    def __init__(self, config: ArrivalConfig) -> None:
        """Take over a guest whose memory is absent.

        Raises:
            OSError: EINVAL, ENOTEMPTY, ESTALE, ENOENT, ENOMEM: see gw_arrival_create.
        """
        strings = [
            _string(text)
            for text in (
                config.page_map_path,
                config.session_id,
                config.image_id,
                config.page_host,
                config.traceparent,
            )
        ]
        regions = ffi.new("struct gw_arrival_region[]", max(len(config.regions), 1))
        for native, region in zip(regions, config.regions, strict=False):
            native.offset = region.offset
            native.host_addr = region.host_addr
            native.len = region.len_bytes
            native.uffd_index = region.uffd_index
        uffds = ffi.new("int32_t[]", list(config.uffds) or [-1])
        native_config = ffi.new("struct gw_arrival_config *")
        native_config.struct_size = ffi.sizeof("struct gw_arrival_config")
        native_config.page_size = config.page_size_bytes
        native_config.epoch = config.epoch
        (
            native_config.page_map_path,
            native_config.session_id,
            native_config.image_id,
            native_config.page_host,
            native_config.traceparent,
        ) = strings
        native_config.page_port = config.page_port
        native_config.uffds = uffds
        native_config.uffd_count = len(config.uffds)
        native_config.exit_channel_fd = config.exit_channel_fd
        native_config.exit_doorbell_fd = config.exit_doorbell_fd
        native_config.ram_fd = config.ram_fd
        native_config.install_method = int(config.install_method)
        native_config.bulk_connection_count = config.bulk_connection_count
        native_config.adopt = int(config.adopt)
        native_config.bulk_bytes_per_s_max = config.bulk_bytes_per_s_max
        native_config.regions = regions
        native_config.region_count = len(config.regions)
        server_name = _string(config.page_server_name)
        token = ffi.new("uint8_t[]", config.token or b"\0")
        native_config.tls = _identity(config.tls)
        native_config.page_server_name = server_name
        native_config.token = token
        native_config.token_len = len(config.token)
        native_config.sandbox = int(config.sandbox)
        ret = ffi.new("struct gw_arrival **")
        check("gw_arrival_create", lib.gw_arrival_create(native_config, ret))
        self._handle = _Handle(ret[0], lib.gw_arrival_destroy)
        len_bytes = sum(region.len_bytes for region in config.regions)
        self._bitmap_len_bytes = (len_bytes // config.page_size_bytes + 7) // 8

    def share(self, pacer: Pacer, weight: int) -> None:
        """Bulk takes its share of `pacer`, which must be native too. Before `start`."""
        if not isinstance(pacer, NativePacer):
            raise TypeError(f"a pacer of the native page core is needed, got {pacer!r}")
        with self._handle.open() as pointer:
            check("gw_arrival_share", pacer.add_to(pointer, weight))

    def set_order(self, runs: Sequence[PageRun]) -> None:
        """Ask for these pages first; see gw_arrival_set_order. Before `start`."""
        native = ffi.new("struct gw_page_run[]", max(len(runs), 1))
        for target, (first, count) in zip(native, runs, strict=False):
            target.first, target.count = first, count
        self._handle.call("gw_arrival_set_order", native, len(runs))

    def order(self) -> list[PageRun]:
        """What the guest touched while it was absent, in the order of the first touch."""
        native = ffi.new("struct gw_page_run[]", ORDER_RUNS_MAX)
        count = self._handle.call("gw_arrival_order", native, ORDER_RUNS_MAX)
        return [(run.first, run.count) for run in native[0:count]]

    def start(self) -> None:
        """Connect both lanes and serve."""
        self._handle.call("gw_arrival_start")

    def open_gate(self, generation: int) -> None:
        """Ask for pages of `generation` from now on."""
        self._handle.call("gw_arrival_open_gate", generation)

    def start_bulk(self) -> None:
        """Let the bulk lanes run."""
        self._handle.call("gw_arrival_start_bulk")

    def set_bulk_rate(self, bytes_per_s_max: int) -> None:
        """Limit the bulk lanes; 0 = no limit."""
        self._handle.call("gw_arrival_set_bulk_rate", bytes_per_s_max)

    def set_page_server(self, host: str, port: int) -> None:
        """Fetch from another page server from now on."""
        self._handle.call("gw_arrival_set_page_server", _string(host), port)

    def set_token(self, token: bytes) -> None:
        """Show another FetchToken from the next stream on."""
        native = ffi.new("uint8_t[]", token or b"\0")
        self._handle.call("gw_arrival_set_token", native, len(token))

    def page_server_key(self) -> bytes:
        """By which key the page server was known last; empty: none."""
        key = ffi.new("uint8_t[]", TLS_KEY_BYTES)
        with self._handle.open() as pointer:
            known = lib.gw_arrival_page_server_key(pointer, key) == 0
        return bytes(ffi.buffer(key)) if known else b""

    def fileno(self) -> int:
        """The eventfd of phase changes. Borrowed."""
        return self._handle.call("gw_arrival_wait_fd")

    def drain_events(self) -> None:
        """Make the eventfd unreadable until the next change. Never blocks."""
        with self._handle.open() as pointer:
            fd = check("gw_arrival_wait_fd", lib.gw_arrival_wait_fd(pointer))
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if poll.poll(0):
                os.eventfd_read(fd)

    def status(self) -> ArrivalStatus:
        """Where it stands."""
        native = ffi.new("struct gw_arrival_status *")
        self._handle.call("gw_arrival_status", native)
        return ArrivalStatus(
            phase=ArrivalPhase(native.phase),
            bulk_done=bool(native.bulk_done),
            grpc_status=native.grpc_status,
            page_count=native.page_count,
            absent_count=native.absent_count,
            demand_page_count=native.demand_page_count,
            bulk_page_count=native.bulk_page_count,
            zero_page_count=native.zero_page_count,
            removed_page_count=native.removed_page_count,
            fault_count=native.fault_count,
            held_fault_count=native.held_fault_count,
            received_bytes=native.received_bytes,
            checksum_error_count=native.checksum_error_count,
            reconnect_count=native.reconnect_count,
            violation_count=native.violation_count,
            link_lost_ns=native.link_lost_ns,
            fault_latency=_latency(native.fault_latency),
            hold_count=native.hold_count,
            held_total_ns=native.held_total_ns,
            holds=tuple(
                _hold(native.holds[(number - 1) % HOLDS_MAX], number)
                for number in range(
                    max(native.hold_count - HOLDS_MAX, 0) + 1, native.hold_count + 1
                )
            ),
            hold_now=_hold(native.hold_now, native.hold_count + 1),
            reason=ffi.string(native.reason).decode(errors="replace"),
            prefetch=_prefetch(native.prefetch),
            recorded=_prefetch(native.recorded),
        )

    def bitmap(self) -> bytes:
        """The userfault bitmap; written by the library straight into what is returned."""
        buffer = bytearray(self._bitmap_len_bytes)
        target = ffi.from_buffer("uint8_t[]", buffer, require_writable=True)
        written = self._handle.call("gw_arrival_bitmap", target, len(buffer))
        return bytes(memoryview(buffer)[:written])

    def page_state(self, offset: int) -> int:
        """The enum gw_page_state of the page at `offset`; for tests and the audit."""
        return self._handle.call("gw_arrival_page_state", offset)

    def generation(self) -> int:
        """The generation in force; 0 while the gate is closed."""
        with self._handle.open() as pointer:
            return int(lib.gw_arrival_generation(pointer))

    def finish(self) -> None:
        """Unregister: the guest needs nobody any more. EBUSY while pages are absent."""
        self._handle.call("gw_arrival_finish")

    def close(self) -> None:
        """Stop, join, close our userfaultfd. The guest stays blocked on what is absent."""
        self._handle.close()


class NativePageServer:
    """The PageService listener; see native/include/godwit/serve.h."""

    def __init__(
        self, host: str, port: int, connection_count_max: int, tls: TlsIdentity | None = None
    ) -> None:
        """Bind and listen.

        Raises:
            OSError: EINVAL, EADDRINUSE and others of bind(2).
        """
        listen_host = _string(host)
        config = ffi.new("struct gw_serve_config *")
        config.struct_size = ffi.sizeof("struct gw_serve_config")
        config.listen_port = port
        config.listen_host = listen_host
        config.connection_count_max = connection_count_max
        config.tls = _identity(tls)
        ret = ffi.new("struct gw_serve **")
        check("gw_serve_create", lib.gw_serve_create(config, ret))
        self._handle = _Handle(ret[0], lib.gw_serve_destroy)

    @property
    def port(self) -> int:
        """The port bound."""
        return self._handle.call("gw_serve_port")

    def start(self) -> None:
        """Accept and answer from now on."""
        self._handle.call("gw_serve_start")

    def put_image(self, image: ServeImage) -> None:
        """Serve an image, or replace its record; in force when it returns."""
        strings = [_string(text) for text in (image.image_id, image.vm_id, image.boot_id)]
        regions = ffi.new("struct gw_serve_region[]", max(len(image.regions), 1))
        for native_region, region in zip(regions, image.regions, strict=False):
            native_region.gpa = region.gpa
            native_region.size = region.size_bytes
            native_region.file_offset = region.file_offset
            native_region.page_size = region.page_size_bytes
        native = ffi.new("struct gw_serve_image *")
        native.struct_size = ffi.sizeof("struct gw_serve_image")
        native.ram_fd = image.ram_fd
        native.image_id, native.vm_id, native.boot_id = strings
        native.epoch = image.epoch
        native.inode = image.inode
        native.generation = image.generation
        native.state = int(image.state)
        native.region_count = len(image.regions)
        native.regions = regions
        destination = _string(image.destination)
        native.destination = destination
        native.destination_epoch = image.destination_epoch
        keys = [
            _key(image.destination_key) if image.destination_key else ffi.NULL,
            _key(image.token_key, lib.GW_SERVE_TOKEN_KEY_LEN) if image.token_key else ffi.NULL,
        ]
        native.destination_key, native.token_key = keys
        self._handle.call("gw_serve_put_image", native)

    def remove_image(self, image_id: str) -> None:
        """Stop serving an image. ENOENT: it is not served."""
        self._handle.call("gw_serve_remove_image", _string(image_id))

    def image_stream_count(self, image_id: str) -> int:
        """How many Fetch streams are open on an image. ENOENT: it is not served."""
        return self._handle.call("gw_serve_image_stream_count", _string(image_id))

    def stats(self) -> ServeStats:
        """The counters."""
        native = ffi.new("struct gw_serve_stats *")
        self._handle.call("gw_serve_stats", native)
        return ServeStats(
            connection_count=native.connection_count,
            stream_count=native.stream_count,
            connection_total=native.connection_total,
            demand_page_total=native.demand_page_total,
            bulk_page_total=native.bulk_page_total,
            zero_page_total=native.zero_page_total,
            sent_bytes_total=native.sent_bytes_total,
            want_total=native.want_total,
            refused_total=native.refused_total,
        )

    def drain(self) -> None:
        """Refuse what is new; what is open goes on."""
        self._handle.call("gw_serve_drain")

    def close(self) -> None:
        """Close everything, join. Idempotent."""
        self._handle.close()


def _why(result: int) -> str:
    return os.strerror(-result) if result < 0 else ""


def _injection(native: Any) -> Injection:
    regions = [
        ArrivalRegion(offset=item.file_offset, host_addr=item.host_addr, len_bytes=item.len)
        for item in native.ranges[0 : native.range_count]
    ]
    return Injection(
        uffd=native.uffd,
        remote_fd=native.remote_fd,
        features=native.features,
        stopped_ns=native.stopped_ns,
        regions=tuple(sorted(regions, key=lambda region: region.offset)),
    )


class NativePageCore:
    """PageCore over the C library."""

    def create_arrival(self, config: ArrivalConfig) -> Arrival:
        """See NativeArrival."""
        return NativeArrival(config)

    def create_pacer(self, bytes_per_s_max: int) -> Pacer:
        """See NativePacer."""
        return NativePacer(bytes_per_s_max)

    def create_page_server(
        self,
        *,
        host: str,
        port: int,
        connection_count_max: int = 64,
        tls: TlsIdentity | None = None,
    ) -> PageServer:
        """See NativePageServer."""
        return NativePageServer(host, port, connection_count_max, tls)

    def create_tls_identity(self, *, certificate: str, key: str, authority: str) -> TlsIdentity:
        """See NativeTlsIdentity."""
        return NativeTlsIdentity(certificate, key, authority)

    def inject_uffd(self, *, pid: int, ram_fd: int, minor: bool = False) -> Injection:
        """Make process `pid` create a userfaultfd over its mappings of `ram_fd`.

        Raises:
            OSError: ESRCH, ENXIO, EPERM, EINVAL, ENOSYS: see gw_inject_uffd.
        """
        wanted = uffd_names.ARRIVAL_FEATURES + (uffd_names.MINOR_FEATURES if minor else ())
        features = uffd_names.to_bits(wanted)
        mode = REGISTER_MISSING | (REGISTER_MINOR if minor else 0)
        native = ffi.new("struct gw_inject_result *")
        check("gw_inject_uffd", lib.gw_inject_uffd(pid, ram_fd, features, mode, native))
        return _injection(native)

    def take_uffd(self, *, pid: int, remote_fd: int, ram_fd: int) -> Injection:
        """Take the userfaultfd that `pid` holds at `remote_fd` again.

        Raises:
            OSError: ESRCH, EBADF, EPERM: see gw_inject_take.
        """
        native = ffi.new("struct gw_inject_result *")
        check("gw_inject_take", lib.gw_inject_take(pid, remote_fd, ram_fd, native))
        return _injection(native)

    def collapse(self, ram_fd: int, offset: int) -> None:
        """Make the range of 2 MiB at `offset` one huge page.

        Raises:
            OSError: EINVAL, EAGAIN, EBUSY, ENOMEM, EPERM: see gw_collapse.
        """
        check("gw_collapse", lib.gw_collapse(ram_fd, offset))

    def filter_process(self, mode: SandboxMode) -> str:
        """Enter the sandbox of a page server, all threads; why not, or ""."""
        return _why(lib.gw_sandbox_enter(lib.GW_SANDBOX_PAGE_SERVER, int(mode)))

    def why_no_filter(self, mode: SandboxMode) -> str:
        """Try it in a thread that ends then."""
        results: list[int] = []
        thread = threading.Thread(
            target=lambda: results.append(
                lib.gw_sandbox_enter(lib.GW_SANDBOX_PAGE_THREAD, int(mode))
            )
        )
        thread.start()
        thread.join()
        return _why(results[0])

    def uffd_features(self) -> tuple[str, ...]:
        """Names of what this kernel's userfaultfd can do; empty if it cannot be used."""
        ret = ffi.new("uint64_t *")
        if lib.gw_uffd_probe(ret) < 0:
            return ()
        return uffd_names.from_bits(ret[0])
