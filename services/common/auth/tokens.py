# SPDX-License-Identifier: Apache-2.0
"""Bearer tokens from a file: a line each, `NAME ROLE SHA256`, `#` begins a comment.

The file has no secret in it: a token is 256 random bits, so that its plain hash tells nothing. It
is read again when it changes. A line that makes no sense then gives nobody access and is logged;
the others count: taking a line out revokes a token whatever else is wrong.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.common.auth.identity import Caller, How, Identity
from services.common.errors import FailedPreconditionError, InvalidArgumentError

log = logging.getLogger(__name__)

PREFIX = "gdw_"
"""So that scanners for leaked secrets, and people, know what they see."""
RANDOM_BYTES = 32
CHECK_S = 0.5
"""How old what is in force may be."""
FILE_BYTES_MAX = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._@-]{0,98}[A-Za-z0-9])?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CALLERS = frozenset(Caller) - {Caller.ORCHESTRATOR}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Who has a token."""

    name: str
    caller: Caller
    sha256: str
    """Of the token, in lower-case hex."""

    def __str__(self) -> str:
        return f"{self.name} {self.caller} {self.sha256}"


def new_token(name: str, role: str) -> tuple[str, Line]:
    """A token, to be shown once, and the line that makes it count.

    Raises:
        InvalidArgumentError: FIELD_INVALID.
    """
    token = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    return token, parse_line(f"{name} {role} {_sha256(token)}")


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def parse_line(text: str) -> Line:
    """Read a line that is neither empty nor a comment.

    Raises:
        InvalidArgumentError: FIELD_INVALID. The line is not repeated: somebody may have put the
            token itself there.
    """
    parts = text.split()
    if len(parts) != 3:
        raise InvalidArgumentError("FIELD_INVALID", "a line is NAME ROLE SHA256")
    name, role, digest = parts
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            "FIELD_INVALID", "a token's name has 1..100 of letters, digits, '.', '_', '-', '@'"
        )
    if role not in _CALLERS:
        raise InvalidArgumentError(
            "FIELD_INVALID", f"{name}: the role is none of {', '.join(sorted(_CALLERS))}"
        )
    if not _SHA256.fullmatch(digest):
        raise InvalidArgumentError(
            "FIELD_INVALID", f"{name}: the hash must be 64 lower-case hex digits"
        )
    return Line(name=name, caller=Caller(role), sha256=digest)


def parse_file(data: bytes) -> tuple[list[Line], list[str]]:
    """The lines that count, and what is wrong with the others, by number."""
    lines, wrong = [], []
    for number, raw in enumerate(data.decode(errors="replace").splitlines(), 1):
        text = raw.partition("#")[0].strip()
        if text:
            try:
                lines.append(parse_line(text))
            except InvalidArgumentError as error:
                wrong.append(f"line {number}: {error.message}")
    return lines, wrong


class TokensFile:
    """The tokens of a file."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file.

        Raises:
            FailedPreconditionError: TOKENS_UNREADABLE: also if any line is wrong: at the start
                somebody is there to mend it.
        """
        self._path = path
        self._clock = clock
        self._checked_s = clock()
        self._stamp: tuple[int, ...] = ()
        self._identities: dict[str, Identity] = {}
        try:
            wrong = self._load()
        except OSError as error:
            raise FailedPreconditionError(
                "TOKENS_UNREADABLE", f"{path}: {error.strerror}"
            ) from error
        if wrong:
            raise FailedPreconditionError(
                "TOKENS_UNREADABLE",
                f"{path}: {'; '.join(wrong[:5])}",
                hint="`godwit tokens new` makes a token and its line",
            )

    async def recognise(self, token: str) -> Identity | None:
        """Whose it is."""
        now_s = self._clock()
        if now_s - self._checked_s >= CHECK_S:
            self._checked_s = now_s
            self._reload()
        return self._identities.get(_sha256(token))

    def _reload(self) -> None:
        try:
            for each in self._load():
                log.error("%s: %s: it gives nobody access", self._path, each)
        except OSError as error:
            # Perhaps it is just being replaced. What was read counts until there is another word.
            log.error("%s cannot be read, what it said before counts: %s", self._path, error)

    def _load(self) -> list[str]:
        """Read the file if it has changed; what is wrong in it."""
        seen = self._path.stat()
        stamp = (seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        if stamp == self._stamp:
            return []
        with self._path.open("rb") as file:
            lines, wrong = parse_file(file.read(FILE_BYTES_MAX))
        self._identities = {
            line.sha256: Identity(name=line.name, caller=line.caller, how=How.TOKEN)
            for line in lines
        }
        self._stamp = stamp
        log.info("%s: %d tokens", self._path, len(lines))
        return wrong
