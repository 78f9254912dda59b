# SPDX-License-Identifier: Apache-2.0
"""What depends on this node, by its journals and image records. Reads, and never writes.

Asked of the files and not of the agent: the answer is needed most where the agent does not answer.
What cannot be read counts as depending: a damaged file must not make a node look free.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.fault_agent import processes
from services.fault_agent.journal import (
    FILE,
    FILE_OLD,
    JournalCorruptError,
    Record,
    Role,
    decode,
    read,
)
from services.page_server.records import SUFFIX

_VMS = "vms"


class Why(enum.StrEnum):
    """How a VM depends on its node. The first four are lost with the node's memory."""

    RETAINED = "retained"
    """It has left; its memory is kept for its destination."""
    DEPARTING = "departing"
    """It is about to leave, and runs or stands here."""
    ARRIVING = "arriving"
    """Its memory is on its way; the agent answers its faults."""
    UNREADABLE = "unreadable"
    """Its journal says nothing that can be relied on."""
    RUNNING = "running"
    """It is here, whole, and its VMM lives."""


IN_FLIGHT = frozenset({Why.RETAINED, Why.DEPARTING, Why.ARRIVING, Why.UNREADABLE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependence:
    """A VM, and why it needs this node."""

    vm_id: str
    why: Why
    size_bytes: int = 0
    """Memory kept, where it is retained."""

    def __str__(self) -> str:
        size = f", {self.size_bytes >> 20} MiB" if self.size_bytes else ""
        return f"{self.vm_id} ({self.why}{size})"


def of_state(state_dir: Path, boot_id: str) -> list[Dependence]:
    """Every VM of the agent's journals that needs this node, by id. Blocks.

    A VMM that this process cannot see, in another pid namespace, does not count as running.
    """
    found: list[Dependence] = []
    for directory in _directories(state_dir / _VMS):
        try:
            record = _read(directory)
        except (OSError, JournalCorruptError):
            found.append(Dependence(vm_id=directory.name, why=Why.UNREADABLE))
            continue
        if record is not None and (dependence := _of_record(record, boot_id)) is not None:
            found.append(dependence)
    return found


def _read(directory: Path) -> Record | None:
    """As the agent would; None: there is none."""
    path, old = directory / FILE, directory / FILE_OLD
    if path.exists():
        return read(path)
    return decode(old.read_bytes(), old) if old.exists() else None


def _directories(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        yield from sorted(path for path in parent.iterdir() if path.is_dir())


def _of_record(record: Record, boot_id: str) -> Dependence | None:
    if record.boot_id != boot_id:
        return None  # memory and processes of another boot are gone
    vm_id = record.vm_id
    match record.role:
        case Role.SEALED:
            kept = _kept_bytes(Path(record.ram_path))
            if kept is None:
                return None
            return Dependence(vm_id=vm_id, why=Why.RETAINED, size_bytes=kept)
        case Role.DEPARTING:
            return Dependence(vm_id=vm_id, why=Why.DEPARTING)
        case Role.ARRIVING | Role.ARRIVED:
            if record.arriving is not None and not record.arriving.unregistered:
                return Dependence(vm_id=vm_id, why=Why.ARRIVING)
    if record.process is not None and processes.is_alive(record.process):
        return Dependence(vm_id=vm_id, why=Why.RUNNING)
    return None


def _kept_bytes(ram: Path) -> int | None:
    """Memory in a RAM file; None: it is not there any more. 0 too where nobody can tell."""
    try:
        return ram.stat().st_blocks * 512
    except FileNotFoundError:
        # A directory that is not mounted here says nothing about what is in it.
        return None if ram.parent.is_dir() else 0
    except OSError:
        return 0


def of_images(images_dir: Path) -> list[Dependence]:
    """Every image record that a page server has to serve, by name. Blocks.

    The agent removes a record once nobody can need it.
    """
    if not images_dir.is_dir():
        return []
    names = sorted(path.stem for path in images_dir.glob(f"*{SUFFIX}"))
    return [Dependence(vm_id=name, why=Why.RETAINED) for name in names]
