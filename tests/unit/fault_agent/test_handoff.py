# SPDX-License-Identifier: Apache-2.0
"""Promise: a hand-off is what docs/exit-channel.md says, or it is refused and nothing stays open.

The descriptors are real ones; where this machine allows no userfaultfd, not even of user mode only,
the tests that need one are skipped.
"""

from __future__ import annotations

import array
import asyncio
import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.fault_agent import handoff, handoff_socket, processes
from services.fault_agent.drivers.api import Faults, VmmUnreachableError
from services.fault_agent.drivers.unix_socket import short_name
from services.fault_agent.handoff import Expected, HandoffRefusedError
from services.fault_agent.handoff_socket import HandedOff, Listener
from services.pagecore.api import InstallMethod

MIB = 1 << 20
SIZE = 64 * MIB
PAGES = SIZE // 4096
BASE = 0x7F00_0000_0000
WAIT_S = 60.0
UFFD_USER_MODE_ONLY = 1

Message = dict[str, Any]


def open_count() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def channel_header(**changes: int) -> bytes:
    total = changes.get("total", 4096 + 4096 + 4096)
    return struct.pack(
        "<8sIIQIIQ",
        b"EXTCHAN1",
        changes.get("version", 1),
        4096,
        total,
        4096,
        changes.get("vcpus", 2),
        changes.get("pages", PAGES),
    )


