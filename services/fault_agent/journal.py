# SPDX-License-Identifier: Apache-2.0
"""What a node can prove about its VMs after a crash: one record a VM, durable before each act.

`<state_dir>/vms/<vm_id>/journal.json` is written beside, fsynced, renamed, and the directory
fsynced, so that a reader finds the old record or the new one. Every mark is durable *before* the
act that it names: a mark that is not there proves that the act was never attempted.
A record that cannot be read is kept as it is and its VM refused (I8: on doubt fail closed).
"""

from __future__ import annotations

import asyncio
import enum
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pydantic
from pydantic import ConfigDict

from services.common.errors import FailedPreconditionError
from services.fault_agent.processes import Process

FILE = "journal.json"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Arriving:
    """Where the memory of an arriving VM comes from, and how to take the arrival up again."""

    image_id: str
    page_address: str
    session_id: str
    page_map_path: str
    traceparent: str = ""
    bulk_bytes_per_s_max: int = 0
    remote_fd: int = -1
    """Number of the userfaultfd in the VMM; -1: not injected yet."""
    unregistered: bool = False
    """The VMM needs nobody for its memory any more."""
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
    version: Literal[1] = 1
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


_RECORD = pydantic.TypeAdapter(Record)


def decode(data: bytes, path: Path) -> Record:
    """Read a record.

    Raises:
        JournalCorruptError: it is torn, of another version, or of another VM than its directory.
    """
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


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace `path` as one step. Blocks.

    Durable, it survives a power cut once this returns. Else it survives the end of every process,
    after a cut the old content may be back: enough for what is about memory in tmpfs, which ends
    with the node. An fsync of the directory costs milliseconds, and the guest may stand still.
    """
    scratch = path.with_name(f".{path.name}.new")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        # Also if not durable: some file systems would put the name before the bytes, and a power
        # cut would leave an empty file in the place of durable marks.
        os.fsync(fd)
    finally:
        os.close(fd)
    scratch.rename(path)
    if durable:
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable. Blocks."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Journal:
    """The records of a node. One process at a time: `Node` holds the directory's lock."""

    def __init__(self, state_dir: Path) -> None:
        self._vms = state_dir / "vms"
        self._vms.mkdir(parents=True, exist_ok=True)
        fsync_directory(state_dir)

    def vm_dir(self, vm_id: str) -> Path:
        """Where everything of one VM is: journal, console, sockets, logs. Exists after a write."""
        return self._vms / vm_id

    def read_all(self) -> tuple[list[Record], dict[str, JournalCorruptError]]:
        """All records by id, and the VMs whose record cannot be read. Blocks."""
        records: list[Record] = []
        corrupt: dict[str, JournalCorruptError] = {}
        for path in sorted(self._vms.glob(f"*/{FILE}")):
            try:
                records.append(decode(path.read_bytes(), path))
            except JournalCorruptError as error:
                corrupt[path.parent.name] = error
            except OSError as error:
                corrupt[path.parent.name] = JournalCorruptError(path, error.strerror or str(error))
        return records, corrupt

    async def write(self, record: Record, *, durable: bool = True) -> None:
        """Durable when it returns. The loop runs on meanwhile; callers hold the VM's lock.

        Not durable: see `write_whole`. The next durable write makes up for it.

        Raises:
            OSError: the disk is full or broken: nothing that the record names may be done.
        """
        await asyncio.to_thread(self._write, record, durable)

    def _write(self, record: Record, durable: bool) -> None:
        directory = self.vm_dir(record.vm_id)
        if not directory.is_dir():
            directory.mkdir(mode=0o700)
            fsync_directory(self._vms)
        write_whole(directory / FILE, encode(record), durable=durable)
