# SPDX-License-Identifier: Apache-2.0
"""The audit log: a JSON line for every call that changes something, also if it was refused.

A line is on the disk before the caller has his answer. Where it cannot be written it is kept in
memory, the ordinary log says so, and new calls are refused (AUDIT_UNWRITABLE) until it could be;
but not those that a guest may wait for (Rule.rescue). Migrations under way know nothing of it.
Without a file the lines go to the ordinary log.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.common.auth.identity import Identity
from services.common.errors import FailedPreconditionError, UnavailableError

log = logging.getLogger(__name__)

FILE_BYTES_MAX = 64 << 20
FILE_COUNT_MAX = 10
"""Including the one that is written."""
BACKLOG_MAX = 1000
VALUE_LEN_MAX = 500

OK = "ok"
REFUSED = "refused"
FAILED = "failed"
UNKNOWN = "unknown"
"""The caller hung up, or we ended, before there was an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One call."""

    method: str
    request_id: str
    identity: Identity | None
    """None: he was not recognised."""
    peer: str
    """Address of the caller."""
    resource: Mapping[str, str] = field(default_factory=dict)
    outcome: str
    reason: str = ""
    """Stable code, where the outcome is not OK."""

    def line(self, now: dt.datetime) -> str:
        """As it is written."""
        who = self.identity
        return json.dumps(
            {
                "time": now.isoformat(timespec="milliseconds"),
                "request_id": self.request_id,
                "identity": who.name if who else "",
                "role": (who.caller or "") if who else "",
                "authenticated_by": who.how if who else "",
                "peer": self.peer,
                "method": self.method,
                "resource": {key: value[:VALUE_LEN_MAX] for key, value in self.resource.items()},
                "outcome": self.outcome,
                "reason": self.reason,
            }
        )


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class AuditLog:
    """The lines of one process."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        now: Callable[[], dt.datetime] = _now,
        file_bytes_max: int = FILE_BYTES_MAX,
    ) -> None:
        """Open or make the file; only its owner can read it.

        Raises:
            FailedPreconditionError: AUDIT_UNWRITABLE.
        """
        self._path = path
        self._now = now
        self._file_bytes_max = file_bytes_max
        self._fd = -1
        self._lock = asyncio.Lock()
        self._backlog: deque[str] = deque(maxlen=BACKLOG_MAX)
        self._failing = False
        self._repeated: dict[tuple[str, str], Mapping[str, str]] = {}
        if path is not None:
            try:
                self._open(path)
            except OSError as error:
                raise FailedPreconditionError(
                    "AUDIT_UNWRITABLE", f"{path}: {error.strerror}"
                ) from error

    def _open(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        size = os.fstat(fd).st_size
        # A predecessor that was killed may have left half a line.
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")
        self._fd = fd
        _sync_directory(path)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def require_writable(self) -> None:
        """Write what could not be written; raise if it still cannot be.

        Raises:
            UnavailableError: AUDIT_UNWRITABLE.
        """
        if not self._failing:
            return
        async with self._lock:
            await asyncio.to_thread(self._flush)
        if self._failing:
            raise UnavailableError(
                "AUDIT_UNWRITABLE",
                f"{self._path} cannot be written, so nothing may be changed",
                hint="make room on its disk; cancel and recover work meanwhile",
            )

    async def record(self, entry: Entry, *, repeats: bool = False) -> None:
        """Write an entry. `repeats`: leave it out if it says what the last such one said."""
        if repeats and entry.outcome == OK and entry.identity:
            key = entry.identity.name, entry.method
            if self._repeated.get(key) == entry.resource:
                return
            if len(self._repeated) >= BACKLOG_MAX:
                self._repeated.clear()
            self._repeated[key] = entry.resource
        line = entry.line(self._now())
        if self._path is None:
            log.info("audit: %s", line)
            return
        async with self._lock:
            if len(self._backlog) == BACKLOG_MAX:
                log.error("audit: lost, see the line: %s", self._backlog[0])
            self._backlog.append(line)
            await asyncio.to_thread(self._flush)

    def _flush(self) -> None:
        """Write the backlog. Under the lock, on a thread of its own: a disk can take its time."""
        assert self._path is not None
        try:
            if os.fstat(self._fd).st_size >= self._file_bytes_max:
                self._rotate(self._path)
            while self._backlog:
                _write_whole(self._fd, self._backlog[0].encode() + b"\n")
                self._backlog.popleft()
            os.fsync(self._fd)
        except OSError as error:
            if not self._failing:
                log.error("audit log %s cannot be written: %s", self._path, error)
            self._failing = True
        else:
            if self._failing:
                log.info("audit log %s can be written again", self._path)
            self._failing = False

    def _rotate(self, path: Path) -> None:
        for number in range(FILE_COUNT_MAX - 1, 0, -1):
            older = path.with_name(f"{path.name}.{number}")
            newer = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
            if newer.exists():
                newer.replace(older)
        old = self._fd
        self._open(path)
        os.close(old)


def _write_whole(fd: int, data: bytes) -> None:
    """All of it or nothing: half a line would be taken for a damaged one."""
    start = os.fstat(fd).st_size
    try:
        written = os.write(fd, data)
    except OSError:
        os.ftruncate(fd, start)
        raise
    if written != len(data):
        os.ftruncate(fd, start)
        raise OSError(28, "No space left on device")


def _sync_directory(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