def make_channel(*, seal: bool = True, size: int = 3 * 4096, **changes: int) -> int:
    fd = os.memfd_create("channel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, channel_header(**changes), 0)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


def make_uffd() -> int:
    fd = ctypes.CDLL(None, use_errno=True).syscall(
        ctypes.c_long(323), os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY
    )
    if fd < 0:
        code = ctypes.get_errno()
        assert code in (errno.EPERM, errno.ENOSYS), os.strerror(code)
        pytest.skip(f"userfaultfd: {os.strerror(code)}")
    return int(fd)


class Vmm:
    """What a well-behaved VMM would send."""

    def __init__(self, directory: Path, backend: str = "exit-emulation") -> None:
        self.ram = directory / "ram"
        self.ram.touch()
        os.truncate(self.ram, SIZE)
        status = self.ram.stat()
        self.expected = Expected(
            pid=os.getpid(),
            memory=(status.st_dev, status.st_ino),
            memory_bytes=SIZE,
            vcpu_count=2,
        )
        self.names = {
            "uffd": ["memory", "uffd"],
            "exit-sigsegv": ["memory", "channel", "doorbell"],
        }.get(backend, ["memory", "channel", "doorbell", "uffd"])
        uffd = {"uffd": 0} if "uffd" in self.names else {}
        self.message: Message = {
            "protocol": "godwit-exit-channel",
            "version": 1,
            "vmm": "test",
            "pid": os.getpid(),
            "backend": backend,
            "backend_reason": "because",
            "vcpu_count": 2,
            "fds": self.names,
            "mappings": [
                {
                    "base_host_virt_addr": BASE + start,
                    "size": size,
                    "offset": start,
                    "page_size": 4096,
                    "page_size_kib": 4096,
                    "guest_phys_addr": start,
                    **uffd,
                }
                for start, size in ((0, 2 * MIB), (2 * MIB, SIZE - 2 * MIB))
            ],
            "of a newer VMM": True,
        }

    def fd(self, name: str) -> int:
        if name == "memory":
            return os.open(self.ram, os.O_RDWR | os.O_CLOEXEC)
        if name == "channel":
            return make_channel()
        return os.eventfd(0, os.EFD_CLOEXEC) if name == "doorbell" else make_uffd()

    def fds(self) -> list[int]:
        return [self.fd(name) for name in self.names]

    def line(self) -> bytes:
        return json.dumps(self.message).encode() + b"\n"


def refused(vmm: Vmm, fds: list[int], why: str) -> None:
    before = open_count() - len(fds)
    with pytest.raises(HandoffRefusedError, match=why) as refusal:
        handoff.accept(json.dumps(vmm.message).encode(), fds, vmm.expected)
    assert refusal.value.reason == "HANDOFF_REFUSED"
    assert open_count() == before, "a refused hand-off leaves nothing open"


@pytest.mark.parametrize(
    ("backend", "uffds", "method"),
    [
        ("kvm-userfault", 1, InstallMethod.COPY),
        ("exit-emulation", 1, InstallMethod.COPY),
        ("exit-sigsegv", 0, InstallMethod.WRITE),
        ("uffd", 1, InstallMethod.COPY),
    ],
)
def test_what_a_good_hand_off_becomes(
    tmp_path: Path, backend: str, uffds: int, method: InstallMethod
) -> None:
    vmm = Vmm(tmp_path, backend)
    before = open_count()
    faults = handoff.accept(vmm.line(), vmm.fds(), vmm.expected)
    assert (faults.backend, faults.backend_reason) == (backend, "because")
    assert (len(faults.uffds), faults.install_method) == (uffds, method)
    assert (faults.exit_channel_fd >= 0) == (backend != "uffd") == (faults.exit_doorbell_fd >= 0)
    assert [(r.offset, r.host_addr, r.len_bytes, r.uffd_index) for r in faults.regions] == [
        (0, BASE, 2 * MIB, 0),
        (2 * MIB, BASE + 2 * MIB, SIZE - 2 * MIB, 0),
    ]
    handoff.close_fds(faults)
    assert open_count() == before, "the memory's descriptor is not kept"


def test_mappings_are_dealt_out_to_several_userfaultfds(tmp_path: Path) -> None:
    vmm = Vmm(tmp_path)
    vmm.names.append("uffd")
    vmm.message["mappings"][1]["uffd"] = 1
    faults = handoff.accept(vmm.line(), vmm.fds(), vmm.expected)
    assert [region.uffd_index for region in faults.regions] == [0, 1]
    handoff.close_fds(faults)


def drop(name: str) -> Callable[[Message], None]:
    def change(message: Message) -> None:
        del message[name]

    return change


def put(name: str, value: object) -> Callable[[Message], None]:
    def change(message: Message) -> None:
        message[name] = value

    return change


def mapping(name: str, value: object, index: int = 1) -> Callable[[Message], None]:
    def change(message: Message) -> None:
        message["mappings"][index][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (put("protocol", "another"), "protocol"),
        (put("version", 2), "version"),
        (put("version", True), "version"),
        (drop("pid"), "pid"),
        (put("pid", 1), "pid is 1"),
        (put("pid", str(os.getpid())), "pid"),
        (put("backend", "magic"), "backend"),
        (put("backend", "uffd"), "1 descriptors are channel"),
        (put("backend", "exit-sigsegv"), "userfaultfds for exit-sigsegv"),
        (put("backend_reason", "x" * 2000), "backend_reason"),
        (put("vcpu_count", 3), "vcpu_count is 3"),
        (put("vcpu_count", 0), "vcpu_count"),
        (put("vcpu_count", 1 << 70), "vcpu_count"),
        (put("fds", ["memory", "channel", "doorbell"]), "4 descriptors came"),
        (put("fds", ["memory", "channel", "doorbell", "root"]), "fds"),
        (put("fds", ["memory", "memory", "doorbell", "uffd"]), "2 descriptors are memory"),
        (put("fds", ["channel", "memory", "doorbell", "uffd"]), "not the guest's RAM file"),
        (put("fds", ["memory", "channel", "uffd", "doorbell"]), "eventfd"),
        (put("fds", ["memory", "doorbell", "channel", "uffd"]), "named eventfd"),
        (put("fds", "memory"), "fds"),
        (put("mappings", []), "mappings"),
        (put("mappings", [{}] * 65), "mappings"),
        (put("mappings", None), "mappings"),
        (mapping("offset", 4 * MIB), "without a hole"),
        (mapping("offset", 0), "without a hole"),
        (mapping("offset", -1), "offset"),
        (mapping("size", SIZE), "without a hole"),
        (mapping("size", 0), "size"),
        (mapping("size", 1.5), "size"),
        (mapping("page_size", 2 * MIB), "pages of"),
        (mapping("page_size_kib", 4), "pages of"),
        (mapping("base_host_virt_addr", BASE), "over one another"),
        (mapping("base_host_virt_addr", 0), "base_host_virt_addr"),
        (mapping("base_host_virt_addr", BASE + 2 * MIB + 1), "whole pages"),
        (mapping("base_host_virt_addr", (1 << 57) - 4096), "beyond the end"),
        (mapping("guest_phys_addr", 7), "whole pages"),
        (mapping("uffd", 1), "uffd 1, of 1"),
        (mapping("uffd", None), "uffd None, of 1"),
        (mapping("uffd", -1), "uffd"),
    ],
)
def test_a_message_that_lies(tmp_path: Path, change: Callable[[Message], None], why: str) -> None:
    vmm = Vmm(tmp_path)
    fds = vmm.fds()
    change(vmm.message)
    refused(vmm, fds, why)


