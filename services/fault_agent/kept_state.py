# SPDX-License-Identifier: Apache-2.0
"""The device state of a guest that left, kept beside its memory until that is released (ADR 7).

`<ram_dir>/<vm>.<epoch>.state`, one line and then the state:

    godwit-state 1 VM_ID EPOCH GENERATION LEN_BYTES SHA256

Written while the destination loads the same bytes, so that it costs the pause nothing. With the
FROZEN memory it is the whole guest as it was at its pause: from both a VMM can be made again,
as long as the guest has run nowhere since. On the tmpfs of the memory: it lives as long as that.
EPOCH is the destination's and GENERATION the image's: a state of another departure is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

from services.common.errors import DataLossError
from services.fault_agent.journal import ExportState, Record

_MAGIC = "godwit-state 1"
_LINE_LEN_MAX = 512
_LEN_BYTES = r"[0-9]{1,18}"
"""Narrower than str.isdigit, which takes what int() does not."""


def path_of(ram_path: str) -> Path:
    """Where the state of the guest with this memory is kept."""
    return Path(ram_path).with_suffix(".state")


def _stamp(record: Record) -> str:
    generation = record.export.generation if record.export else 0
    return f"{_MAGIC} {record.vm_id} {record.epoch_departing} {generation}"


def keep(record: Record, state: bytes) -> None:
    """Keep the state of the departure that the record is about. Blocks.

    Raises:
        OSError: there is no room, say. Nothing is kept then.
    """
    path = path_of(record.ram_path)
    scratch = path.with_suffix(".state.new")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            digest = hashlib.sha256(state).hexdigest()
            file.write(f"{_stamp(record)} {len(state)} {digest}\n".encode())
            file.write(state)
        scratch.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def is_kept(record: Record) -> bool:
    """True if the FROZEN memory and the state of the record's departure are here. A cheap look."""
    if record.export is None or record.export.state is not ExportState.FROZEN:
        return False
    try:
        if Path(record.ram_path).stat().st_ino != record.ram_inode:
            return False
        with path_of(record.ram_path).open("rb") as file:
            line = file.readline(_LINE_LEN_MAX)
            head = _split(line, record)
            return head is not None and os.fstat(file.fileno()).st_size == len(line) + head[0]
    except OSError:
        return False


def read(record: Record) -> bytes:
    """The kept state. Blocks.

    Raises:
        DataLossError: STATE_CORRUPT: it is not there, or not what was kept.
    """
    try:
        line, _, state = path_of(record.ram_path).read_bytes().partition(b"\n")
    except OSError as error:
        raise _corrupt(record, error.strerror or str(error)) from error
    head = _split(line, record)
    if head is None:
        raise _corrupt(record, "it is of another departure")
    if (len(state), hashlib.sha256(state).hexdigest()) != head:
        raise _corrupt(record, "length or hash differ")
    return state


def remove(ram_path: str) -> None:
    """Forget it. Idempotent; nothing for an empty path."""
    if ram_path:
        path_of(ram_path).unlink(missing_ok=True)
        path_of(ram_path).with_suffix(".state.new").unlink(missing_ok=True)


def _split(line: bytes, record: Record) -> tuple[int, str] | None:
    """(length, hash) by the first line; None: it is of another departure."""
    stamp, _, rest = line.decode(errors="replace").strip().rpartition(" ")
    stamp, _, len_bytes = stamp.rpartition(" ")
    if stamp != _stamp(record) or not re.fullmatch(_LEN_BYTES, len_bytes):
        return None
    return int(len_bytes), rest


def _corrupt(record: Record, why: str) -> DataLossError:
    return DataLossError(
        "STATE_CORRUPT", f"the kept device state of {record.vm_id} cannot be used: {why}"
    )
