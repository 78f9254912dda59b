# SPDX-License-Identifier: Apache-2.0
"""The API client, sync and async.

    with Client("http://127.0.0.1:8080") as client:
        migration = client.migrate("web-1", "b")
        for step in client.watch(migration.migration_id):
            print(step.phase, step.progress)

Every method raises GodwitApiError for a problem that the orchestrator answers with, and
GodwitConnectionError where there is no answer. Neither is retried here: an answer that was lost
says nothing about what was done. Only watches come back by themselves, they change nothing, and of
several orchestrators the one that leads is looked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self, TypedDict

import httpx
from httpx_sse import EventSource, SSEError

from godwit import calls, operations
from godwit.bearer import Token, TokenRefusedError, bearer
from godwit.calls import Answer, Call, ValueT
from godwit.errors import GodwitApiError, GodwitClientError, GodwitConnectionError
from godwit.models import Migration, Node, UserfaultBitmap, Vm
from godwit.operations import Operation
from godwit.route import Attempts, Route, split_urls
from godwit.tls import expect_orchestrator, expect_orchestrator_async, make_context
from godwit.watch import FleetEvent, FleetState, NewsT, Stream, WatchState

DEFAULT_URL = "http://127.0.0.1:8080"
TIMEOUT_S = 60.0
"""For one answer. Starting a VM takes the longest: preflight and the VMM's own start."""
SILENCE_S_MAX = 60.0
"""A stream without so much as a comment for so long is broken; servers comment each 15 s."""
UNREACHABLE_S_MAX = 60.0
_SERVER_ERROR = 500


class _Options(TypedDict):
    timeout_s: float
    tls_dir: Path | None
    token: Token


