# SPDX-License-Identifier: Apache-2.0
r"""A file that holds one small text and replaces it durably at the price of one fdatasync.

    0        `godwit-journal 1 acked=SEQ crc32=C\n`, zeros up to 4096
    4096     slot 0: `record seq=SEQ len=N crc32=C\n`, then N bytes of text
    + SLOT   slot 1, + SLOT slot 2: the same. SLOT = (file size - 4096) / 3, 64 KiB at first

The three slots are written with zeros when the file is made, so that a later write changes neither
size, nor extents, nor a directory: fdatasync then waits for the blocks of one slot and for no
journal of the file system. Writing a new file, renaming it and syncing the directory costs three to
ten times that, while a guest stands still.

A write goes into a slot that holds neither the newest text nor the newest durable one. The text
with the highest `seq` whose CRC-32 (over its header and itself) is right is the truth:
  - The process is killed inside the write, or power fails before its fdatasync is done: the slot
    is torn or whole. Torn, the text before it counts; whole, it counts. Nobody has acted on it yet,
    and a mark that is there proves nothing; one that is *not* there is what proves something.
  - Two slots would do if every write were durable. One that is not leaves the newest text only in
    memory and the durable one on disk: both must stay whole while a third is being written.

A text that was acknowledged must never silently give way to its predecessor. So after its fdatasync
the head says `acked=SEQ`, without another one: a kill loses nothing of it, and a power cut at most
the last half minute's. If the newest whole text is older than `acked`, one that somebody acted on
is lost to the medium: `DamagedError`, and the VM is refused. The head is one sector, it cannot
tear, so that a wrong head is damage too. What stays invisible: a medium that eats the newest slot
*and* a power cut within half a minute of its writing; no checksum tells that from a torn write.

Opening for writing syncs once and acknowledges: what a former process wrote and we can read may be
in memory only, and will be acted on from then on.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 4096
SLOT_COUNT = 3
SLOT_BYTES_MIN = 64 << 10
_HEADER_LEN_MAX = 128

_HEAD = re.compile(rb"godwit-journal 1 acked=(\d{20}) crc32=([0-9a-f]{8})\n")
_HEADER = re.compile(rb"record seq=(\d{20}) len=(\d{10}) crc32=([0-9a-f]{8})\n")


class DamagedError(Exception):
    """The file does not say what was last acknowledged."""


@dataclass(slots=True)
class Place:
    """Where a file stands, for its one writer."""

    seq: int
    """Highest that was ever given to a write, failed ones too: it is never used again."""
    newest_slot: int
    durable_slot: int
    slot_bytes: int

    def fits(self, text: bytes) -> bool:
        """False: the file must be made anew, with larger slots."""
        return len(text) + _HEADER_LEN_MAX <= self.slot_bytes


def read(data: bytes) -> tuple[bytes, Place]:
    """The newest text in a file's content, and where it is.

    Raises:
        DamagedError: it is not whole, or the text that was acknowledged is not in it.
    """
    slot_bytes, odd = divmod(len(data) - HEAD_BYTES, SLOT_COUNT)
    if odd or slot_bytes < SLOT_BYTES_MIN:
        raise DamagedError(f"it has {len(data)} bytes")
    acked = _read_head(data)
    found: dict[int, tuple[int, bytes]] = {}
    for slot in range(SLOT_COUNT):
        start = HEAD_BYTES + slot * slot_bytes
        record = _read_slot(data[start : start + slot_bytes])
        if record is None:
            continue
        seq, text = record
        if seq in found:
            raise DamagedError(f"two slots have sequence number {seq}")
        found[seq] = (slot, text)
    newest = max(found, default=0)
    if newest < acked or not found:
        raise DamagedError(f"record {acked} was acknowledged, the newest whole one is {newest}")
    slot, text = found[newest]
    return text, Place(seq=newest, newest_slot=slot, durable_slot=slot, slot_bytes=slot_bytes)


def open_for_writing(path: Path) -> tuple[bytes, Place]:
    """Read a file of which we are the writer from now on. Blocks.

    On a file system that is read-only it is only read: what it says may not be durable, and
    nothing that needs a mark is done before a write has succeeded, which then makes it so.

    Raises:
        OSError: it cannot be read, or not be made durable.
        DamagedError: as `read`.
    """
    writable = True
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        writable = False
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if writable:
            os.fdatasync(fd)
        with open(fd, "rb", closefd=False) as file:
            text, place = read(file.read())
        if writable:
            _pwrite(fd, _head(place.seq), 0)
        return text, place
    finally:
        os.close(fd)


def create(path: Path, text: bytes, *, seq: int = 1) -> Place:
    """Make the file, or replace it by one with larger slots; durable when it returns. Blocks."""
    slot_bytes = SLOT_BYTES_MIN
    while len(text) + _HEADER_LEN_MAX > slot_bytes:
        slot_bytes *= 2
    data = bytearray(HEAD_BYTES + SLOT_COUNT * slot_bytes)
    head, slot = _head(seq), _slot(seq, text)
    data[: len(head)] = head
    data[HEAD_BYTES : HEAD_BYTES + len(slot)] = slot
    scratch = path.with_name(f".{path.name}.new")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _pwrite(fd, bytes(data), 0)
        os.fsync(fd)
    except OSError:
        scratch.unlink()  # on a full disk it would be what fills it
        raise
    finally:
        os.close(fd)
    scratch.rename(path)
    fsync_directory(path.parent)
    return Place(seq=seq, newest_slot=0, durable_slot=0, slot_bytes=slot_bytes)


def write(path: Path, place: Place, text: bytes, *, durable: bool) -> None:
    """Replace the text, which fits. Blocks if `durable`.

    Not durable, it survives the end of every process; after a power cut an older text may be back,
    but none older than the last durable one.

    Raises:
        OSError: it is not known which of the texts a reader will find: the old one or this one.
            `place` still has the old one, and the next write may be tried.
    """
    place.seq += 1
    slot = min({*range(SLOT_COUNT)} - {place.newest_slot, place.durable_slot})
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _pwrite(fd, _slot(place.seq, text), HEAD_BYTES + slot * place.slot_bytes)
        if durable:
            os.fdatasync(fd)
            _pwrite(fd, _head(place.seq), 0)
    finally:
        os.close(fd)
    place.newest_slot = slot
    if durable:
        place.durable_slot = slot


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable. Blocks."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _head(acked: int) -> bytes:
    begin = b"godwit-journal 1 acked=%020d " % acked
    return begin + b"crc32=%08x\n" % zlib.crc32(begin)


def _slot(seq: int, text: bytes) -> bytes:
    begin = b"record seq=%020d len=%010d " % (seq, len(text))
    return begin + b"crc32=%08x\n" % zlib.crc32(text, zlib.crc32(begin)) + text


def _read_head(data: bytes) -> int:
    match = _HEAD.match(data)
    if match is None or _head(int(match[1])) != match[0]:
        raise DamagedError("its head is not one of ours")
    return int(match[1])


def _read_slot(data: bytes) -> tuple[int, bytes] | None:
    """None: blank, torn, or damaged; the file as a whole says whether that matters."""
    match = _HEADER.match(data)
    if match is None:
        return None
    seq, text = int(match[1]), data[match.end() : match.end() + int(match[2])]
    return (seq, text) if data.startswith(_slot(seq, text)) else None