def test_a_mapping_inside_a_word_of_bits(tmp_path: Path) -> None:
    vmm = Vmm(tmp_path)
    first, second = vmm.message["mappings"]
    first["size"] = second["offset"] = 4096
    second["size"] = SIZE - 4096
    refused(vmm, vmm.fds(), "inside a word")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b'{"a":' * 5000])
def test_a_message_that_is_none(tmp_path: Path, text: bytes) -> None:
    vmm = Vmm(tmp_path)
    fds = vmm.fds()
    before = open_count() - len(fds)
    with pytest.raises(HandoffRefusedError):
        handoff.accept(text, fds, vmm.expected)
    assert open_count() == before


def null() -> int:
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


@pytest.mark.parametrize(
    ("name", "make", "why"),
    [
        ("memory", null, "not the guest's RAM file"),
        ("channel", null, "channel is no memfd"),
        ("channel", lambda: os.open("/tmp", os.O_RDONLY | os.O_CLOEXEC), "no memfd"),
        ("channel", lambda: make_channel(seal=False), "not sealed"),
        ("channel", lambda: make_channel(size=4096), "4096 bytes"),
        ("channel", lambda: make_channel(size=3 * 4096 + 1), "bytes"),
        ("channel", lambda: make_channel(size=1 << 40), "bytes"),
        ("channel", lambda: make_channel(vcpus=3), "header"),
        ("channel", lambda: make_channel(pages=PAGES + 1), "header"),
        ("channel", lambda: make_channel(total=1 << 40), "header"),
        ("channel", lambda: make_channel(version=2), "header"),
        ("doorbell", null, "named eventfd"),
        ("uffd", null, "named userfaultfd"),
        ("uffd", lambda: os.eventfd(0), "named userfaultfd"),
    ],
)
def test_a_descriptor_that_lies(
    tmp_path: Path, name: str, make: Callable[[], int], why: str
) -> None:
    vmm = Vmm(tmp_path)
    fds = [make() if each == name else vmm.fd(each) for each in vmm.names]
    refused(vmm, fds, why)


def reopened(flags: int) -> int:
    """A good channel, opened otherwise than it has to be."""
    good = make_channel()
    fd = os.open(f"/proc/self/fd/{good}", flags | os.O_CLOEXEC)
    os.close(good)
    return fd


def one_end(ends: tuple[int, int]) -> int:
    os.close(ends[1])
    return ends[0]


@pytest.mark.parametrize("name", ["memory", "channel", "doorbell", "uffd"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: one_end(os.pipe()),
        lambda: socket.socket().detach(),
        lambda: os.open("/", os.O_PATH | os.O_CLOEXEC),
        lambda: os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC),
        lambda: os.pidfd_open(os.getpid()),
        lambda: reopened(os.O_WRONLY),
        lambda: reopened(os.O_RDONLY),
        lambda: reopened(os.O_PATH),
    ],
    ids=["pipe", "socket", "path", "mem", "pidfd", "writeonly", "readonly", "opath"],
)
def test_any_other_kind_of_descriptor(tmp_path: Path, name: str, make: Callable[[], int]) -> None:
    vmm = Vmm(tmp_path)
    fds = [make() if each == name else vmm.fd(each) for each in vmm.names]
    refused(vmm, fds, "a descriptor|channel|memory")


def test_memory_that_is_another_size_or_cannot_be_written(tmp_path: Path) -> None:
    vmm = Vmm(tmp_path)
    fds = vmm.fds()
    os.close(fds[0])
    fds[0] = os.open(vmm.ram, os.O_RDONLY | os.O_CLOEXEC)
    refused(vmm, fds, "cannot be written")
    os.truncate(vmm.ram, SIZE + 4096)
    refused(vmm, vmm.fds(), "memory has")


# --- the socket


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(tmp_path)
    yield made
    made.close()