class Client:
    """A blocking client. Not to be shared by threads; use as a context manager, or close it."""

    def __init__(
        self,
        url: str | Sequence[str] = DEFAULT_URL,
        *,
        timeout_s: float = TIMEOUT_S,
        tls_dir: Path | None = None,
        token: Token = "",
    ) -> None:
        """Say who asks by `tls_dir`, by `token`, by both, or not at all.

        `url`: of an orchestrator, or of several of which one leads (godwit.route).
        `tls_dir`: has `ca.crt`, and `tls.crt` and `tls.key` to be known by; see godwit.tls.
        `token`: a bearer token, or a function that is asked for it before each request.
        """
        self._route = Route(split_urls(url))
        self._token = token
        self._options = _Options(timeout_s=timeout_s, tls_dir=tls_dir, token=token)
        # trust_env: a proxy from the environment must not come between us and a loopback address.
        self._http = httpx.Client(
            timeout=timeout_s,
            trust_env=False,
            verify=make_context(tls_dir) if tls_dir else True,
            event_hooks={"request": [expect_orchestrator] if tls_dir else []},
        )
        for each in self._route.urls:
            bearer(token, each)  # refused now, not at the first request

    @property
    def url(self) -> str:
        """The orchestrator that answered last."""
        return self._route.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def send(self, call: Call[ValueT]) -> Answer[ValueT]:
        """Make a call of `godwit.calls`; the answer has the JSON as well."""
        attempts = self._route.attempts()
        while True:
            url = attempts.take()
            try:
                response = self._http.request(
                    call.method,
                    url + call.path,
                    json=call.body,
                    params=call.query or None,
                    headers=call.headers,
                    auth=bearer(self._token, url),
                )
                answer = _read(call, response)
            except (httpx.HTTPError, GodwitClientError) as error:
                wait_s = _next_attempt(attempts, url, error)
                if wait_s is None:
                    raise _told(url, error) from error
                time.sleep(wait_s)
            else:
                attempts.answered(url)
                return answer

    def send_all(self, call: Call[ValueT], *, count: int = 0) -> Answer[ValueT]:
        """Make a call that lists, page by page, as one answer. 0: to the end, else `count` items.

        Where there are more, `next_page_token` of the JSON says so.
        """
        pages = [self.send(call.first(count)).json]
        while (token := calls.next_page(pages[-1])) and (
            not count or sum(len(page[call.items]) for page in pages) < count
        ):
            pages.append(self.send(call.after(token)).json)
        return calls.joined(call, pages, count)

    def nodes(self) -> list[Node]:
        """See calls.list_nodes."""
        return self.send_all(calls.list_nodes()).value

    def node(self, name: str) -> Node:
        """See calls.get_node."""
        return self.send(calls.get_node(name)).value

    def register_node(self, name: str, agent_address: str) -> Node:
        """See calls.register_node."""
        return self.send(calls.register_node(name, agent_address)).value

    def vms(self) -> list[Vm]:
        """See calls.list_vms."""
        return self.send_all(calls.list_vms()).value

    def vm(self, vm_id: str) -> Vm:
        """See calls.get_vm."""
        return self.send(calls.get_vm(vm_id)).value

    def start_vm(self, node: str, spec: Mapping[str, Any]) -> Vm:
        """See calls.start_vm."""
        return self.send(calls.start_vm(node, spec)).value

    def stop_vm(self, vm_id: str) -> None:
        """See calls.stop_vm."""
        self.send(calls.stop_vm(vm_id))

    def userfault_bitmap(self, vm_id: str) -> UserfaultBitmap:
        """See calls.get_userfault_bitmap."""
        return self.send_all(calls.get_userfault_bitmap(vm_id)).value

    def migrate(
        self, vm_id: str, destination_node: str, *, bulk_bytes_per_s_max: int = 0
    ) -> Migration:
        """See calls.create_migration."""
        call = calls.create_migration(vm_id, destination_node, bulk_bytes_per_s_max)
        return self.send(call).value

    def migrations(self, vm_id: str = "") -> list[Migration]:
        """See calls.list_migrations."""
        return self.send_all(calls.list_migrations(vm_id)).value

    def migration(self, migration_id: str) -> Migration:
        """See calls.get_migration."""
        return self.send(calls.get_migration(migration_id)).value

    def cancel_migration(self, migration_id: str) -> Migration:
        """See calls.cancel_migration."""
        return self.send(calls.cancel_migration(migration_id)).value

    def watch(
        self, migration_id: str, *, unreachable_s_max: float = UNREACHABLE_S_MAX
    ) -> Iterator[Migration]:
        """Each change of a migration as it happens, from now until it is terminal.

        Raises:
            GodwitApiError: there is no such migration.
            GodwitConnectionError: the stream broke and nothing was heard for `unreachable_s_max`.
        """
        for migration, _ in self.watch_answers(migration_id, unreachable_s_max=unreachable_s_max):
            yield migration

    def watch_answers(
        self, migration_id: str, *, unreachable_s_max: float = UNREACHABLE_S_MAX
    ) -> Iterator[tuple[Migration, object]]:
        """Like `watch`, each with its JSON."""
        state = WatchState.of_migration(unreachable_s_max)
        return self._follow(calls.events_path(migration_id), state)

    def watch_operation(
        self, operation_id: str, *, unreachable_s_max: float = UNREACHABLE_S_MAX
    ) -> Iterator[tuple[Operation, object]]:
        """Like `watch_answers`, of an operation, without its VMs."""
        state = WatchState.of_operation(unreachable_s_max)
        return self._follow(operations.events_path(operation_id), state)

    def events(
        self, *kinds: str, unreachable_s_max: float = UNREACHABLE_S_MAX
    ) -> Iterator[FleetEvent]:
        """What changes in the fleet, of some `kinds` or of all, from now on and for ever.

        The first is `began`: what was listed after it is what later events change. After `reset`
        list again.

        Raises:
            GodwitApiError: TOO_MANY_WATCHERS, WATCHER_TOO_SLOW.
            GodwitConnectionError: see `watch`.
        """
        path = calls.fleet_events_path(kinds)
        for event, _ in self._follow(path, FleetState(unreachable_s_max)):
            yield event

    def another(self) -> Client:
        """A client of the same, for another thread."""
        return Client(self._route.urls, **self._options)

    def _follow(self, path: str, state: Stream[NewsT]) -> Iterator[tuple[NewsT, object]]:
        while not state.is_over:
            why, url = "the stream ended", self._route.url
            try:
                with self._http.stream(
                    "GET",
                    url + path,
                    headers=state.headers(),
                    timeout=_stream_timeout(),
                    auth=bearer(self._token, url),
                ) as response:
                    if not response.is_success:
                        response.read()
                    _check_stream(response)
                    state.connected()
                    for event in EventSource(response).iter_sse():
                        if news := state.accept(event.event, event.id, event.data):
                            yield news
                        if state.is_over:
                            return
            except (httpx.HTTPError, SSEError, _ServerTroubleError) as error:
                why = str(error) or type(error).__name__
            self._route.lost(url)
            time.sleep(state.broken(time.monotonic(), GodwitConnectionError(url, why)))


