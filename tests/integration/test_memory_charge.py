# SPDX-License-Identifier: Apache-2.0
"""Which control group pays for a page that is installed: docs/install-kubernetes.md says this.

Two processes in memory control groups of their own, as a VM's pod and the agent's are: the VMM maps
a file on tmpfs and registers a userfaultfd, the agent has that descriptor and the file.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.requires("uffd", "root")

SIZE = 32 << 20
SLACK = 4 << 20
"""What two Python processes need besides: measured 1 to 2 MiB."""
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_COPY = 0xC028AA03
USERFAULTFD_IOC_NEW = 0xAA00
REGISTER_MODE_MISSING = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A memory control group, of either version."""

    path: Path
    usage: str

    def enter(self) -> None:
        """With this process."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def used_bytes(self) -> int:
        """What it is charged with."""
        return int((self.path / self.usage).read_text())


def _hierarchy() -> tuple[Path, str] | None:
    """Where memory is accounted, and the file that says how much; None: nowhere."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        if kind == "cgroup" and "memory" in fields[-1].split(","):
            return Path(fields[4]), "memory.usage_in_bytes"
        controllers = Path(fields[4]) / "cgroup.subtree_control"
        if kind == "cgroup2" and "memory" in controllers.read_text().split():
            return Path(fields[4]), "memory.current"
    return None


@contextlib.contextmanager
def _group(name: str) -> Iterator[Group]:
    found = _hierarchy()
    if found is None:
        pytest.skip("needs the memory controller, in a cgroup hierarchy of version 1 or 2")
    root, usage = found
    path = root / f"godwit-test-{os.getpid()}-{name}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"needs a memory control group of its own: {error}")
    try:
        yield Group(path=path, usage=usage)
    finally:
        path.rmdir()


def _vmm(group: Group, ram: Path, control: socket.socket) -> None:
    """Map the file, register it, hand the userfaultfd over; live until told."""
    group.enter()
    with ram.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    uffd = fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(uffd, UFFDIO_API, struct.pack("QQQ", 0xAA, 0, 0))
    fcntl.ioctl(uffd, UFFDIO_REGISTER, struct.pack("QQQQ", start, SIZE, REGISTER_MODE_MISSING, 0))
    fds = array.array("i", [uffd])
    control.sendmsg([struct.pack("Q", start)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    control.recv(1)


def _agent(group: Group, ram: Path, control: socket.socket, *, through_file: bool) -> None:
    """Fill the guest's memory, by UFFDIO_COPY or through the file."""
    group.enter()
    message, fds, _, _ = socket.recv_fds(control, 8, 1)
    (start,) = struct.unpack("Q", message)
    page = b"x" * (1 << 20)
    source = ctypes.create_string_buffer(page, len(page))
    with ram.open("r+b") as file:
        for offset in range(0, SIZE, len(page)):
            if through_file:
                os.pwrite(file.fileno(), page, offset)
                continue
            order = struct.pack("QQQQq", start + offset, ctypes.addressof(source), len(page), 0, 0)
            fcntl.ioctl(fds[0], UFFDIO_COPY, order)
    control.send(b".")
    control.recv(1)


def _child(work: object) -> int:
    """Fork; the child's life is `work`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()  # type: ignore[operator]
            status = 0
        except BaseException as error:  # noqa: BLE001 - the parent sees the status
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return pid


@pytest.mark.skipif(not Path("/dev/userfaultfd").exists(), reason="needs /dev/userfaultfd")
@pytest.mark.parametrize("through_file", [False, True], ids=["UFFDIO_COPY", "write"])
def test_the_vmm_pays_for_what_is_copied_to_it_and_a_writer_for_what_he_writes(
    through_file: bool,
) -> None:
    with contextlib.ExitStack() as stack:
        vmm, agent = (stack.enter_context(_group(name)) for name in ("vmm", "agent"))
        ram = stack.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm"))
        ram.truncate(SIZE)
        path = Path(ram.name)
        ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        (to_vmm, of_vmm), (to_agent, of_agent) = ends
        for end in (to_vmm, of_vmm, to_agent, of_agent):
            stack.enter_context(end)
        children = [
            _child(lambda: _vmm(vmm, path, of_vmm)),
            _child(lambda: _agent(agent, path, of_agent, through_file=through_file)),
        ]
        try:
            start, (uffd, *_), _, _ = socket.recv_fds(to_vmm, 8, 1)
            socket.send_fds(to_agent, [start], [uffd])
            os.close(uffd)
            assert to_agent.recv(1) == b"."
            paid = {"vmm": vmm.used_bytes(), "agent": agent.used_bytes()}
        finally:
            for end in (to_vmm, to_agent):
                with contextlib.suppress(OSError):
                    end.send(b".")
            ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert ended == [0, 0]
        payer, other = ("agent", "vmm") if through_file else ("vmm", "agent")
        print(f"{'write' if through_file else 'UFFDIO_COPY'} of {SIZE} bytes: {paid}")
        assert paid[payer] > SIZE
        assert paid[other] < SLACK
        # The charge stays with who paid until the memory goes, not until he does.
        left = (agent if through_file else vmm).used_bytes()
        assert left > SIZE - SLACK
