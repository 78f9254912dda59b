# SPDX-License-Identifier: Apache-2.0
"""Copies of the store: taken while it is in use, put back only while it is not.

A store that was put back has forgotten what happened since the copy. So `restore` gives it another
incarnation and marks it in doubt before anybody can open it: whatever the agents say, nothing is
admitted or decided until `godwit store rebuild --from-agents` (I2). Copied back by hand it is the
same incarnation; then only what the agents have seen tells that it is old.

SQLite only. A PostgreSQL store is copied and put back by PostgreSQL's own tools; DESIGN I2.
Source: https://www.sqlite.org/backup.html, https://www.sqlite.org/wal.html#walfile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from services.common.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
)
from services.orchestrator.store import identity

_SIDE_FILES = ("", "-wal", "-shm")


@contextlib.contextmanager
def in_use(store: Path, *, alone: bool) -> Iterator[None]:
    """Use a store; `alone`: while no orchestrator does.

    A lock of its own file: SQLite's locks say who writes now, not who means to write.

    Raises:
        FailedPreconditionError: STORE_IN_USE.
    """
    fd = os.open(f"{store}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPreconditionError(
                "STORE_IN_USE",
                f"{store} is used by a running orchestrator, or by a restore or a rebuild",
                hint="stop the orchestrator first; VMs run on and pages are served without it",
            ) from None
        yield
    finally:
        os.close(fd)


def backup(store: Path, to: Path) -> int:
    """Copy a store as it is at one moment, also while an orchestrator writes; its length in bytes.

    Raises:
        NotFoundError: STORE_MISSING.
        AlreadyExistsError: FILE_EXISTS: nothing is overwritten.
        DataLossError: STORE_DAMAGED.
    """
    if not store.exists():
        raise NotFoundError("STORE_MISSING", f"there is no store at {store}", hint="see --store")
    if to.exists():
        raise AlreadyExistsError("FILE_EXISTS", f"{to} exists", hint="choose another name")
    scratch = to.with_name(f".{to.name}.new")
    scratch.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as source:
        _copy(source, scratch)
    check(scratch)
    return _publish(scratch, to)


def restore(store: Path, copy: Path) -> str:
    """Put a copy in the store's place; the store's new incarnation.

    What was there is kept beside it, as `<store>.before-<incarnation>`.

    Raises:
        NotFoundError: STORE_MISSING: there is no such copy.
        DataLossError: STORE_DAMAGED: it is not a whole store.
        FailedPreconditionError: STORE_IN_USE.
    """
    if not copy.exists():
        raise NotFoundError("STORE_MISSING", f"there is no copy at {copy}")
    check(copy)
    incarnation = identity.new_incarnation()
    scratch = store.with_name(f".{store.name}.new")
    with in_use(store, alone=True):
        scratch.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(f"file:{copy}?mode=ro", uri=True)) as source:
            _copy(source, scratch, incarnation, f"it was restored from {copy.name}")
        # The log before the file: the new file must never be read with the old one's log.
        for suffix in reversed(_SIDE_FILES):
            old = store.with_name(store.name + suffix)
            if old.exists():
                old.rename(store.with_name(f"{store.name}.before-{incarnation}{suffix}"))
        _publish(scratch, store)
    return incarnation


def check(path: Path) -> None:
    """Refuse what is not a whole store.

    Raises:
        DataLossError: STORE_DAMAGED.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            said = connection.execute("PRAGMA integrity_check").fetchone()[0]
            known = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    except sqlite3.Error as error:
        raise _damaged(path, str(error)) from error
    if said != "ok":
        raise _damaged(path, said)
    if identity.INCARNATION not in known:
        raise _damaged(path, "it has no incarnation")


def _damaged(path: Path, why: str) -> DataLossError:
    return DataLossError("STORE_DAMAGED", f"{path} is not a whole store: {why}")


def _copy(source: sqlite3.Connection, to: Path, incarnation: str = "", why: str = "") -> None:
    with contextlib.closing(sqlite3.connect(to)) as target:
        source.backup(target)
        if incarnation:
            with target:
                target.executemany(
                    "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)",
                    [(identity.INCARNATION, incarnation), (identity.IN_DOUBT, why)],
                )
        # One file: a copy must not need a log beside it.
        target.execute("PRAGMA journal_mode=DELETE")


def _publish(scratch: Path, to: Path) -> int:
    fd = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        len_bytes = os.fstat(fd).st_size
    finally:
        os.close(fd)
    scratch.rename(to)
    directory = os.open(to.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return len_bytes
