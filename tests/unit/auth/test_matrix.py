# SPDX-License-Identifier: Apache-2.0
"""Promise: every RPC and every route answers every kind of credential as docs/api-access.md says.

Running servers are asked for each cell of its two tables, with a request that is well formed but
names nothing that exists: a call was let in if it is refused for anything but its caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from godwit.fleet.v1 import node_service_pb2
from godwit.page.v1 import page_service_pb2
from grpc_reflection.v1alpha import reflection_pb2

from services.common import grpc_status
from services.common.auth.rules import BY_RPC, RULES, Rule
from tests.harness.access_fleet import (
    IMAGE_ID,
    NODE,
    OTHER,
    ROLES,
    THIRD,
    WAIT_S,
    AccessFleet,
    access_fleet,
)
from tests.harness.access_table import CALLERS, FETCH, REPLAYED, documented

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODIES: Mapping[str, Any] = {"POST /v1/nodes": {"name": NODE, "agent_address": "127.0.0.1:1"}}
"""What REST is sent, where an empty object would not show who speaks for whom."""
MESSAGES: Mapping[str, bytes] = {
    "godwit.fleet.v1.NodeService/RegisterNode": node_service_pb2.RegisterNodeRequest(
        name=NODE, agent_address="127.0.0.1:1"
    ).SerializeToString(),
    "godwit.page.v1.PageService/DescribeImage": page_service_pb2.DescribeImageRequest(
        image_id="vm.of-nobody"
    ).SerializeToString(),
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": (
        reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    ),
}
STREAMING = ("/Fetch", "/LoadDeviceState", "/ServerReflectionInfo")
"""The caller sends more than one message."""
NO_ANSWERS = (
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNKNOWN,
)
REFUSALS = {
    grpc.StatusCode.UNAUTHENTICATED: ("401", ("UNAUTHENTICATED",)),
    grpc.StatusCode.PERMISSION_DENIED: (
        "403",
        ("PERMISSION_DENIED", "NOT_A_NODE", "TOKEN_REPLAYED"),
    ),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AccessFleet]:
    async with access_fleet(tmp_path_factory.mktemp("access")) as running:
        yield running


def cells(way: str, who: str) -> dict[str, str]:
    """What the document says of one caller, by call."""
    return {call: said for (call, caller), said in documented(way).items() if caller == who}


# --- REST


async def ask_rest(http: httpx.AsyncClient, route: str) -> str:
    """What a route answers."""
    method, path = route.replace("{", "").replace("}", "").split(" ")
    body = BODIES.get(route, {}) if method in ("POST", "PUT", "PATCH") else None
    try:
        async with http.stream(method, path, json=body) as response:
            if response.is_success:
                return "ok"  # perhaps of a stream that goes on
            await response.aread()
    except httpx.TransportError:
        return "TLS"
    if response.status_code not in (401, 403):
        assert response.status_code < 500 or response.json()["reason"], response.text
        return "ok"
    reasons = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["reason"] == reasons[response.status_code]
    assert ("www-authenticate" in response.headers) == (response.status_code == 401)
    return str(response.status_code)


@pytest.mark.parametrize("who", CALLERS)
async def test_each_route_answers_as_documented(fleet: AccessFleet, who: str) -> None:
    token = fleet.tokens[REPLAYED] if who == REPLAYED else ""
    # Of whom the token alone must be what is wrong.
    shows = "admin" if who == REPLAYED else who
    said = cells("REST", who)
    async with fleet.http(shows, token) as http:
        got = {rule.route: await ask_rest(http, rule.route) for rule in RULES if rule.route}
    assert got == said


# --- gRPC


def reason_of(error: grpc.RpcError) -> str:
    """The server's word for it; "": no server has said anything."""
    trailing: Any = error.trailing_metadata() or ()  # pairs, whatever the stubs say
    for key, value in trailing:
        if key == grpc_status.DETAILS_KEY and isinstance(value, bytes):
            return grpc_status.from_status(error.code(), error.details() or "", value).reason
    # The C core says it in front of the message.
    reason, colon, _ = (error.details() or "").partition(": ")
    return reason if colon and reason.isupper() and " " not in reason else ""


