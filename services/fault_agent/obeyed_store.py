# SPDX-License-Identifier: Apache-2.0
"""Which store this node obeys: one, named by its incarnation, durably (I2).

`<state_dir>/store` holds one line, `godwit-store 1 INCARNATION`. The first store that talks to a
node is the one; from then on a command of another is refused, whatever its epoch: it comes from a
store that was restored from a backup or made anew and does not know what this node knows, or from
the one that such a store has replaced. Only `godwit store rebuild` changes it, after which nothing
that the former store ever sent can be admitted any more.

A file that cannot be read obeys nobody (I8): every command is refused until a rebuild.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from pathlib import Path

from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.fault_agent.journal_file import fsync_directory

log = logging.getLogger(__name__)

FILE = "store"
NOBODY = "?"
"""What a file that cannot be read says: no store has this incarnation."""
_LINE = "godwit-store 1 {}\n"
_INCARNATION = "[0-9A-Za-z-]{1,64}"


class ObeyedStore:
    """The store that a node obeys."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE
        self._writing = asyncio.Lock()
        self.incarnation = self._read()
        """Empty: none yet."""

    def _read(self) -> str:
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            log.error("%s cannot be read, no store is obeyed: %s", self._path, error)
            return NOBODY
        match = re.fullmatch(_LINE.format(f"({_INCARNATION})"), text)
        if match is None:
            log.error("%s is damaged, no store is obeyed", self._path)
            return NOBODY
        return match[1]

    async def require(self, incarnation: str) -> None:
        """Refuse a command of another store. The first one that commands is obeyed from then on.

        Raises:
            FailedPreconditionError: STORE_IN_DOUBT.
        """
        if not incarnation:  # a caller of before incarnations
            return
        if not self.incarnation:
            await self._adopt_first(incarnation)
        if incarnation != self.incarnation:
            raise FailedPreconditionError(
                "STORE_IN_DOUBT",
                f"this node obeys store {self.incarnation}, the command is of {incarnation}",
                hint="stop the orchestrator and run `godwit store rebuild --from-agents`",
                metadata={"store_incarnation": self.incarnation},
            )

    async def _adopt_first(self, incarnation: str) -> None:
        async with self._writing:
            if not self.incarnation:
                await self._write(incarnation)

    async def adopt(self, incarnation: str) -> None:
        """Obey this one and no other, durably."""
        async with self._writing:
            if incarnation != self.incarnation:
                log.warning("obeys store %s, no longer %r", incarnation, self.incarnation)
                await self._write(incarnation)

    async def _write(self, incarnation: str) -> None:
        if not re.fullmatch(_INCARNATION, incarnation):
            raise InvalidArgumentError(
                "FIELD_INVALID", f"store_incarnation must match {_INCARNATION}, got {incarnation!r}"
            )
        await asyncio.to_thread(self._replace, _LINE.format(incarnation))
        self.incarnation = incarnation

    def _replace(self, text: str) -> None:
        scratch = self._path.with_name(f".{FILE}.new")
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, text.encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        scratch.rename(self._path)
        fsync_directory(self._path.parent)
