# SPDX-License-Identifier: Apache-2.0
"""The hand-off of a VMM, checked; docs/exit-channel.md 1 has its form.

It comes from a process that a guest may have taken over, so nothing of it is believed. One that is
refused leaves no descriptor open. What cannot be checked once for all (a VMM may change the
channel's memory at any time) the C core checks at each use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from services.common.errors import FailedPreconditionError
from services.common.vm_spec import PAGE_BYTES
from services.fault_agent.drivers.api import Faults, covers
from services.pagecore.api import ArrivalRegion, InstallMethod

MESSAGE_LEN_MAX = 64 << 10
UFFD_COUNT_MAX = 16
FD_COUNT_MAX = 3 + UFFD_COUNT_MAX
MAPPING_COUNT_MAX = 64
_VCPU_COUNT_MAX = 512
_ADDRESS_MAX = 1 << 57
"""Of a user process, five-level paging."""
_BITS_ALIGNMENT_BYTES = 64 * PAGE_BYTES
"""Regions begin at whole words of the bitmap."""

_CHANNEL_MAGIC = b"EXTCHAN1"
_CHANNEL_HEADER = struct.Struct("<8sIIQIIQ")
"""magic, version, header_len, total_len, page_size, vcpu_count, page_count"""
_CHANNEL_HEADER_LEN = 4096
_VCPU_LEN = 1024

_U64 = Annotated[int, Field(ge=0, lt=1 << 64)]


class HandoffRefusedError(FailedPreconditionError):
    """A VMM handed off something else than its guest's memory. Nothing of it was kept."""

    def __init__(self, why: str) -> None:
        super().__init__(
            "HANDOFF_REFUSED",
            f"the VMM's hand-off: {why}",
            hint="docs/exit-channel.md says what is expected; vmm.log in the VM's directory may"
            " say more",
        )


class _Strict(BaseModel):
    # Members that we do not know are a newer VMM's: they change nothing of what the others mean.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _Mapping(_Strict):
    base_host_virt_addr: int = Field(gt=0, lt=_ADDRESS_MAX)
    size: int = Field(gt=0, lt=_ADDRESS_MAX)
    offset: _U64
    page_size: int
    page_size_kib: int
    """Bytes, whatever its name says."""
    guest_phys_addr: _U64 | None = None
    uffd: int | None = Field(default=None, ge=0, lt=UFFD_COUNT_MAX)


