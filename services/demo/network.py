# SPDX-License-Identifier: Apache-2.0
"""The demo's network: a namespace with a bridge in it, and a witness of every frame.

Nothing of it can be reached from outside the namespace: the addresses are TEST-NET-1 (RFC 5737).
Source: ip-netns(8), ip-link(8), packet(7), socket(7) on SO_TIMESTAMPNS.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from services.demo.errors import NetworkUnavailableError
from services.fault_agent.drivers.tap import NAMESPACES, TapError, enter_namespace

PREFIX = "gwdemo-"
BRIDGE = "gwbr0"
BRIDGE_ADDRESS = "192.0.2.1"
GUEST_ADDRESS = "192.0.2.2/24"
RARP = 0x8035
"""Ethertype of what QEMU sends to announce a guest's MAC."""

_BRIDGE_MAC = "02:67:77:00:00:01"
_ETH_P_ALL = 0x0003
_SO_TIMESTAMPNS = 35
_PACKET_OUTGOING = 4
_FRAME_BYTES_MAX = 128  # the headers are enough
_ETHERNET_HEADER_BYTES = 14
_TIMESPEC = struct.Struct("qq")
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A namespace of this process and the bridge in it.

    Attributes:
        netns: its name, as open_tap and ip-netns(8) take it.
        bridge: the bridge's name.
        bridge_address: the bridge's own address; it answers pings.
        guest_address: an address on the bridge's network, with prefix length.
    """

    netns: str
    bridge: str = BRIDGE
    bridge_address: str = BRIDGE_ADDRESS
    guest_address: str = GUEST_ADDRESS


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame seen in the namespace.

    Attributes:
        t_ns: CLOCK_MONOTONIC when the kernel took it in.
        interface: where: a tap (what its VMM sent or was sent) or the bridge itself.
        outgoing: it left the kernel through the interface; False: it came in, from a VMM.
        source: the sender's MAC, "52:54:00:12:34:56".
        destination: the receiver's MAC.
        ethertype: protocol, e.g. 0x8035 for RARP.
    """

    t_ns: int
    interface: str
    outgoing: bool
    source: str
    destination: str
    ethertype: int


@contextmanager
def demo_network() -> Iterator[Network]:
    """Make a namespace with a bridge; remove it at the end, and what crashed runs have left.

    Its name ends in this process' id and the namespace is locked (flock) as long as we live: a
    namespace of ours without a lock is a dead run's, whoever has its process id by now.

    Raises:
        NetworkUnavailableError: not permitted here, or a tool is missing.
    """
    _check_tools()
    remove_stale()
    network = Network(netns=f"{PREFIX}{os.getpid()}")
    _ip("netns", "add", network.netns)
    lock = os.open(NAMESPACES / network.netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _make_bridge(network)
        yield network
    finally:
        os.close(lock)
        _ip("netns", "del", network.netns)


def remove_stale() -> list[str]:
    """Remove namespaces that crashed runs have left; their names.

    A namespace lives on as long as a process or tap of it does, without a name.
    """
    removed = []
    for path in sorted(NAMESPACES.glob(f"{PREFIX}*")):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # somebody else was quicker
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # in use
        finally:
            os.close(fd)
        with contextlib.suppress(NetworkUnavailableError):
            _ip("netns", "del", path.name)
            removed.append(path.name)
    return removed


class FrameRecorder:
    """Every frame on every interface of a namespace, with the time the kernel took it in.

    On all interfaces, not on the bridge alone: which tap a frame came in by tells which VMM sent
    it. A thread of its own reads, so that a busy event loop loses nothing.
    """

    def __init__(self, netns: str) -> None:
        self._netns = netns
        self._frames: list[Frame] = []
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._error: TapError | OSError | None = None
        self._thread = threading.Thread(target=self._run, name="frame-recorder")

    def __enter__(self) -> Self:
        """Returns when the first frame would be seen.

        Raises:
            NetworkUnavailableError: no such namespace, or no CAP_NET_RAW.
        """
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            self._thread.join()
            raise NetworkUnavailableError("record frames", str(self._error)) from self._error
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def frames(self) -> list[Frame]:
        """What has been seen so far, in the order of arrival."""
        return list(self._frames)

    def _run(self) -> None:
        try:
            enter_namespace(self._netns)
            tapped = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        except (TapError, OSError) as error:
            self._error = error
            self._ready.set()
            return
        with tapped:
            tapped.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            tapped.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            tapped.settimeout(_POLL_S)
            self._ready.set()
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    self._record(*tapped.recvmsg(_FRAME_BYTES_MAX, 64))

    def _record(
        self,
        data: bytes,
        ancillary: list[tuple[int, int, bytes]],
        _flags: int,
        address: tuple[str, int, int, int, bytes],
    ) -> None:
        t_ns = time.monotonic_ns()
        # The kernel stamps CLOCK_REALTIME, which may have been set since the frame before.
        offset_ns = t_ns - time.time_ns()
        for level, kind, value in ancillary:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                seconds, nanoseconds = _TIMESPEC.unpack(value)
                t_ns = seconds * 1_000_000_000 + nanoseconds + offset_ns
        if len(data) < _ETHERNET_HEADER_BYTES:
            return
        self._frames.append(
            Frame(
                t_ns=t_ns,
                interface=address[0],
                outgoing=address[2] == _PACKET_OUTGOING,
                destination=data[0:6].hex(":"),
                source=data[6:12].hex(":"),
                ethertype=int.from_bytes(data[12:14], "big"),
            )
        )


def _check_tools() -> None:
    if shutil.which("ip") is None:
        raise NetworkUnavailableError("find ip(8)", "iproute2 is not installed")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise NetworkUnavailableError("/dev/net/tun", "missing, or no permission")


def _make_bridge(network: Network) -> None:
    inside = ("-n", network.netns)
    thread = threading.Thread(target=_disable_ipv6, args=(network.netns,), name="disable-ipv6")
    thread.start()
    thread.join()
    _ip(*inside, "link", "set", "lo", "up")
    # An address of its own: else it takes its ports' lowest, and changes it under the guest's
    # eyes when the destination's tap joins; then the guest pings a MAC that is gone.
    _ip(*inside, "link", "add", network.bridge, "address", _BRIDGE_MAC, "type", "bridge",
        "stp_state", "0", "forward_delay", "0", "mcast_snooping", "0")  # fmt: skip
    _ip(*inside, "address", "add", f"{network.bridge_address}/24", "dev", network.bridge)
    _ip(*inside, "link", "set", network.bridge, "up")


def _disable_ipv6(netns: str) -> None:
    """Its chatter would drown the announcements that a test looks for. In vain is no harm."""
    with contextlib.suppress(TapError, OSError):
        enter_namespace(netns)
        for scope in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NetworkUnavailableError(" ".join(("ip", *arguments)), done.stderr.strip())
