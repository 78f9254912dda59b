# SPDX-License-Identifier: Apache-2.0
"""Certificates are read again when their files change, and no connection that lives minds."""

from __future__ import annotations

import contextlib
import datetime as dt
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from godwit.client import Client
from godwit.errors import GodwitClientError
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry

from services.common import grpc_client, grpc_server
from services.common.certificates import AUTHORITY, CERTIFICATE, KEY, Kind, make_authority
from services.common.errors import FailedPreconditionError, GodwitError
from services.common.listen import Address
from services.common.peer_tls import ORCHESTRATOR_NAME, PeerTls, node_name, open_certificates
from services.common.tls import Certificates
from services.common.tls_metrics import TlsCollector, open_identity
from services.demo.cluster_tls import DAYS, OPERATOR, ORCHESTRATOR, ClusterTls, make_cluster_tls
from services.pagecore.fake import FakePageCore

LOOPBACK = Address(host="127.0.0.1", port=0)
NOW = dt.datetime.now(dt.UTC)
LONG_AGO = NOW - dt.timedelta(days=400)


@pytest.fixture
def tls(tmp_path: Path) -> ClusterTls:
    """An authority, an orchestrator, nodes a and b."""
    return make_cluster_tls(tmp_path / "tls", ("a", "b"))


async def ask(channel: grpc.aio.Channel) -> int:
    """One call of the health service."""
    request = health_pb2.HealthCheckRequest()
    answer = await grpc_client.call(channel, check(channel), request, timeout_s=20, connect_s=2)
    return int(answer.status)


def check(channel: grpc.aio.Channel) -> Any:
    """As a stub has it."""
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )


@contextlib.asynccontextmanager
async def serving(certificates: Certificates) -> AsyncIterator[Address]:
    """A server with health alone."""
    async with grpc_server.serving(
        LOOPBACK, [], stop_grace_s=0, certificates=certificates
    ) as running:
        yield running.address


def peer(tls: ClusterTls, member: str, name: str) -> PeerTls:
    """How `member` calls somebody of that name."""
    return PeerTls(certificates=Certificates(tls.member(member)), name=name)


def test_names_are_those_of_certificates(tls: ClusterTls) -> None:
    assert node_name("a") == tls.subject("a").dns_name
    assert tls.subject(ORCHESTRATOR).dns_name == ORCHESTRATOR_NAME


async def test_both_ends_are_known(tls: ClusterTls) -> None:
    """The right name is reached, any other is not, and nobody without a certificate of ours."""
    async with serving(Certificates(tls.member("a"))) as address:
        right = peer(tls, ORCHESTRATOR, node_name("a"))
        async with grpc_client.open_channel(str(address), right) as channel:
            assert await ask(channel) == health_pb2.HealthCheckResponse.SERVING
        wrong = peer(tls, ORCHESTRATOR, node_name("b"))
        async with grpc_client.open_channel(str(address), wrong) as channel:
            with pytest.raises(GodwitError, match="PEER_UNREACHABLE"):
                await ask(channel)
        async with grpc_client.open_channel(str(address)) as channel:
            with pytest.raises(GodwitError):
                await ask(channel)
        other = make_authority(days=DAYS, now=NOW)
        tls.authority = other
        tls.renew("b")
        async with grpc_client.open_channel(str(address), peer(tls, "b", right.name)) as channel:
            with pytest.raises(GodwitError, match="PEER_UNREACHABLE"):
                await ask(channel)


async def test_a_rotation_is_taken_by_servers_and_channels(tls: ClusterTls) -> None:
    """Authority and keys of both ends, without a restart; a stub that was made before goes on."""
    server, ours = Certificates(tls.member("a")), Certificates(tls.member(ORCHESTRATOR))
    listening: Address
    async with serving(server) as listening:
        channel = grpc_client.open_channel(
            str(listening), PeerTls(certificates=ours, name=node_name("a"))
        )
        async with channel:
            made_before = check(channel)
            await ask(channel)
            old, new = tls.authority, make_authority(days=DAYS, now=NOW)
            for name in ("a", ORCHESTRATOR):
                tls.trust(name, old, new)
            assert server.look()
            assert ours.look()
            tls.authority = new
            before = server.loaded.key_sha256
            for name in ("a", ORCHESTRATOR):
                tls.renew(name)
                tls.trust(name, new)
            assert server.look()
            assert ours.look()
            assert server.loaded.key_sha256 != before
            # The connection lives on with what it was made with.
            await ask(channel)
            fresh = PeerTls(certificates=ours, name=node_name("a"))
            async with grpc_client.open_channel(str(listening), fresh) as second:
                await ask(second)
            request = health_pb2.HealthCheckRequest()
            await grpc_client.call(channel, made_before, request, timeout_s=20)


