# SPDX-License-Identifier: Apache-2.0
"""The door of a gRPC server: every call is looked up in the table of rules.

It stands inside of grpc_server.ErrorInterceptor, which makes statuses of what is raised here. It is
asked once a call, streams included: a stream lives on when a token ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol, TypeAlias, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from services.common import grpc_handlers
from services.common.auth import audit
from services.common.auth.access import REQUEST_ID, Access, Attempt, request_id
from services.common.auth.gate import Credentials, Gate
from services.common.auth.identity import LOCAL, acting, become
from services.common.auth.rules import BY_RPC, Rule
from services.common.errors import GodwitError
from services.common.grpc_handlers import Continuation, Handler

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

AUTHORIZATION = "authorization"


class PeerNames(Protocol):
    """Where the names of a caller's certificate come from."""

    def __call__(self, context: Context) -> tuple[str, ...]:
        """DNS names that were verified; empty: no certificate."""


def names_from_tls(context: Context) -> tuple[str, ...]:
    """What gRPC's own TLS has verified.

    Only of a server that demands certificates: gRPC verifies none that it has not asked for.
    """
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return tuple(name.decode(errors="replace") for name in names)


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets through whom `access` allows."""

    def __init__(self, access: Access, peer_names: PeerNames = names_from_tls) -> None:
        self._access = access
        self._peer_names = peer_names

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.lstrip("/")
        rule = BY_RPC.get(method)
        if handler is None or (rule is not None and not rule.callers):
            return handler
        return self._wrapped(handler, method, rule)

    def _wrapped(self, handler: Handler, method: str, rule: Rule | None) -> Handler:
        return grpc_handlers.wrapped(
            handler,
            streaming=lambda behavior: self._streaming(method, rule, behavior),
            unary=lambda behavior: self._unary(method, rule, behavior),
        )

    async def _admit(
        self, method: str, rule: Rule | None, request: Any, context: Context
    ) -> Attempt:
        metadata = {
            key: value
            for key, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        }
        attempt = Attempt(
            rule=rule,
            method=method,
            request_id=request_id(metadata.get(REQUEST_ID, "")),
            peer=context.peer(),
            credentials=Credentials(
                authorization=metadata.get(AUTHORIZATION, ""),
                dns_names=self._peer_names(context),
            ),
            fields=_fields(rule, request),
        )
        await self._access.identify(attempt)
        await self._access.allow(attempt)
        return attempt

    def _unary(self, method: str, rule: Rule | None, behavior: Any) -> Any:
        async def handle(request: Any, context: Context) -> Any:
            attempt = await self._admit(method, rule, request, context)
            if rule is None or not rule.mutates:
                with acting(attempt.identity or LOCAL):
                    return await behavior(request, context)
            await context.send_initial_metadata(((REQUEST_ID, attempt.request_id),))
            with acting(attempt.identity or LOCAL):
                return await self._written_down(attempt, behavior(request, context))

        return handle

    async def _written_down(self, attempt: Attempt, work: Awaitable[Any]) -> Any:
        try:
            answer = await work
        except GodwitError as error:
            outcome = audit.FAILED if error.http_status >= 500 else audit.REFUSED
            await self._access.end(attempt, outcome, error.reason)
            raise
        except asyncio.CancelledError:
            await self._access.end(attempt, audit.UNKNOWN, "CANCELLED")
            raise
        except Exception:
            await self._access.end(attempt, audit.FAILED, "BUG")
            raise
        await self._access.end(attempt, audit.OK)
        return answer

    def _streaming(self, method: str, rule: Rule | None, behavior: Any) -> Any:
        async def handle(request: Any, context: Context) -> AsyncIterator[Any]:
            attempt = await self._admit(method, rule, request, context)
            become(attempt.identity or LOCAL)  # the call has a task of its own
            async with contextlib.AsyncExitStack() as stack:
                if rule is not None and rule.watches:
                    stack.enter_context(self._access.watchers.watching(attempt.identity))
                answers = behavior(request, context)
                await stack.enter_async_context(contextlib.aclosing(answers))
                async for answer in answers:
                    yield answer

        return handle


def node_door(node: str) -> AccessInterceptor:
    """The door of a node's servers, where they speak TLS. `node`: whose they are."""
    return AccessInterceptor(Access(Gate(certificates=True, node=node)))


def _fields(rule: Rule | None, request: Any) -> dict[str, str]:
    """What the rule wants to know of a request; nothing of a stream of them."""
    if rule is None or not isinstance(request, Message):
        return {}
    wanted = {*rule.names, rule.own}
    names = [field.name for field in request.DESCRIPTOR.fields if field.name in wanted]
    return {name: str(cast(object, getattr(request, name))) for name in names}
