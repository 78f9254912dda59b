# SPDX-License-Identifier: Apache-2.0
"""What a node can prove about its VMs after a crash: one record a VM, durable before each act.

`<state_dir>/vms/<vm_id>/journal` holds the record as JSON; `journal_file` has its form and why a
reader finds the last acknowledged record or a newer one. Every mark is durable *before* the act
that it names: a mark that is not there proves that the act was never attempted.
A record that cannot be read is kept as it is and its VM refused (I8: on doubt fail closed).

For people: `python -m services.fault_agent.journal FILE...` prints records; `strings FILE` shows
the last three. `journal.json`, the form before, is read once and replaced.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pydantic
from pydantic import ConfigDict

from services.common.errors import FailedPreconditionError, UnavailableError
from services.fault_agent import journal_file
from services.fault_agent.journal_file import DamagedError, Place, fsync_directory
from services.fault_agent.processes import Process

FILE = "journal"
FILE_OLD = "journal.json"


class Role(enum.StrEnum):
    """What a VM is to this node; godwit.agent.v1.VmRole."""

    UNKNOWN = "unknown"
    """Only its fence is known: a command came before any VM."""
    RESIDENT = "resident"
    DEPARTING = "departing"
    SEALED = "sealed"
    ARRIVING = "arriving"
    ARRIVED = "arrived"
    GONE = "gone"


MIGRATING = frozenset({Role.DEPARTING, Role.SEALED, Role.ARRIVING, Role.ARRIVED})
"""Roles in which `Record.migration_id` is under way."""


class Decision(enum.StrEnum):
    """What the store has decided; godwit.common.v1.Decision."""

    NONE = "none"
    COMMITTED = "committed"
    ABORTED = "aborted"
    RETURNED = "returned"
    """COMMITTED, and then given back to the source under a fresh epoch."""
    LOST = "lost"
    """COMMITTED, and then given up."""


class ExportState(enum.StrEnum):
    """godwit.common.v1.ImageState."""

    LIVE = "live"
    FROZEN = "frozen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """The image under which this node offers the VM's memory."""

    image_id: str
    epoch: int
    """Under which the guest last ran on this memory."""
    generation: int
    state: ExportState
    destination: str = ""
    """DNS name of the node that alone may read it; empty: any node."""
    destination_epoch: int = 0
    destination_key: str = ""
    """Hex. Of the destination, from the pause on: its key is good whatever its certificate says."""
    token_key: str = ""
    """Hex. Public key of who signs the tokens of readers; empty: none is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An outage of an arrival; godwit.common.v1.Hold."""

    number: int
    cause: int
    """godwit.common.v1.HoldCause; 0 where none is meant."""
    outage_ns: int
    held_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Last counters of an arrival that is over; godwit.common.v1.ArrivalCounters."""

    page_count: int
    absent_count: int
    demand_page_count: int
    bulk_page_count: int
    zero_page_count: int
    removed_page_count: int
    fault_count: int
    received_bytes: int
    checksum_error_count: int
    reconnect_count: int
    violation_count: int
    fault_sample_count: int
    fault_p50_ns: int
    fault_p99_ns: int
    fault_p999_ns: int
    fault_max_ns: int
    held_total_ns: int = 0
    holds: tuple[Held, ...] = ()
    hold_now: Held | None = None
    """None: pages can be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arriving:
    """Where the memory of an arriving VM comes from, and how to take the arrival up again."""

    image_id: str
    page_address: str
    session_id: str
    page_map_path: str
    traceparent: str = ""
    bulk_bytes_per_s_max: int = 0
    freeze_after_ms: int = 0
    """The guest's VMM is frozen when it has been held for that long; 0: never."""
    remote_fd: int = -1
    """Number of the userfaultfd in the VMM; -1: not injected yet."""
    unregistered: bool = False
    """The VMM needs nobody for its memory any more."""
    page_server_name: str = ""
    """DNS name of the page server's certificate; empty: without TLS."""
    page_server_key: str = ""
    """Hex. By which it was known last: good whatever its certificate says."""
    token: str = ""
    """Hex. A FetchToken; empty: none."""
    counters: Counters | None = None
    """Final ones, from MEMORY_COMPLETE on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """A device state that the destination said it has loaded."""

    epoch: int
    len_bytes: int
    sha256: str
    """Hex."""
    save_ns: int
    load_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything durable about one VM on this node. Epochs: 0 = never."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    vm_id: str
    boot_id: str
    """The boot under which `process` and the RAM file exist. After another they do not."""
    version: Literal[1, 2] = 1
    """2: the VMM may be frozen. An agent that reads 1 alone must not take it: it would not thaw."""
    role: Role = Role.UNKNOWN
    epoch_seen: int = 0
    epoch_owned: int = 0
    epoch_departing: int = 0
    """Epoch of the destination for which this node last prepared to give the VM away."""
    migration_id: str = ""
    """The migration under way; where `role` is not in MIGRATING, the last one."""
    decision: Decision = Decision.NONE
    """The decision told for `migration_id`."""
    epoch_prepared: int = 0
    epoch_loaded: int = 0
    epoch_activating: int = 0
    epoch_memory_complete: int = 0
    epoch_sealed: int = 0
    spec_json: str = ""
    process: Process | None = None
    """The VMM; None: never started, or proved dead."""
    ram_path: str = ""
    ram_inode: int = 0
    generation_last: int = 0
    """Highest generation that an image of this VM ever had here."""
    export: Export | None = None
    arriving: Arriving | None = None
    transferred: Transferred | None = None

    @property
    def migrating(self) -> bool:
        """A migration is under way here."""
        return self.role in MIGRATING


class JournalCorruptError(FailedPreconditionError):
    """A record cannot be read. Its VM is refused everything until a person has looked."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            "JOURNAL_CORRUPT",
            f"{path} cannot be read: {why}",
            hint="nothing is done with this VM: find out what became of it, then restore the file"
            " from a backup or remove it by hand",
            metadata={"path": str(path)},
        )