class AsyncClient:
    """The same for asyncio. Use as an async context manager, or close it."""

    def __init__(
        self,
        url: str | Sequence[str] = DEFAULT_URL,
        *,
        timeout_s: float = TIMEOUT_S,
        tls_dir: Path | None = None,
        token: Token = "",
    ) -> None:
        """See Client."""
        self._route = Route(split_urls(url))
        self._token = token
        self._http = httpx.AsyncClient(
            timeout=timeout_s,
            trust_env=False,
            verify=make_context(tls_dir) if tls_dir else True,
            event_hooks={"request": [expect_orchestrator_async] if tls_dir else []},
        )
        for each in self._route.urls:
            bearer(token, each)

    @property
    def url(self) -> str:
        """The orchestrator that answered last."""
        return self._route.url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def send(self, call: Call[ValueT]) -> Answer[ValueT]:
        """Make a call of `godwit.calls`; the answer has the JSON as well."""
        attempts = self._route.attempts()
        while True:
            url = attempts.take()
            try:
                response = await self._http.request(
                    call.method,
                    url + call.path,
                    json=call.body,
                    params=call.query or None,
                    headers=call.headers,
                    auth=bearer(self._token, url),
                )
                answer = _read(call, response)
            except (httpx.HTTPError, GodwitClientError) as error:
                wait_s = _next_attempt(attempts, url, error)
                if wait_s is None:
                    raise _told(url, error) from error
                await asyncio.sleep(wait_s)
            else:
                attempts.answered(url)
                return answer

    async def send_all(self, call: Call[ValueT]) -> Answer[ValueT]:
        """See Client.send_all."""
        pages = [(await self.send(call)).json]
        while token := calls.next_page(pages[-1]):
            pages.append((await self.send(call.after(token))).json)
        return calls.joined(call, pages)

    async def nodes(self) -> list[Node]:
        """See calls.list_nodes."""
        return (await self.send_all(calls.list_nodes())).value

    async def vms(self) -> list[Vm]:
        """See calls.list_vms."""
        return (await self.send_all(calls.list_vms())).value

    async def vm(self, vm_id: str) -> Vm:
        """See calls.get_vm."""
        return (await self.send(calls.get_vm(vm_id))).value

    async def start_vm(self, node: str, spec: Mapping[str, Any]) -> Vm:
        """See calls.start_vm."""
        return (await self.send(calls.start_vm(node, spec))).value

    async def stop_vm(self, vm_id: str) -> None:
        """See calls.stop_vm."""
        await self.send(calls.stop_vm(vm_id))

    async def userfault_bitmap(self, vm_id: str) -> UserfaultBitmap:
        """See calls.get_userfault_bitmap."""
        return (await self.send_all(calls.get_userfault_bitmap(vm_id))).value

    async def migrate(
        self, vm_id: str, destination_node: str, *, bulk_bytes_per_s_max: int = 0
    ) -> Migration:
        """See calls.create_migration."""
        call = calls.create_migration(vm_id, destination_node, bulk_bytes_per_s_max)
        return (await self.send(call)).value

    async def migrations(self, vm_id: str = "") -> list[Migration]:
        """See calls.list_migrations."""
        return (await self.send_all(calls.list_migrations(vm_id))).value

    async def migration(self, migration_id: str) -> Migration:
        """See calls.get_migration."""
        return (await self.send(calls.get_migration(migration_id))).value

    async def cancel_migration(self, migration_id: str) -> Migration:
        """See calls.cancel_migration."""
        return (await self.send(calls.cancel_migration(migration_id))).value

    async def watch(
        self, migration_id: str, *, unreachable_s_max: float = UNREACHABLE_S_MAX
    ) -> AsyncGenerator[Migration, None]:
        """See Client.watch. Close it (aclosing) where it is left before its end."""
        state = WatchState.of_migration(unreachable_s_max)
        async with aclosing(self._follow(calls.events_path(migration_id), state)) as stream:
            async for migration, _ in stream:
                yield migration

    async def watch_operation(
        self, operation_id: str, *, unreachable_s_max: float = UNREACHABLE_S_MAX
    ) -> AsyncGenerator[Operation, None]:
        """See Client.watch_operation; as `watch`."""
        state = WatchState.of_operation(unreachable_s_max)
        async with aclosing(self._follow(operations.events_path(operation_id), state)) as stream:
            async for operation, _ in stream:
                yield operation

    async def events(
        self, *kinds: str, unreachable_s_max: float = UNREACHABLE_S_MAX
    ) -> AsyncGenerator[FleetEvent, None]:
        """See Client.events; as `watch`."""
        state = FleetState(unreachable_s_max)
        async with aclosing(self._follow(calls.fleet_events_path(kinds), state)) as stream:
            async for event, _ in stream:
                yield event

    async def _follow(
        self, path: str, state: Stream[NewsT]
    ) -> AsyncGenerator[tuple[NewsT, object], None]:
        while not state.is_over:
            why, url = "the stream ended", self._route.url
            try:
                async with self._http.stream(
                    "GET",
                    url + path,
                    headers=state.headers(),
                    timeout=_stream_timeout(),
                    auth=bearer(self._token, url),
                ) as response:
                    if not response.is_success:
                        await response.aread()
                    _check_stream(response)
                    state.connected()
                    async for event in EventSource(response).aiter_sse():
                        if news := state.accept(event.event, event.id, event.data):
                            yield news
                        if state.is_over:
                            return
            except (httpx.HTTPError, SSEError, _ServerTroubleError) as error:
                why = str(error) or type(error).__name__
            self._route.lost(url)
            error_if_late = GodwitConnectionError(url, why)
            await asyncio.sleep(state.broken(time.monotonic(), error_if_late))


