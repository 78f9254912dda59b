# SPDX-License-Identifier: Apache-2.0
"""A small agent for tests of godwit-microvm: the other side of docs/exit-channel.md, in Python.

Written from the document alone, it serves one guest out of a file and has no network. A program, so
that it can be killed: `python microvm_agent.py SOCKET MEMORY_FILE SEED`. Prints lines of JSON and
obeys words on stdin:

hold       take requests and serve none
hold-work  none of the workload's pages, page 1024 and up
mix        serve, and with each page push three that nobody asked for, in a random order
bulk       push all of them, and complete

Units: pages of 4096 bytes, counted from the start of the image.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import mmap
import os
import random
import select
import socket
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = 4096
UFFDIO_COPY = 0xC028AA03
UFFDIO_WAKE = 0x8010AA02
UFFDIO_UNREGISTER = 0x8010AA01
UFFD_EVENT_PAGEFAULT = 0x12
SYS_FUTEX = {"x86_64": 202, "aarch64": 98}[os.uname().machine]
FUTEX_WAKE = 1
BULK_PER_ROUND = 8
WORK_PAGE = 1024
NEVER = 1 << 62

REPOST_COUNT = 128
AGENT_IDLE = 132
VCPU_LEN = 1024
WAITING = 4
WAIT_PAGES = 8
REQUEST_TAIL = 128
WAKE_COUNT = 132
REQUESTS = 256
RING_MASK = 15

LIBC = ctypes.CDLL(None, use_errno=True)


def say(**members: object) -> None:
    """One line of JSON."""
    print(json.dumps(members), flush=True)


def address_of(memory: mmap.mmap) -> int:
    """Where it is mapped."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Channel:
    """The bitmap and the rings."""

    def __init__(self, fd: int) -> None:
        self.memory = mmap.mmap(fd, os.fstat(fd).st_size)
        self.address = address_of(self.memory)
        (magic, version, _, _, page_size, self.vcpu_count, self.page_count, bitmap, vcpus) = (
            struct.unpack_from("<8sIIQIIQQQ", self.memory)
        )
        assert (magic, version, page_size) == (b"EXTCHAN1", 1, PAGE)
        self.bitmap = bitmap
        self.blocks = [vcpus + index * VCPU_LEN for index in range(self.vcpu_count)]

    def word(self, offset: int) -> ctypes.c_uint32:
        """A word that the other side reads or writes at the same time."""
        return ctypes.c_uint32.from_address(self.address + offset)

    def take(self) -> list[int]:
        """Requests of every vCPU, in no order that means anything."""
        pages = []
        for block in self.blocks:
            head, tail = self.word(block).value, self.word(block + REQUEST_TAIL).value
            while tail != head:
                slot = block + REQUESTS + (tail & RING_MASK) * 16
                pages.append(struct.unpack_from("<Q", self.memory, slot)[0])
                tail = (tail + 1) & 0xFFFFFFFF
            self.word(block + REQUEST_TAIL).value = tail
        return [page for page in pages if page < self.page_count]

    def is_absent(self, page: int) -> bool:
        return bool(self.memory[self.bitmap + page // 8] >> page % 8 & 1)

    def clear(self, page: int) -> None:
        """The page is in place: tell whoever waits for it."""
        self.memory[self.bitmap + page // 8] &= ~(1 << page % 8)
        for block in self.blocks:
            waits = struct.unpack_from("<8Q", self.memory, block + WAIT_PAGES)
            if self.word(block + WAITING).value and page in waits:
                self.wake(block)

    def wake(self, block: int) -> None:
        self.word(block + WAKE_COUNT).value += 1
        LIBC.syscall(
            ctypes.c_long(SYS_FUTEX),
            ctypes.c_void_p(self.address + block + WAKE_COUNT),
            ctypes.c_int(FUTEX_WAKE),
            ctypes.c_int(1),
        )

    def repost(self) -> None:
        """A new agent: every vCPU is to post again."""
        self.word(REPOST_COUNT).value += 1
        for block in self.blocks:
            self.wake(block)


@dataclass(kw_only=True)
class Mapping:
    """A run of the image, where a userfaultfd of the VMM sees it; uffd -1: none."""

    address: int
    offset: int
    size: int
    uffd: int


@dataclass(kw_only=True)
class Agent:
    """One hand-off, from the first byte to `released`."""

    connection: socket.socket
    source: mmap.mmap
    source_address: int
    memory_fd: int
    mappings: list[Mapping]
    uffds: list[int]
    channel: Channel | None
    doorbell: int
    order: list[int]
    done: set[int] = field(default_factory=set)
    held: list[int] = field(default_factory=list)
    hold_from: int = NEVER
    bulk: bool = False
    mix: bool = False
    fault_count: int = 0

    def mapping_of(self, page: int) -> Mapping:
        return next(m for m in self.mappings if m.offset <= page * PAGE < m.offset + m.size)

    def copy(self, mapping: Mapping, page: int) -> None:
        """Content in place; where there is some already nothing is overwritten."""
        address = mapping.address + page * PAGE - mapping.offset
        wanted = struct.pack("<QQQQq", address, self.source_address + page * PAGE, PAGE, 0, 0)
        try:
            fcntl.ioctl(mapping.uffd, UFFDIO_COPY, wanted)
        except FileExistsError:
            fcntl.ioctl(mapping.uffd, UFFDIO_WAKE, struct.pack("<QQ", address, PAGE))

    def install(self, page: int, *, asked_for: bool) -> None:
        """Twice is once. A page of zeros that nobody waits for stays a hole."""
        if page in self.done and not asked_for:
            return
        mapping = self.mapping_of(page)
        content = self.source[page * PAGE : (page + 1) * PAGE]
        if mapping.uffd >= 0 and (asked_for or content.count(0) != PAGE):
            self.copy(mapping, page)
        elif mapping.uffd < 0 and page not in self.done:
            # Its bit is set and the guest cannot have touched it: this overwrites nothing.
            os.pwrite(self.memory_fd, content, page * PAGE)
        self.done.add(page)
        if self.channel and self.channel.is_absent(page):
            self.channel.clear(page)

    def take_events(self) -> list[int]:
        pages = []
        for uffd in self.uffds:
            try:
                events = os.read(uffd, 32 * 16)
            except BlockingIOError:
                continue
            for offset in range(0, len(events), 32):
                event, address = struct.unpack_from("<B15xQ", events, offset)
                assert event == UFFD_EVENT_PAGEFAULT
                mapping = next(m for m in self.mappings if 0 <= address - m.address < m.size)
                pages.append((mapping.offset + address - mapping.address) // PAGE)
        return pages

    def serve(self) -> int:
        pages = self.take_events() + (self.channel.take() if self.channel else [])
        self.fault_count += len(pages)
        for page in pages:
            if page >= self.hold_from:
                self.held.append(page)
                say(event="held", page=page)
            else:
                self.install(page, asked_for=True)
        return len(pages)

    def push(self, served: int) -> int:
        count_max = BULK_PER_ROUND if self.bulk else 3 * served if self.mix else 0
        count = 0
        while self.order and count < count_max:
            self.install(self.order.pop(), asked_for=False)
            count += 1
        return count

    def obey(self, word: str) -> None:
        self.bulk = word == "bulk"
        self.mix = word == "mix"
        self.hold_from = {"hold": 0, "hold-work": WORK_PAGE}.get(word, NEVER)
        for page in [] if self.hold_from < NEVER else self.held:
            self.install(page, asked_for=True)
        self.held = [] if self.hold_from == NEVER else self.held
        say(event="obeyed", word=word)

    def sleep(self) -> None:
        """With the doorbell on: a request that came before is seen by the last look."""
        if self.channel:
            self.channel.word(AGENT_IDLE).value = 1
            if any(
                self.channel.word(block).value != self.channel.word(block + REQUEST_TAIL).value
                for block in self.channel.blocks
            ):
                return
        fds = [sys.stdin, *self.uffds, *([self.doorbell] if self.channel else [])]
        readable, _, _ = select.select(fds, [], [])
        if self.doorbell in readable:
            os.read(self.doorbell, 8)
        if sys.stdin in readable:
            line = sys.stdin.readline()
            if not line:
                sys.exit(0)
            self.obey(line.strip())

    def run(self) -> None:
        if self.channel:
            for page in range(self.channel.page_count):
                if not self.channel.is_absent(page):
                    self.done.add(page)
            self.channel.repost()
        for mapping in self.mappings:
            if mapping.uffd >= 0:
                everything = struct.pack("<QQ", mapping.address, mapping.size)
                fcntl.ioctl(mapping.uffd, UFFDIO_WAKE, everything)
        while self.order:
            served = self.serve()
            if served + self.push(served) == 0:
                self.sleep()
            elif select.select([sys.stdin], [], [], 0)[0]:
                self.obey(sys.stdin.readline().strip())
        self.finish()

    def finish(self) -> None:
        """Until the VMM says that it needs nobody any more, faults on its last holes included."""
        self.connection.sendall(b'{"event": "complete"}\n')
        while not select.select([self.connection], [], [], 0.01)[0]:
            self.serve()
        line = self.connection.makefile("rb").readline()
        assert json.loads(line) == {"event": "released"}, line
        say(event="released", faults=self.fault_count, done=len(self.done))


def accept(listener: socket.socket, source: mmap.mmap, seed: int) -> Agent:
    """Wait for the VMM and take its hand-off."""
    connection, _ = listener.accept()
    data, control, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(64 * 4))
    fds: array.array[int] = array.array("i")
    for level, kind, passed in control:
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        fds.frombytes(passed)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 16)
    message: dict[str, Any] = json.loads(data)
    assert (message["protocol"], message["version"]) == ("godwit-exit-channel", 1)
    named = list(zip(message["fds"], fds, strict=True))
    uffds = [fd for name, fd in named if name == "uffd"]
    only = dict(named)
    mappings = [
        Mapping(
            address=m["base_host_virt_addr"],
            offset=m["offset"],
            size=m["size"],
            uffd=uffds[m["uffd"]] if "uffd" in m else -1,
        )
        for m in message["mappings"]
    ]
    order = list(range(sum(m.size for m in mappings) // PAGE))
    random.Random(seed).shuffle(order)
    say(event="hand_off", **message)
    return Agent(
        connection=connection,
        source=source,
        source_address=address_of(source),
        memory_fd=only["memory"],
        mappings=mappings,
        uffds=uffds,
        channel=Channel(only["channel"]) if "channel" in only else None,
        doorbell=only.get("doorbell", -1),
        order=order,
    )


def main() -> None:
    path, memory_file, seed = sys.argv[1:]
    with Path(memory_file).open("rb") as file:
        source = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    accept(listener, source, int(seed)).run()


if __name__ == "__main__":
    main()