async def test_a_channel_comes_back_with_the_new_certificate(tls: ClusterTls) -> None:
    """Its server was away meanwhile, and the old one is good no more."""
    server, ours = Certificates(tls.member("a")), Certificates(tls.member(ORCHESTRATOR))
    async with contextlib.AsyncExitStack() as stack:
        async with serving(server) as address:
            tls_of_peer = PeerTls(certificates=ours, name=node_name("a"))
            channel = await stack.enter_async_context(
                grpc_client.open_channel(str(address), tls_of_peer)
            )
            await ask(channel)
        tls.authority = make_authority(days=DAYS, now=NOW)
        for name in ("a", ORCHESTRATOR):
            tls.renew(name)
            tls.trust(name, tls.authority)
        assert ours.look()
        assert server.look()
        async with grpc_server.serving(address, [], stop_grace_s=0, certificates=server):
            assert await ask(channel) == health_pb2.HealthCheckResponse.SERVING


async def test_half_of_a_change_is_not_taken(tls: ClusterTls) -> None:
    """A key that is not the certificate's, no PEM, nothing, another's: the last good ones stay."""
    certificates = Certificates(tls.member("a"))
    told: list[int] = []
    certificates.on_change(lambda: told.append(certificates.version))
    whole = {name: (tls.member("a") / name).read_bytes() for name in (CERTIFICATE, KEY, AUTHORITY)}
    before = certificates.loaded
    for name, data in (
        (KEY, (tls.member("b") / KEY).read_bytes()),
        (CERTIFICATE, b"no PEM"),
        (AUTHORITY, b""),
    ):
        (tls.member("a") / name).write_bytes(data)
        assert not certificates.look()
        (tls.member("a") / name).unlink()
        assert not certificates.look()
        (tls.member("a") / name).write_bytes(whole[name])
    for name in (CERTIFICATE, KEY):
        (tls.member("a") / name).write_bytes((tls.member("b") / name).read_bytes())
    assert not certificates.look()
    assert certificates.loaded == before
    assert told == []
    tls.renew("a")
    assert certificates.look()
    assert certificates.loaded != before
    assert len(told) == 1
    assert not certificates.look()


async def test_a_listener_that_fails_is_asked_again(tls: ClusterTls) -> None:
    """The page core could not read them yet: nothing is in force by halves."""
    certificates = Certificates(tls.member("a"))
    failing = [True]

    def listen() -> None:
        if failing:
            failing.pop()
            raise OSError(2, "half of it")

    certificates.on_change(listen)
    tls.renew("a")
    assert not certificates.look()
    assert certificates.look()


def test_who_it_is_for(tls: ClusterTls) -> None:
    certificates = Certificates(tls.member("a"))
    certificates.require(Kind.NODE)
    certificates.require(Kind.NODE, "a")
    for kind, name in ((Kind.NODE, "b"), (Kind.ORCHESTRATOR, "")):
        with pytest.raises(FailedPreconditionError, match="CERTIFICATE_OF_ANOTHER"):
            certificates.require(kind, name)
    with pytest.raises(FailedPreconditionError, match="CERTIFICATE_UNREADABLE"):
        Certificates(tls.directory)
    assert open_certificates(None) is None


async def test_the_end_of_a_certificate_is_told(
    tls: ClusterTls, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, before and after; and as a metric."""
    tls.renew("a", now=LONG_AGO)
    certificates = Certificates(tls.member("a"))
    identity = open_identity(FakePageCore(), certificates)
    registry = CollectorRegistry()
    registry.register(TlsCollector(certificates, identity))
    certificates.look()
    certificates.look()
    assert caplog.text.count("HAS ENDED") == 1
    left = registry.get_sample_value("godwit_certificate_expiry_seconds", {"file": CERTIFICATE})
    assert left is not None
    assert left < -300 * 86400
    assert registry.get_sample_value("godwit_tls_pinned_handshakes_total") == 0
    tls.renew("a", days=2)
    assert certificates.look()
    certificates.look()
    assert caplog.text.count("ends in") == 1


def test_http_follows_the_files(tls: ClusterTls) -> None:
    """A server context that was made before shows the certificate of the moment."""
    certificates = Certificates(tls.member(ORCHESTRATOR))
    context = certificates.server_context()

    def shown(directory: Path) -> str:
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.load_verify_locations(directory / AUTHORITY)
        incoming = [ssl.MemoryBIO(), ssl.MemoryBIO()]
        ends = [
            client.wrap_bio(incoming[0], incoming[1], server_hostname=ORCHESTRATOR_NAME),
            context.wrap_bio(incoming[1], incoming[0], server_side=True),
        ]
        for _ in range(3):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        return str((ends[0].getpeercert() or {})["serialNumber"])

    before = shown(tls.member(OPERATOR))
    tls.authority = make_authority(days=DAYS, now=NOW)
    tls.renew(ORCHESTRATOR)
    tls.trust(OPERATOR, tls.authority)
    certificates.version += 1
    assert shown(tls.member(OPERATOR)) != before


def test_a_client_says_what_is_wrong_with_its_directory(tmp_path: Path) -> None:
    with pytest.raises(GodwitClientError, match="certificates in"):
        Client("https://127.0.0.1:1", tls_dir=tmp_path)