def dial(directory: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(WAIT_S)
    with short_name(directory / handoff_socket.SOCKET) as name:
        connection.connect(name)
    return connection


def is_hung_up_on(connection: socket.socket) -> bool:
    """Closed by the other side; with something unread of ours that is a reset."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def hand_off(connection: socket.socket, data: bytes, fds: list[int]) -> None:
    connection.sendmsg(
        [data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    )
    for fd in fds:
        os.close(fd)


async def accepted(listener: Listener, expected: Expected) -> tuple[object, Faults]:
    async with asyncio.timeout(WAIT_S):
        return await listener.accept(expected)


async def test_the_socket_is_ours_alone_and_its_path_may_be_long(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    (directory / handoff_socket.SOCKET).touch()  # what a dead agent has left
    made = Listener(directory)
    assert (directory / handoff_socket.SOCKET).stat().st_mode & 0o777 == 0o600
    dial(directory).close()
    made.close()
    made.close()
    assert list(directory.iterdir()) == []


async def test_connections_that_say_nothing_are_passed_over(
    tmp_path: Path, listener: Listener
) -> None:
    """Of a VMM that was interrupted: what counts is the one that it keeps."""
    vmm = Vmm(tmp_path, "exit-sigsegv")
    before = open_count()
    dial(tmp_path).close()
    with dial(tmp_path) as half:
        hand_off(half, vmm.line()[:20], vmm.fds())
    with dial(tmp_path) as connection:
        hand_off(connection, vmm.line(), vmm.fds())
        kept, faults = await accepted(listener, vmm.expected)
        assert faults.backend == "exit-sigsegv"
        handoff.close_fds(faults)
        kept.close()  # type: ignore[attr-defined]
    assert open_count() == before


async def test_a_message_in_pieces_is_one_message(tmp_path: Path, listener: Listener) -> None:
    vmm = Vmm(tmp_path, "exit-sigsegv")
    line = vmm.line()
    with dial(tmp_path) as connection:
        hand_off(connection, line[:1], vmm.fds())
        connection.sendall(line[1:50])
        connection.sendall(line[50:])
        kept, faults = await accepted(listener, vmm.expected)
        handoff.close_fds(faults)
        kept.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("data", "fd_count", "why"),
    [
        (b"{}\n", 0, "protocol"),
        (b"{}\n{}", 1, "2 bytes behind"),
        (b"x" * (handoff.MESSAGE_LEN_MAX + 1), 1, "more than 65536 bytes"),
        (b"{}\n", handoff.FD_COUNT_MAX + 1, "more than 19 descriptors"),
        (b"{}\n", 200, "more than 19 descriptors"),
    ],
)
async def test_a_connection_that_says_too_much(
    tmp_path: Path, listener: Listener, data: bytes, fd_count: int, why: str
) -> None:
    vmm = Vmm(tmp_path)
    before = open_count()
    with dial(tmp_path) as connection:
        hand_off(connection, data, [null() for _ in range(fd_count)])
        with pytest.raises(HandoffRefusedError, match=why):
            await accepted(listener, vmm.expected)
        assert is_hung_up_on(connection)
    assert open_count() == before


async def test_a_message_that_does_not_become_whole(
    tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then: the whole has its time, not each piece."""
    monkeypatch.setattr(handoff_socket, "MESSAGE_TIMEOUT_S", 0.3)
    vmm = Vmm(tmp_path)
    before = open_count()
    with dial(tmp_path) as connection:
        hand_off(connection, vmm.line()[:1], vmm.fds())

        async def drip() -> None:
            for byte in vmm.line()[1:-1]:
                await asyncio.sleep(0.01)
                connection.sendall(bytes([byte]))

        dripping = asyncio.ensure_future(drip())
        with pytest.raises(HandoffRefusedError, match=r"not whole after 0\.3 s"):
            await accepted(listener, vmm.expected)
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        assert is_hung_up_on(connection)
    assert open_count() == before


async def test_a_second_hand_off_is_not_taken(tmp_path: Path, listener: Listener) -> None:
    """Not on the same connection, whatever it brings; on another it waits until it is asked for."""
    vmm = Vmm(tmp_path, "exit-sigsegv")
    before = open_count()
    with dial(tmp_path) as connection, dial(tmp_path) as other:
        hand_off(connection, vmm.line(), vmm.fds())
        hand_off(other, vmm.line(), vmm.fds())
        kept, faults = await accepted(listener, vmm.expected)
        hand_off(connection, vmm.line(), vmm.fds())
        with pytest.raises(HandoffRefusedError, match="descriptors behind"):
            await kept.line()  # type: ignore[attr-defined]
        kept.close()  # type: ignore[attr-defined]
        handoff.close_fds(faults)
        second, again = await accepted(listener, vmm.expected)
        handoff.close_fds(again)
        second.close()  # type: ignore[attr-defined]
    assert open_count() == before


async def test_another_process_is_hung_up_on(tmp_path: Path, listener: Listener) -> None:
    """It does not keep the VMM from handing off either."""
    vmm = Vmm(tmp_path)
    expected = Expected(
        pid=os.getpid() + 1,
        memory=vmm.expected.memory,
        memory_bytes=SIZE,
        vcpu_count=2,
    )
    with dial(tmp_path) as connection:
        hand_off(connection, vmm.line(), [])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await listener.accept(expected)
        assert is_hung_up_on(connection)


# --- the end


class Ending:
    """A VMM that has handed off and now hears what an agent says."""

    def __init__(self, tmp_path: Path, listener: Listener) -> None:
        self.directory = tmp_path
        self.vmm = Vmm(tmp_path, "exit-sigsegv")
        self.listener = listener
        self.has_released = False
        self.connection = self.dial()

    def dial(self) -> socket.socket:
        connection = dial(self.directory)
        hand_off(connection, self.vmm.line(), self.vmm.fds())
        return connection

    async def armed(self) -> HandedOff:
        connection, faults = await self.listener.accept(self.vmm.expected)
        process = processes.identify(os.getpid())
        assert process is not None

        async def released() -> bool:
            return self.has_released

        return HandedOff(
            process=process,
            expected=self.vmm.expected,
            listener=self.listener,
            connection=connection,
            faults=faults,
            released=released,
        )

    async def hears(self) -> object:
        try:
            line = await asyncio.to_thread(self.connection.recv, 4096)
        except ConnectionResetError:
            return None
        return json.loads(line) if line else None

    def says(self, text: bytes = b'{"event": "released"}\n') -> None:
        self.connection.sendall(text)


@pytest.fixture
def ending(tmp_path: Path, listener: Listener) -> Iterator[Ending]:
    made = Ending(tmp_path, listener)
    yield made
    made.connection.close()


async def test_it_lets_go(ending: Ending) -> None:
    before = open_count()
    armed = await ending.armed()
    armed.close_fds()
    async with asyncio.TaskGroup() as tasks:
        letting_go = tasks.create_task(armed.let_go())
        assert await ending.hears() == {"event": "complete"}
        ending.says(b'{"event": "of a newer VMM"}\n{"event": ')
        ending.says(b'"released"}\n')
        await letting_go
    await armed.let_go()  # asked again
    armed.close()
    assert open_count() == before - 1, "its listener is closed too"


@pytest.mark.parametrize(
    "says",
    [
        b"",
        b"nonsense\n",
        b"[]\n",
        b"x" * 5000,
        b"[" * 60000 + b"\n",
        b'{"event": "\0\xff"}\n',
        b'{"event": ' + b"9" * 4000 + b"9" * 4000 + b"}\n",
    ],
)
async def test_a_released_that_is_lost_is_heard_again(ending: Ending, says: bytes) -> None:
    """The connection breaks, by either side's doing; the VMM connects again and says it then."""
    armed = await ending.armed()
    async with asyncio.TaskGroup() as tasks:
        letting_go = tasks.create_task(armed.let_go())
        assert await ending.hears() == {"event": "complete"}
        if says:
            ending.says(says)
            assert await ending.hears() is None, "hung up"
        ending.connection.close()
        ending.connection = ending.dial()
        assert await ending.hears() == {"event": "complete"}
        ending.says()
        await letting_go
    armed.close()


async def test_a_released_that_was_said_to_nobody(ending: Ending) -> None:
    """It does not connect any more: what it says of itself tells."""
    armed = await ending.armed()
    async with asyncio.TaskGroup() as tasks:
        letting_go = tasks.create_task(armed.let_go())
        assert await ending.hears() == {"event": "complete"}
        ending.has_released = True
        ending.connection.close()
        await letting_go
    armed.close()


async def test_a_vmm_that_does_not_let_go_is_said_so(
    ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff_socket, "LET_GO_TIMEOUT_S", 0.2)
    armed = await ending.armed()
    with pytest.raises(VmmUnreachableError, match="does not let go"):
        await armed.let_go()
    armed.close()
