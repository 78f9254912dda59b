# SPDX-License-Identifier: Apache-2.0
"""The process that is the wire of `tests/harness/link.py`: packets in at one end, out at the other.

    link_forwarder.py '{"mtu": 9000, "links": [{"name": "a-b", "ends": [["a", FD], ["b", FD]]}]}'

FD is an open network namespace. In it appears a TUN device, named after the link. One JSON order a
line on stdin, one JSON answer a line on stdout; it ends with its stdin. Standard library alone: it
starts in a fraction of a second.

One thread. A packet is read, judged (cut, lost, no room in the queue), given the time at which it
comes out, and written then. Each direction keeps its order, also with jitter.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import struct
import sys
import threading
import time
from collections import deque
from typing import Any

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000
BURST = 32
"""Packets read from one end before the others are looked at."""
NS = 1_000_000_000


def open_tun(namespace_fd: int, name: str) -> int:
    """A TUN device `name` in a namespace; it goes with its descriptor."""
    result: list[int | OSError] = []

    def run() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace_fd, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            result.append(fd)
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        except OSError as error:
            result[:] = [error]

    # setns(2) moves one thread; this one ends right after.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


class Direction:
    """What one end sends, on its way to the other."""

    def __init__(self, source: int, sink: int, seed: str) -> None:
        self.source, self.sink = source, sink
        self.random = random.Random(seed)
        self.queue: deque[tuple[int, bytes]] = deque()
        self.free_ns = 0
        """When the last packet has left the sender's interface, at the rate."""
        self.counters = dict.fromkeys(
            ("packets", "bytes", "delayed", "lost", "cut", "overflowed", "refused"), 0
        )
        self.cut = False
        self.reset()

    def reset(self) -> None:
        """A perfect wire. Leaves a cut as it is."""
        self.delay_ms = self.jitter_ms = self.loss = 0.0
        self.rate_bytes_per_s = 0
        self.queue_bytes_max = 1 << 20

    def set(self, values: dict[str, Any]) -> None:
        """Change some of it. A cut takes what is on its way, too."""
        for name, value in values.items():
            if name not in ("cut", "delay_ms", "jitter_ms", "loss", "rate_bytes_per_s",
                            "queue_bytes_max"):  # fmt: skip
                raise ValueError(f"a link has no {name}")
            setattr(self, name, value)
        if self.cut:
            self.counters["cut"] += len(self.queue)
            self.queue.clear()
            self.free_ns = 0

    def take(self, packet: bytes, now_ns: int) -> None:
        """A packet has come in."""
        counters = self.counters
        if self.cut:
            counters["cut"] += 1
            return
        if self.loss and self.random.random() < self.loss:
            counters["lost"] += 1
            return
        due_ns = now_ns
        if self.rate_bytes_per_s:
            begin_ns = max(now_ns, self.free_ns)
            backlog_bytes = (begin_ns - now_ns) * self.rate_bytes_per_s // NS
            if backlog_bytes and backlog_bytes + len(packet) > self.queue_bytes_max:
                counters["overflowed"] += 1
                return
            due_ns = self.free_ns = begin_ns + len(packet) * NS // self.rate_bytes_per_s
        if self.delay_ms or self.jitter_ms:
            due_ns += int((self.delay_ms + self.jitter_ms * self.random.random()) * 1e6)
        if self.queue:
            due_ns = max(due_ns, self.queue[-1][0])
        if due_ns <= now_ns:
            self.put(packet)
        else:
            self.queue.append((due_ns, packet))
            counters["delayed"] += 1

    def put(self, packet: bytes) -> None:
        """A packet comes out."""
        try:
            os.write(self.sink, packet)
        except OSError:
            self.counters["refused"] += 1
            return
        self.counters["packets"] += 1
        self.counters["bytes"] += len(packet)

    def deliver(self, now_ns: int) -> None:
        """What is due comes out."""
        queue = self.queue
        while queue and queue[0][0] <= now_ns:
            self.put(queue.popleft()[1])


def main() -> None:
    """Carry packets until stdin ends."""
    config = json.loads(sys.argv[1])
    size = config["mtu"] + 100
    directions: dict[tuple[str, str], Direction] = {}
    by_fd: dict[int, Direction] = {}
    for link in config["links"]:
        (one, one_namespace), (two, two_namespace) = link["ends"]
        fds = [open_tun(fd, link["name"]) for fd in (one_namespace, two_namespace)]
        for sender, fd, other in ((one, fds[0], fds[1]), (two, fds[1], fds[0])):
            way = Direction(fd, other, f"{config.get('seed', 0)} {link['name']} {sender}")
            directions[link["name"], sender] = by_fd[fd] = way
    say(time_ns=time.monotonic_ns())

    poll = select.epoll()
    poll.register(0, select.EPOLLIN)
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    pending = b""
    while True:
        due_ns = min((way.queue[0][0] for way in by_fd.values() if way.queue), default=None)
        # epoll counts milliseconds; the last one is spent in select, which counts microseconds.
        wait_s = -1.0
        if due_ns is not None:
            wait_s = max(due_ns - time.monotonic_ns(), 0) / NS
            if wait_s < 0.002:
                select.select([poll], [], [], wait_s)
                wait_s = 0
            else:
                wait_s -= 0.001
        events = poll.poll(wait_s)
        now_ns = time.monotonic_ns()
        for way in by_fd.values():
            if way.queue:
                way.deliver(now_ns)
        for fd, _ in events:
            if fd:
                read(by_fd[fd], size)
                continue
            data = os.read(0, 65536)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                obey(json.loads(line), directions)


def read(way: Direction, size: int) -> None:
    """Take what one end has sent, up to a burst."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(BURST):
            way.take(os.read(way.source, size), time.monotonic_ns())


def obey(order: dict[str, Any], directions: dict[tuple[str, str], Direction]) -> None:
    """Change directions of one link, all at once; answer when, and with the counters."""
    name, senders = order["link"], order["senders"]
    try:
        for sender in senders:
            way = directions[name, sender]
            if order.get("reset"):
                way.reset()
            way.set(order.get("set", {}))
    except (KeyError, ValueError) as error:
        say(error=repr(error))
        return
    say(
        time_ns=time.monotonic_ns(),
        counters={sender: directions[name, sender].counters for sender in senders},
    )


def say(**values: Any) -> None:
    """One line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