class JournalNewerError(JournalCorruptError):
    """A newer agent wrote the record. Nothing is wrong with it."""

    def __init__(self, path: Path, version: int) -> None:
        super().__init__(path, f"it has version {version}, this agent reads up to {VERSION_MAX}")
        self.reason = "JOURNAL_NEWER"
        self.hint = "nothing is done with this VM, it lives on: start the newer agent again"


class JournalWriteError(UnavailableError):
    """A record could not be made durable, so that nothing it names was done. Try again."""

    def __init__(self, path: Path, error: OSError) -> None:
        reason, hint = _WRITE_ERRORS.get(
            error.errno or 0, ("JOURNAL_FAILED", "see the health of the disk under --state-dir")
        )
        super().__init__(
            reason,
            f"{path} cannot be written: {error.strerror or error}",
            hint=f"{hint}; it is tried again",
            metadata={"path": str(path)},
        )


_FULL = ("JOURNAL_FULL", "free space on the file system of --state-dir")
_WRITE_ERRORS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: (
        "JOURNAL_READ_ONLY",
        "make the file system of --state-dir writable; one that had errors is remounted read-only",
    ),
}

VERSION_MAX = 2
_RECORD = pydantic.TypeAdapter(Record)
_VERSION = re.compile(rb'^\s*"version": (\d+),?$', re.MULTILINE)
"""In a whole record as `encode` lays it out, one field a line; no later release may change that."""


def decode(data: bytes, path: Path) -> Record:
    """Read a record.

    Raises:
        JournalCorruptError: it is torn, or of another VM than its directory.
        JournalNewerError: a newer agent wrote it.
    """
    # Before the fields: a newer record may have any.
    version = _VERSION.search(data)
    if version is not None and int(version[1]) > VERSION_MAX:
        raise JournalNewerError(path, int(version[1]))
    try:
        record = _RECORD.validate_json(data, strict=False)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise JournalCorruptError(path, f"{where or 'record'}: {first['msg']}") from error
    if record.vm_id != path.parent.name:
        raise JournalCorruptError(path, f"it is the record of {record.vm_id!r}")
    return record


def encode(record: Record) -> bytes:
    """The record's bytes, readable for people too."""
    return _RECORD.dump_json(record, indent=1) + b"\n"


