# SPDX-License-Identifier: Apache-2.0
"""Open a tap device for a VMM, in a network namespace that need not be the agent's own.

The fd is what `-netdev tap,fd=N` wants; the device is not persistent and goes with its last fd.
Source: Linux Documentation/networking/tuntap.rst, setns(2), netdevice(7), linux/if_bridge.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from pathlib import Path

from services.common.errors import FailedPreconditionError

NAMESPACES = Path("/run/netns")
"""Where ip-netns(8) keeps named namespaces."""

_TUN = "/dev/net/tun"
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCGIFINDEX = 0x8933
_SIOCBRADDIF = 0x89A2
_IFF_UP = 0x1
_NAME_BYTES_MAX = 15
_REQUEST = struct.Struct("16s24x")  # struct ifreq
_FLAGS = struct.Struct("16sH22x")
_INDEX = struct.Struct("16si20x")


class TapError(FailedPreconditionError):
    """The tap device cannot be made; the message names the step and what the kernel said."""

    def __init__(self, step: str, error: OSError | str) -> None:
        detail = error if isinstance(error, str) else error.strerror or str(error)
        super().__init__(
            "TAP_UNAVAILABLE",
            f"{step}: {detail}",
            hint="needs CAP_NET_ADMIN, /dev/net/tun and the bridge that the VM's spec names",
            metadata={"step": step},
        )
        self.errno = None if isinstance(error, str) else error.errno


def open_tap(netns: str, bridge: str, name: str) -> int:
    """A new tap `name` in namespace `netns`, up and a port of `bridge`.

    Args:
        netns: name of a namespace (ip netns), or a path to one; "" = the caller's own.
        bridge: name of an existing bridge in that namespace.
        name: of the new device, at most 15 bytes, unused.

    Returns:
        An fd with O_CLOEXEC that the caller owns; frames carry a virtio-net header.

    Raises:
        TapError: no such namespace or bridge, name in use, no permission, no /dev/net/tun.
    """
    if not 0 < len(name.encode()) <= _NAME_BYTES_MAX:
        raise TapError("name", f"{name!r} has not 1 to {_NAME_BYTES_MAX} bytes")
    result: list[int | TapError] = []

    def run() -> None:
        try:
            if netns:
                enter_namespace(netns)
            result.append(_open_here(bridge, name))
        except TapError as error:
            result.append(error)

    # A thread of its own: setns(2) moves one thread only, and this one ends right after.
    thread = threading.Thread(target=run, name="open-tap")
    thread.start()
    thread.join()
    if not result:
        raise TapError("open", "the thread in the namespace ended without a result")
    if isinstance(result[0], TapError):
        raise result[0]
    return result[0]


def enter_namespace(netns: str) -> None:
    """Move the calling thread, for good, into a network namespace.

    Raises:
        TapError: there is none of that name, or no permission.
    """
    try:
        fd = os.open(NAMESPACES / netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TapError(f"namespace {netns}", error) from error
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise TapError(f"enter namespace {netns}", OSError(number, os.strerror(number)))
    finally:
        os.close(fd)


def _open_here(bridge: str, name: str) -> int:
    try:
        tap = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TapError(f"open {_TUN}", error) from error
    try:
        _attach(tap, bridge, name)
    except BaseException:
        os.close(tap)
        raise
    return tap


def _attach(tap: int, bridge: str, name: str) -> None:
    encoded = name.encode()
    step = f"make tap {name}"
    try:
        fcntl.ioctl(tap, _TUNSETIFF, _FLAGS.pack(encoded, _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            step = f"add tap {name} to bridge {bridge}"
            answer = fcntl.ioctl(control, _SIOCGIFINDEX, _REQUEST.pack(encoded))
            index = _INDEX.unpack(answer)[1]
            fcntl.ioctl(control, _SIOCBRADDIF, _INDEX.pack(bridge.encode(), index))
            step = f"bring up tap {name}"
            answer = fcntl.ioctl(control, _SIOCGIFFLAGS, _REQUEST.pack(encoded))
            flags = _FLAGS.unpack(answer)[1]
            fcntl.ioctl(control, _SIOCSIFFLAGS, _FLAGS.pack(encoded, flags | _IFF_UP))
    except OSError as error:
        raise TapError(step, error) from error
