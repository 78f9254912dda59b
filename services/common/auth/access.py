# SPDX-License-Identifier: Apache-2.0
"""One call's way in and out, the same for gRPC and REST: recognised, allowed, written down."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ulid import ULID

from services.common.auth import audit
from services.common.auth.audit import AuditLog, Entry
from services.common.auth.gate import Credentials, Gate
from services.common.auth.identity import How, Identity
from services.common.auth.rules import Rule
from services.common.errors import GodwitError, ResourceExhaustedError

WATCHER_COUNT_MAX = 1200
OWN_WATCHER_COUNT_MAX = 64
"""Of one caller, where callers are told apart."""

REQUEST_ID = "x-request-id"
"""HTTP header and gRPC metadata: the caller's, else drawn here; in the answer and in the audit."""
# None that begins as a token of ours or a JWT does: what is misplaced would be written down.
_REQUEST_ID = re.compile(r"(?!gdw_|eyJ)[A-Za-z0-9._:-]{1,64}")


def request_id(given: str) -> str:
    """The caller's, if it is one."""
    return given if _REQUEST_ID.fullmatch(given) else str(ULID())


@dataclass(slots=True, kw_only=True)
class Attempt:
    """A call that was begun."""

    rule: Rule | None
    method: str
    request_id: str
    peer: str
    credentials: Credentials = field(repr=False)
    identity: Identity | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


class Watchers:
    """How many watch, in all and by caller. One for both faces of a server."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @contextlib.contextmanager
    def watching(self, identity: Identity | None) -> Iterator[None]:
        """One more, for the length of the block.

        Raises:
            ResourceExhaustedError: TOO_MANY_WATCHERS.
        """
        name = "" if identity is None or identity.how is How.NOTHING else str(identity)
        own = self._counts[name] if name else 0
        if self._counts.total() >= WATCHER_COUNT_MAX or own >= OWN_WATCHER_COUNT_MAX:
            raise ResourceExhaustedError(
                "TOO_MANY_WATCHERS",
                f"{self._counts.total()} watch, {own} of them as {name or 'nobody in particular'}",
                hint="end a watch that nobody looks at, or ask now and then instead",
            )
        self._counts[name] += 1
        try:
            yield
        finally:
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]


class Access:
    """How one server lets callers in."""

    def __init__(self, gate: Gate, log: AuditLog | None = None) -> None:
        """`log`: without one nothing is written down."""
        self.gate = gate
        self.watchers = Watchers()
        self._log = log

    async def identify(self, attempt: Attempt) -> None:
        """Recognise the caller; one who must be known and is not is refused.

        Raises:
            UnauthenticatedError: UNAUTHENTICATED.
        """
        try:
            if attempt.rule is None or attempt.rule.callers:
                attempt.identity = await self.gate.identify(attempt.credentials)
            if attempt.identity is None:
                self.gate.allow(attempt.rule, attempt.method, None, {})
        except GodwitError as error:
            await self.end(attempt, audit.REFUSED, error.reason)
            raise

    async def allow(self, attempt: Attempt) -> None:
        """Let a caller that was recognised through; `attempt.fields` say what he is about.

        Raises:
            PermissionDeniedError: PERMISSION_DENIED.
            UnavailableError: AUDIT_UNWRITABLE.
        """
        rule = attempt.rule
        try:
            self.gate.allow(rule, attempt.method, attempt.identity, attempt.fields)
            if rule and rule.mutates and not rule.rescue and self._log:
                await self._log.require_writable()
        except GodwitError as error:
            await self.end(attempt, audit.REFUSED, error.reason)
            raise

    async def end(self, attempt: Attempt, outcome: str, reason: str = "") -> None:
        """Write down what has become of it."""
        rule = attempt.rule
        if self._log is None or rule is None or not rule.mutates:
            return
        entry = Entry(
            method=attempt.method,
            request_id=attempt.request_id,
            identity=attempt.identity,
            peer=attempt.peer,
            resource={name: attempt.fields[name] for name in rule.names if name in attempt.fields},
            outcome=outcome,
            reason=reason,
        )
        await self._log.record(entry, repeats=rule.repeats)
