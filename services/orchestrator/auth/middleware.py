# SPDX-License-Identifier: Apache-2.0
"""The door of REST: every request is looked up in the table of rules before anything reads it.

It also bounds what a request may bring: how long its body is and how long it takes to come, and how
many requests are under way (docs/limits.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.auth import audit
from services.common.auth.access import REQUEST_ID, Access, Attempt, request_id
from services.common.auth.gate import Credentials
from services.common.auth.identity import LOCAL, acting
from services.common.auth.rules import Found, Rule, find_route
from services.common.errors import GodwitError, InvalidArgumentError, ResourceExhaustedError
from services.orchestrator import problems
from services.orchestrator.auth.connection import dns_names

BODY_BYTES_MAX = 1 << 20
BODY_S_MAX = 30.0
REQUEST_COUNT_MAX = 256
"""Under way at once, watchers not counted: those have a limit of their own."""
SERVER_ERROR = 500
ERROR = 400


class BodyTooLargeError(InvalidArgumentError):
    """More than any call of ours needs."""

    http_status = 413


class BodyTooSlowError(InvalidArgumentError):
    """It has not come in time."""

    http_status = 408


@dataclass(slots=True)
class _Answered:
    """What was answered."""

    send: Send = field(repr=False)
    request_id: str
    status: int = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            headers = [*message.get("headers", ()), (REQUEST_ID.encode(), self.request_id.encode())]
            message = {**message, "headers": headers}
        await self.send(message)


class AccessMiddleware:
    """Stands around the application."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._request_count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        found = find_route(scope["method"], scope["path"])
        client = scope.get("client") or ("", 0)
        attempt = Attempt(
            rule=found.rule,
            method=f"{scope['method']} {found.rule.route.partition(' ')[2]}" if found.rule else "",
            request_id=request_id(headers.get(REQUEST_ID, "")),
            peer=f"{client[0]}:{client[1]}",
            credentials=Credentials(
                authorization=headers.get("authorization", ""), dns_names=dns_names(scope)
            ),
            fields=found.parts,
        )
        answered = _Answered(send, attempt.request_id)
        if found.rule is None:
            await _no_such_route(scope, found)(scope, receive, answered)
            return
        try:
            await self._call(found.rule, attempt, scope, receive, answered)
        except GodwitError as error:
            await problems.of(error)(scope, receive, answered)
        except _HungUp:
            return

    async def _call(
        self, rule: Rule, attempt: Attempt, scope: Scope, receive: Receive, send: _Answered
    ) -> None:
        await self._access.identify(attempt)
        limit = self._access.watchers.watching(attempt.identity) if rule.watches else self._one()
        with limit:
            body = await _read_body(receive)
            attempt.fields = _json_fields(body, rule) | dict(attempt.fields)
            await self._access.allow(attempt)
            await self._answer(attempt, scope, _Replay(body, receive), send)

    @contextlib.contextmanager
    def _one(self) -> Iterator[None]:
        """One more request, for the length of the block."""
        if self._request_count >= REQUEST_COUNT_MAX:
            raise ResourceExhaustedError(
                "TOO_MANY_REQUESTS",
                f"{self._request_count} requests are under way",
                hint="try again in a moment",
            )
        self._request_count += 1
        try:
            yield
        finally:
            self._request_count -= 1

    async def _answer(
        self, attempt: Attempt, scope: Scope, receive: Receive, send: _Answered
    ) -> None:
        outcome = problems.Outcome()
        scope[problems.OUTCOME] = outcome
        # The answer waits for its line in the audit log: who has it can rely on both.
        held: list[Message] = []
        holds = attempt.rule is not None and attempt.rule.mutates

        async def hold(message: Message) -> None:
            held.append(message)

        try:
            with acting(attempt.identity or LOCAL):
                await self._app(scope, receive, hold if holds else send)
        except asyncio.CancelledError:
            await self._access.end(attempt, audit.UNKNOWN, "CANCELLED")
            raise
        except Exception:
            # Also what the bug handler has answered already is raised on, for the log.
            await self._access.end(attempt, audit.FAILED, "BUG")
            for message in held:
                await send(message)
            raise
        if not holds:
            return
        status = next((int(m["status"]) for m in held if m["type"] == "http.response.start"), 0)
        await self._access.end(attempt, _outcome_of(status), outcome.reason)
        for message in held:
            await send(message)


def _outcome_of(status: int) -> str:
    if status >= SERVER_ERROR:
        return audit.FAILED
    return audit.REFUSED if status >= ERROR else audit.OK


class _HungUp(Exception):  # noqa: N818 - nobody is left to be told
    pass


def _no_such_route(scope: Scope, found: Found) -> JSONResponse:
    headers = {"Allow": ", ".join(sorted(found.methods))} if found.methods else {}
    status = 405 if found.methods else 404
    return problems.of_status(status, f"{scope['method']} {scope['path']}", headers)


def _headers(scope: Scope) -> Mapping[str, str]:
    """By lower-case name; of one that is repeated the first."""
    found: MutableMapping[str, str] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1"), value.decode("latin-1"))
    return found


async def _read_body(receive: Receive) -> bytes:
    """The whole body.

    Raises:
        BodyTooLargeError: BODY_TOO_LARGE.
        BodyTooSlowError: BODY_TOO_SLOW.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S_MAX):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise _HungUp
                body += message.get("body", b"")
                if len(body) > BODY_BYTES_MAX:
                    raise BodyTooLargeError(
                        "BODY_TOO_LARGE",
                        f"the body has more than {BODY_BYTES_MAX} bytes",
                        hint="no call needs as much",
                    )
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise BodyTooSlowError(
            "BODY_TOO_SLOW", f"the body has not come within {BODY_S_MAX:g} s"
        ) from None


def _json_fields(body: bytes, rule: Rule) -> dict[str, str]:
    """What the rule wants to know of a body. One that is no JSON is the application's to refuse."""
    if not body or not (rule.mutates or rule.own):
        return {}
    try:
        decoded: Any = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(decoded, dict):
        return {}
    wanted = {*rule.names, rule.own}
    return {
        name: str(value)
        for name, value in decoded.items()
        if name in wanted and isinstance(value, str | int)
    }


@dataclass(slots=True)
class _Replay:
    """A body that was read, once more; then what comes after it: that the caller hangs up."""

    body: bytes
    receive: Receive
    told: bool = False

    async def __call__(self) -> Message:
        if self.told:
            return await self.receive()
        self.told = True
        return {"type": "http.request", "body": self.body, "more_body": False}