def read(path: Path) -> Record:
    """The record in a file, for whoever does not write it. Blocks.

    Raises:
        OSError: it cannot be read.
        JournalCorruptError: as `decode`, or the file is damaged.
    """
    try:
        text, _ = journal_file.read(path.read_bytes())
    except DamagedError as error:
        raise JournalCorruptError(path, str(error)) from error
    return decode(text, path)


class Journal:
    """The records of a node. One process at a time: `Node` holds the directory's lock."""

    def __init__(self, state_dir: Path) -> None:
        self._vms = state_dir / "vms"
        self._vms.mkdir(parents=True, exist_ok=True)
        fsync_directory(state_dir)
        self._places: dict[str, Place] = {}
        """Of the VMs that have a file."""
        self._locks: dict[str, threading.Lock] = {}
        """Each guards a VM's file and its place: one write at a time. Uncontended but for writes
        whose caller was cancelled (test_a_cancelled_write_is_waited_for)."""

    def vm_dir(self, vm_id: str) -> Path:
        """Where everything of one VM is: journal, console, sockets, logs. Exists after a write."""
        return self._vms / vm_id

    def read_all(self) -> tuple[list[Record], dict[str, JournalCorruptError]]:
        """All records by id, and the VMs whose record cannot be read. Blocks; at the start."""
        records: list[Record] = []
        corrupt: dict[str, JournalCorruptError] = {}
        for directory in sorted(path for path in self._vms.iterdir() if path.is_dir()):
            path = directory / FILE
            try:
                record = self._open(path)
            except JournalCorruptError as error:
                corrupt[directory.name] = error
            except OSError as error:
                corrupt[directory.name] = JournalCorruptError(path, error.strerror or str(error))
            else:
                if record is not None:
                    records.append(record)
        return records, corrupt

    def _open(self, path: Path) -> Record | None:
        """Take a record over from whoever wrote it; None: there is none."""
        old = path.with_name(FILE_OLD)
        if not path.exists() and old.exists():
            record = decode(old.read_bytes(), old)
            self._places[record.vm_id] = journal_file.create(path, encode(record))
        elif not path.exists():
            return None
        else:
            try:
                text, place = journal_file.open_for_writing(path)
            except DamagedError as error:
                raise JournalCorruptError(path, str(error)) from error
            record = decode(text, path)
            self._places[record.vm_id] = place
        if old.exists():
            # Only once the new one is durable. Left behind it would be believed some day.
            old.unlink()
            fsync_directory(path.parent)
        return record

    async def write(self, record: Record, *, durable: bool = True) -> None:
        """Durable when it returns. The loop runs on meanwhile; callers hold the VM's lock.

        Not durable: it survives the end of every process; after a power cut an older record may be
        back, but none older than the last durable one. Enough for what is about memory in tmpfs,
        which ends with the node. It goes into the page cache at once, without a thread.

        Raises:
            JournalWriteError: the disk is full, read-only or broken: nothing that the record names
                may be done.
        """
        try:
            if durable or record.vm_id not in self._places:
                await asyncio.to_thread(self._write, record, durable)
            else:
                self._write(record, durable)
        except OSError as error:
            raise JournalWriteError(self.vm_dir(record.vm_id) / FILE, error) from error

    def _write(self, record: Record, durable: bool) -> None:
        # A caller that was cancelled has let go of the VM's lock, but not its thread of the file.
        with self._locks.setdefault(record.vm_id, threading.Lock()):
            path, text = self.vm_dir(record.vm_id) / FILE, encode(record)
            place = self._places.get(record.vm_id)
            if place is None:
                if not path.parent.is_dir():
                    path.parent.mkdir(mode=0o700)
                    fsync_directory(self._vms)
                self._open(path)  # never in place of one that cannot be read
                place = self._places.get(record.vm_id)
            if place is not None and place.fits(text):
                journal_file.write(path, place, text, durable=durable)
                return
            # If this fails we do not know which file is there: it is opened again.
            self._places.pop(record.vm_id, None)
            seq = place.seq + 1 if place is not None else 1
            self._places[record.vm_id] = journal_file.create(path, text, seq=seq)


def main() -> int:
    """Print the records in the files that the command line names."""
    for name in sys.argv[1:]:
        sys.stdout.write(encode(read(Path(name).absolute())).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