class _ServerTroubleError(Exception):
    """A 5xx in place of a stream: an orchestrator that is starting, or its proxy without one."""


def _check_stream(response: httpx.Response) -> None:
    if response.status_code >= _SERVER_ERROR:
        raise _ServerTroubleError(f"HTTP status {response.status_code}")
    if not response.is_success:
        raise _problem(response)


def _stream_timeout() -> httpx.Timeout:
    return httpx.Timeout(TIMEOUT_S, read=SILENCE_S_MAX)


def _read(call: Call[ValueT], response: httpx.Response) -> Answer[ValueT]:
    if not response.is_success:
        raise _problem(response)
    data = _decoded(response)
    return Answer(call.read(data), data)


def _problem(response: httpx.Response) -> GodwitApiError:
    return GodwitApiError.from_problem(response.status_code, _decoded(response), response.text)


def _decoded(response: httpx.Response) -> Any:
    try:
        return response.json() if response.content else None
    except ValueError:
        return None


def _next_attempt(attempts: Attempts, url: str, error: Exception) -> float | None:
    """Seconds until another orchestrator is asked; None: `error` stands."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | TokenRefusedError):
        return attempts.goes_on(url)
    if isinstance(error, GodwitApiError):
        if error.reason == "NOT_LEADER":
            return attempts.goes_on(url, error.metadata.get("rest", ""))
        attempts.answered(url)
    return None


def _told(url: str, error: Exception) -> GodwitClientError:
    if isinstance(error, GodwitClientError):
        return error
    return GodwitConnectionError(url, str(error) or type(error).__name__)