class _Message(_Strict):
    protocol: Literal["godwit-exit-channel"]
    version: int = Field(ge=1, le=1)
    vmm: str = Field(max_length=64)
    pid: int
    backend: Literal["kvm-userfault", "exit-emulation", "exit-sigsegv", "uffd"]
    backend_reason: str = Field(default="", max_length=1024)
    vcpu_count: int = Field(ge=1, le=_VCPU_COUNT_MAX)
    fds: list[Literal["memory", "channel", "doorbell", "uffd"]] = Field(max_length=FD_COUNT_MAX)
    mappings: list[_Mapping] = Field(min_length=1, max_length=MAPPING_COUNT_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What we know of the VMM from elsewhere."""

    pid: int
    memory: tuple[int, int]
    """Device and inode of the RAM file."""
    memory_bytes: int
    vcpu_count: int


def accept(message: bytes, fds: Sequence[int], expected: Expected) -> Faults:
    """Check a hand-off; `fds` are the result's from then on, or closed.

    Args:
        message: the JSON object, with or without the newline behind it.
        fds: in the order in which they came.
        expected: what it has to agree with.

    Raises:
        HandoffRefusedError: it says what is wrong.
    """
    kept: set[int] = set()
    try:
        faults = _check(_parse(message), list(fds), expected)
        kept = {*faults.uffds, faults.exit_channel_fd, faults.exit_doorbell_fd}
        return faults
    except OSError as error:
        # A descriptor that cannot even be looked at: O_PATH, say.
        raise HandoffRefusedError(f"a descriptor: {error.strerror}") from error
    finally:
        close_all(set(fds) - kept)


def close_fds(faults: Faults) -> None:
    """Close what an accepted hand-off brought."""
    close_all(
        fd for fd in (*faults.uffds, faults.exit_channel_fd, faults.exit_doorbell_fd) if fd >= 0
    )


def close_all(fds: Iterable[int]) -> None:
    """Close every one, whatever becomes of the others."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _parse(message: bytes) -> _Message:
    try:
        return _Message.model_validate_json(message)
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise HandoffRefusedError(f"{where or 'message'}: {first['msg']}") from None


def _check(message: _Message, fds: list[int], expected: Expected) -> Faults:
    if message.pid != expected.pid:
        raise HandoffRefusedError(f"pid is {message.pid}, the VMM is {expected.pid}")
    if message.vcpu_count != expected.vcpu_count:
        raise HandoffRefusedError(
            f"vcpu_count is {message.vcpu_count}, the spec has {expected.vcpu_count}"
        )
    if len(fds) != len(message.fds):
        raise HandoffRefusedError(f"{len(fds)} descriptors came, fds names {len(message.fds)}")
    by_name: dict[str, list[int]] = {"memory": [], "channel": [], "doorbell": [], "uffd": []}
    for name, fd in zip(message.fds, fds, strict=True):
        by_name[name].append(fd)
    _check_counts(message, {name: len(found) for name, found in by_name.items()})
    _check_memory(by_name["memory"][0], expected)
    for fd in by_name["uffd"]:
        _check_kind(fd, "userfaultfd")
    for fd in by_name["doorbell"]:
        _check_kind(fd, "eventfd")
    for fd in by_name["channel"]:
        _check_channel(fd, expected)
    return Faults(
        backend=message.backend,
        backend_reason=message.backend_reason,
        regions=_regions(message, len(by_name["uffd"]), expected),
        uffds=tuple(by_name["uffd"]),
        exit_channel_fd=next(iter(by_name["channel"]), -1),
        exit_doorbell_fd=next(iter(by_name["doorbell"]), -1),
        install_method=InstallMethod.COPY if by_name["uffd"] else InstallMethod.WRITE,
    )


def _check_counts(message: _Message, counts: dict[str, int]) -> None:
    exits = int(message.backend != "uffd")
    wanted = {"memory": 1, "channel": exits, "doorbell": exits}
    for name, count in wanted.items():
        if counts[name] != count:
            raise HandoffRefusedError(
                f"{counts[name]} descriptors are {name}, {message.backend} has {count}"
            )
    if (counts["uffd"] == 0) != (message.backend == "exit-sigsegv"):
        raise HandoffRefusedError(f"{counts['uffd']} userfaultfds for {message.backend}")
    if counts["uffd"] > UFFD_COUNT_MAX:
        raise HandoffRefusedError(f"{counts['uffd']} userfaultfds, {UFFD_COUNT_MAX} at most")


def _check_memory(fd: int, expected: Expected) -> None:
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != expected.memory:
        raise HandoffRefusedError("memory is not the guest's RAM file")
    if status.st_size != expected.memory_bytes:
        raise HandoffRefusedError(
            f"memory has {status.st_size} bytes, the spec {expected.memory_bytes}"
        )
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise HandoffRefusedError("memory cannot be written")


def _check_kind(fd: int, kind: str) -> None:
    found = str(Path(f"/proc/self/fd/{fd}").readlink())
    if found != f"anon_inode:[{kind}]":
        raise HandoffRefusedError(f"a descriptor named {kind} is {found}")


def _check_channel(fd: int, expected: Expected) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise HandoffRefusedError("channel is no memfd")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise HandoffRefusedError("channel is no memfd") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        # We map it: one that shrinks under us would be our death.
        raise HandoffRefusedError("channel is not sealed against shrinking")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise HandoffRefusedError("channel cannot be read and written")
    page_count = expected.memory_bytes // PAGE_BYTES
    least = _CHANNEL_HEADER_LEN + (page_count + 7) // 8 + expected.vcpu_count * _VCPU_LEN
    if status.st_size % PAGE_BYTES or not least <= status.st_size <= 2 * least + (1 << 20):
        raise HandoffRefusedError(f"channel has {status.st_size} bytes")
    header = os.pread(fd, _CHANNEL_HEADER.size, 0)
    if len(header) != _CHANNEL_HEADER.size:
        raise HandoffRefusedError("channel cannot be read")
    wanted = (
        _CHANNEL_MAGIC,
        1,
        _CHANNEL_HEADER_LEN,
        status.st_size,
        PAGE_BYTES,
        expected.vcpu_count,
        page_count,
    )
    found = _CHANNEL_HEADER.unpack(header)
    if found != wanted:
        raise HandoffRefusedError(f"channel's header is {found}, not {wanted}")


def _regions(message: _Message, uffd_count: int, expected: Expected) -> tuple[ArrivalRegion, ...]:
    pieces = [(mapping.offset, mapping.size) for mapping in message.mappings]
    if not covers(pieces, expected.memory_bytes):
        raise HandoffRefusedError(
            f"mappings are {pieces}, not {expected.memory_bytes} bytes from 0 without a hole"
        )
    for mapping in message.mappings:
        _check_mapping(mapping, uffd_count, message.backend)
    at = sorted((mapping.base_host_virt_addr, mapping.size) for mapping in message.mappings)
    if any(start + size > after for (start, size), (after, _) in pairwise(at)):
        raise HandoffRefusedError("mappings lie over one another in the VMM")
    return tuple(
        ArrivalRegion(
            offset=mapping.offset,
            host_addr=mapping.base_host_virt_addr,
            len_bytes=mapping.size,
            uffd_index=mapping.uffd or 0,
        )
        for mapping in message.mappings
    )


def _check_mapping(mapping: _Mapping, uffd_count: int, backend: str) -> None:
    if (mapping.page_size, mapping.page_size_kib) != (PAGE_BYTES, PAGE_BYTES):
        raise HandoffRefusedError(
            f"pages of {mapping.page_size} and {mapping.page_size_kib} bytes, not {PAGE_BYTES}"
        )
    numbers = (mapping.base_host_virt_addr, mapping.size, mapping.guest_phys_addr or 0)
    if any(number % PAGE_BYTES for number in numbers):
        raise HandoffRefusedError(f"a mapping of {numbers} is not made of whole pages")
    if mapping.base_host_virt_addr + mapping.size > _ADDRESS_MAX:
        raise HandoffRefusedError("a mapping goes beyond the end of memory")
    if backend != "uffd" and mapping.offset % _BITS_ALIGNMENT_BYTES:
        raise HandoffRefusedError(f"a mapping at {mapping.offset} begins inside a word of bits")
    if (mapping.uffd is None) != (uffd_count == 0):
        raise HandoffRefusedError(f"a mapping with uffd {mapping.uffd}, of {uffd_count}")
    if mapping.uffd is not None and mapping.uffd >= uffd_count:
        raise HandoffRefusedError(f"a mapping with uffd {mapping.uffd}, of {uffd_count}")
