# SPDX-License-Identifier: Apache-2.0
"""Records what goes over loopback, as whoever is on the link can: tcpdump without the package.

    with Sniffer("lo", ports={4711}) as sniffer:
        ...
    assert needle not in sniffer.payload

Frames that the kernel had no room for are counted in `dropped`; what they held is not proved.
Source: packet(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import threading
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Self

_ETH_P_ALL = 0x0003
_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_PACKET_OUTGOING = 4
_SO_ATTACH_FILTER = 26
# linux/filter.h, linux/bpf_common.h
_LD_W, _LD_B, _LD_H_INDEXED, _LDX_IP_HEADER, _JEQ, _RET = 0x20, 0x30, 0x48, 0xB1, 0x15, 0x06
_PACKET_TYPE = 0xFFFFF000 + 4
_FRAME_MAX = 1 << 17
_BUFFER_BYTES = 256 << 20


class Sniffer:
    """TCP payload to and from some ports, in the order in which it was seen. Needs CAP_NET_RAW."""

    def __init__(self, interface: str, ports: AbstractSet[int]) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        program = _filter(sorted(ports))
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
        # Before the bind: what others send there costs us nothing, and nobody's room.
        self._socket.setsockopt(
            socket.SOL_SOCKET,
            _SO_ATTACH_FILTER,
            struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)),
        )
        self._socket.bind((interface, _ETH_P_ALL))
        self._socket.settimeout(0.1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="sniffer")
        self.payload = bytearray()
        self.dropped = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                packet = self._socket.recv(_FRAME_MAX)
            except TimeoutError:
                continue
            tcp = (packet[0] & 15) * 4
            self.payload += packet[tcp + (packet[tcp + 12] >> 4) * 4 :]
        statistics = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        self.dropped = struct.unpack("II", statistics)[1]


def _filter(ports: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Classic BPF: TCP over IPv4 from or to one of `ports`, seen coming in.

    On loopback each frame is seen going out as well.
    """
    checks = 2 * len(ports) + 2
    lines = [
        (_LD_W, 0, 0, _PACKET_TYPE),
        (_JEQ, checks + 3, 0, _PACKET_OUTGOING),
        (_LD_B, 0, 0, 9),
        (_JEQ, 0, checks + 1, socket.IPPROTO_TCP),
        (_LDX_IP_HEADER, 0, 0, 0),
    ]
    for end in (0, 2):
        lines.append((_LD_H_INDEXED, 0, 0, end))
        for port in ports:
            left = checks - (len(lines) - 5)
            lines.append((_JEQ, left, 0, port))
    return [*lines, (_RET, 0, 0, 0), (_RET, 0, 0, _FRAME_MAX)]