def ask_grpc(
    channel: grpc.Channel, rpc: str, message: bytes, metadata: tuple[tuple[str, str], ...] = ()
) -> tuple[str, str]:
    """What an RPC answers, and the reason of a refusal."""
    over = threading.Event()

    def requests() -> Iterator[bytes]:
        # Open until there is an answer: a stream that has ended is refused for that.
        yield message
        over.wait(2 * WAIT_S)

    opened: Any = channel
    options: dict[str, Any] = {"timeout": WAIT_S, "metadata": metadata}
    call: Any = (
        opened.stream_stream(f"/{rpc}")(requests(), **options)
        if rpc.endswith(STREAMING)
        else opened.unary_stream(f"/{rpc}")(message, **options)
    )
    try:
        next(call, None)  # perhaps of a stream that goes on
        return "ok", ""
    except grpc.RpcError as failed:
        error = failed
    finally:
        over.set()
        call.cancel()
    return judge(rpc, error)


def judge(rpc: str, error: grpc.RpcError) -> tuple[str, str]:
    """A call that was refused, for whatever: how it stands in the table, and the reason."""
    code, reason = error.code(), reason_of(error)
    if code is grpc.StatusCode.UNAVAILABLE and not reason:
        return "TLS", ""
    assert code not in NO_ANSWERS, f"{rpc}: {code} {error.details()}"
    answer, reasons = REFUSALS.get(code, ("ok", (reason,)))
    assert reason in reasons, f"{rpc}: {error.details()}"
    return answer, reason


def ask_as(fleet: AccessFleet, who: str, rule: Rule, channel: grpc.Channel) -> str:
    """One cell."""
    metadata: tuple[tuple[str, str], ...] = ()
    message = MESSAGES.get(rule.rpc, b"")
    if rule.rpc == FETCH:
        # The image is another node's, but where its token is what matters.
        message = (
            fleet.hello(image_id=IMAGE_ID, destination=THIRD) if who == REPLAYED else fleet.hello()
        )
    elif who == REPLAYED:
        metadata = (("authorization", f"Bearer {fleet.tokens[REPLAYED]}"),)
    return ask_grpc(channel, rule.rpc, message, metadata)[0]


def ask_each(fleet: AccessFleet, who: str) -> dict[str, str]:
    """A column of the table, by RPC."""
    got = {}
    with contextlib.ExitStack() as stack:
        channels: dict[tuple[object, str], grpc.Channel] = {}
        for rule in BY_RPC.values():
            # Of whom the token alone must be what is wrong.
            with_it = "other node" if rule.native else "admin"
            where = fleet.where(rule)
            if where not in channels:
                shows = with_it if who == REPLAYED else who
                channels[where] = stack.enter_context(fleet.channel(shows, where))
            got[rule.rpc] = ask_as(fleet, who, rule, channels[where])
    return got


@pytest.mark.parametrize("who", CALLERS)
async def test_each_rpc_answers_as_documented(fleet: AccessFleet, who: str) -> None:
    assert await asyncio.to_thread(ask_each, fleet, who) == cells("gRPC", who)


async def test_the_token_was_what_was_wrong(fleet: AccessFleet) -> None:
    """The same caller reads the same image with his own token; the replayed one is named so."""

    def ask(destination: str) -> tuple[str, str]:
        with fleet.channel("other node", fleet.where(BY_RPC[FETCH])) as channel:
            hello = fleet.hello(image_id=IMAGE_ID, destination=destination)
            return ask_grpc(channel, FETCH, hello)

    assert await asyncio.to_thread(ask, THIRD) == ("403", "TOKEN_REPLAYED")
    assert await asyncio.to_thread(ask, OTHER) == ("ok", "")


@pytest.mark.parametrize("role", ROLES)
async def test_a_token_is_worth_what_a_certificate_is(fleet: AccessFleet, role: str) -> None:
    """On connections without a certificate (REST), or with one that is worth nothing there."""
    async with fleet.http("nobody", fleet.tokens[role]) as http:
        got = {rule.route: await ask_rest(http, rule.route) for rule in RULES if rule.route}
    assert got == cells("REST", role)
    metadata = (("authorization", f"Bearer {fleet.tokens[role]}"),)
    rpcs = [rpc for rpc in BY_RPC if rpc.startswith("godwit.fleet.")]

    def ask() -> dict[str, str]:
        with fleet.channel("orchestrator", fleet.where(BY_RPC[rpcs[0]])) as channel:
            return {
                rpc: ask_grpc(channel, rpc, MESSAGES.get(rpc, b""), metadata)[0] for rpc in rpcs
            }

    said = cells("gRPC", role)
    assert await asyncio.to_thread(ask) == {rpc: said[rpc] for rpc in rpcs}
