# SPDX-License-Identifier: Apache-2.0
"""Promise: orchestrator and agent that have met go on by their keys when certificates have ended.

That holds while a migration is under way on the node, over a restart of the agent, for the two
that have met and for nobody else, and it is told. A real agent's server, and the orchestrator's
client of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb2
from godwit.page.v1 import image_admin_service_pb2 as admin_pb2
from godwit.page.v1 import image_admin_service_pb2_grpc as admin_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from services.common import certificates, continuation, grpc_client
from services.common.certificates import Kind, Pair, Subject
from services.common.errors import GodwitError, InvalidArgumentError
from services.common.grpc_client import NotExecutedError
from services.common.peer_tls import PeerTls
from services.common.tls import Certificates
from services.fault_agent import main as fault_agent
from services.fault_agent.main import Serving
from services.fault_agent.security import CALLER_COUNT_MAX
from services.orchestrator.agents import AgentClient, AgentPool, Deadlines
from services.page_server import main as page_server
from services.pagecore.fake import FakePageCore
from services.pagecore.native import NativePageCore

WAIT_S = 30.0
NOW = dt.datetime.now(dt.UTC)
PAST = NOW - dt.timedelta(days=30)
NODE = Subject(kind=Kind.NODE, name="a")
ORCHESTRATOR = Subject(kind=Kind.ORCHESTRATOR, name="")


class Member:
    """Somebody with a key; his certificate comes and goes."""

    def __init__(self, directory: Path, authority: Pair, subject: Subject) -> None:
        self._directory, self._authority, self._subject = directory, authority, subject
        self.pair = certificates.issue(authority, subject, days=5, now=NOW)
        directory.mkdir()
        (directory / certificates.AUTHORITY).write_bytes(authority.certificate_pem)
        (directory / certificates.KEY).write_bytes(self.pair.key_pem)
        self.certify(NOW)

    def certify(self, since: dt.datetime) -> None:
        """Another certificate of the same key, for five days since then."""
        pair = certificates.issue(
            self._authority, self._subject, days=5, now=since, key=self.pair.key
        )
        path = self._directory / certificates.CERTIFICATE
        certificates.replace(path, pair.certificate_pem, secret=False)

    @property
    def directory(self) -> Path:
        return self._directory


class Ground:
    """A node's and two orchestrators' certificates, by one authority."""

    def __init__(self, directory: Path, ram: Path) -> None:
        self._directory, self.ram = directory, ram
        authority = certificates.make_authority(days=100, now=PAST)
        self.node = Member(directory / "node", authority, NODE)
        self.orchestrator = Member(directory / "orchestrator", authority, ORCHESTRATOR)
        self.other = Member(directory / "other", authority, ORCHESTRATOR)
        self.ours = Certificates(self.orchestrator.directory)
        self.port = 0

    @contextlib.asynccontextmanager
    async def agent(self, *, migrating: bool = True) -> AsyncIterator[Serving]:
        """The node's agent, always at the same port and with the same journal."""
        argv = ["--node", "a", "--listen", f"127.0.0.1:{self.port}"]
        argv += ["--state-dir", str(self._directory / "state"), "--ram-dir", str(self.ram)]
        argv += ["--page-server-control", "127.0.0.1:1", "--tls-dir", str(self.node.directory)]
        config = fault_agent.Config.from_argv(argv)
        async with fault_agent.serving(config, FakePageCore()) as running:
            self.port = running.grpc.port
            assert running.node.security is not None
            running.node.security.guests_need = lambda: migrating
            running.node.images.page_address = "127.0.0.1:1"  # a Hello would wait for one
            yield running

    def pool(self, certs: Certificates | None = None) -> AgentPool:
        return AgentPool("store", Deadlines(connect_s=5.0, hello_s=10.0), certs or self.ours)

    def end(self) -> None:
        """The certificates of both have ended, and both know."""
        self.node.certify(PAST)
        self.orchestrator.certify(PAST)
        assert self.ours.look()


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    ram = Path(tempfile.mkdtemp(prefix="godwit-test-", dir="/dev/shm"))
    yield Ground(tmp_path, ram)
    shutil.rmtree(ram)


@contextlib.asynccontextmanager
async def client_of(
    ground: Ground, certs: Certificates | None = None
) -> AsyncIterator[AgentClient]:
    pool = ground.pool(certs)
    try:
        yield pool.put("a", f"127.0.0.1:{ground.port}")
    finally:
        await pool.close()


async def test_who_has_met_goes_on_by_keys_and_says_so(ground: Ground) -> None:
    """Also when the agent is another process; and certificates count again once there are some."""
    async with ground.agent() as _, client_of(ground) as client:
        await client.hello()
        assert client.pin
        assert not client.is_by_pin
        kept = client.pin
    ground.end()
    async with client_of(ground) as client:
        client.pin = kept
        async with ground.agent() as running:
            answer = await _answered(client)
            assert answer.node == "a"
            assert client.is_by_pin
            assert client.certificate_ends_unix_s < NOW.timestamp()
            # Renewed, without a restart of anybody.
            ground.node.certify(NOW)
            ground.orchestrator.certify(NOW)
            assert running.node.security is not None
            async with asyncio.timeout(WAIT_S):
                while client.is_by_pin:
                    ground.ours.look()
                    await asyncio.sleep(0.1)
                    with contextlib.suppress(GodwitError):
                        await client.hello()
            assert client.certificate_ends_unix_s > NOW.timestamp()


async def _answered(client: AgentClient) -> agent_pb2.HelloResponse:
    """A Hello, as somebody asks who asks again."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await client.hello()
            except NotExecutedError:
                continue


async def test_a_live_connection_is_left_alone(ground: Ground) -> None:
    async with ground.agent(), client_of(ground) as client:
        await client.hello()
        ground.end()
        await client.hello()
        assert not client.is_by_pin


async def test_an_agent_that_was_away_is_no_alarm(
    ground: Ground, caplog: pytest.LogCaptureFixture
) -> None:
    """While nobody listens keys are tried as well; with good certificates they are not used."""
    async with ground.agent(), client_of(ground) as client:
        await client.hello()
        kept = client.pin
    async with client_of(ground) as client:
        client.pin = kept
        with pytest.raises(NotExecutedError):
            await client.hello()
        async with ground.agent():
            await _answered(client)
            for _ in range(20):
                await client.hello()
                await asyncio.sleep(0.1)
            assert not client.is_by_pin
    assert "pinned key alone" not in caplog.text


@pytest.mark.parametrize("why", ["nobody migrates", "another orchestrator", "never met"])
async def test_for_nobody_else_and_for_no_other_purpose(ground: Ground, why: str) -> None:
    """Each of them is refused where the one above is let in."""
    async with ground.agent(), client_of(ground) as client:
        if why != "never met":
            await client.hello()
        kept = client.pin
    ground.end()
    ground.other.certify(PAST)
    theirs = Certificates(ground.other.directory) if why == "another orchestrator" else ground.ours
    async with (
        ground.agent(migrating=why != "nobody migrates"),
        client_of(ground, theirs) as client,
    ):
        client.pin = kept
        with pytest.raises(NotExecutedError):
            await client.hello()


async def test_another_server_with_the_nodes_name_is_not_the_node(ground: Ground) -> None:
    """Somebody who has the name, and a key that is not the one that is pinned."""
    async with ground.agent(), client_of(ground) as client:
        await client.hello()
        kept = client.pin
    ground.end()
    shutil.rmtree(ground.node.directory)
    authority = certificates.make_authority(days=100, now=PAST)
    ground.node = Member(ground.node.directory, authority, NODE)
    (ground.node.directory / certificates.AUTHORITY).write_bytes(
        (ground.orchestrator.directory / certificates.AUTHORITY).read_bytes()
    )
    async with ground.agent(), client_of(ground) as client:
        client.pin = kept
        with pytest.raises(NotExecutedError):
            await client.hello()


@pytest.mark.parametrize("kind", [Kind.ADMIN, Kind.NODE, Kind.ORCHESTRATOR])
async def test_a_pinned_key_signs_nobody_else(ground: Ground, kind: Kind) -> None:
    """What the orchestrator's key has signed is worth nothing where the key itself is believed."""
    directory = ground.orchestrator.directory
    key_pem = (directory / certificates.KEY).read_bytes()
    der = continuation.make(key_pem, ORCHESTRATOR.dns_name)
    signer = Pair(certificate=x509.load_der_x509_certificate(der), key=ground.orchestrator.pair.key)
    name = "" if kind is Kind.ORCHESTRATOR else "x"
    signed = certificates.issue(signer, Subject(kind=kind, name=name), days=5, now=NOW)
    own = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
    authority = (directory / certificates.AUTHORITY).read_bytes()
    async with ground.agent() as running, client_of(ground) as client:
        await client.hello()
        security = running.node.security
        assert security is not None
        assert security.certificates.pinned_callers() == (own,)
        for chain, key, code in (
            (own, key_pem, grpc.StatusCode.OK),
            (signed.certificate_pem, signed.key_pem, grpc.StatusCode.UNAVAILABLE),
            (signed.certificate_pem + own, signed.key_pem, grpc.StatusCode.UNAVAILABLE),
        ):
            assert await _checked(ground.port, authority, key, chain) is code


async def _checked(port: int, authority: bytes, key: bytes, chain: bytes) -> grpc.StatusCode:
    """What a Check of its health is answered, which is for everybody who is let in."""
    credentials = grpc.ssl_channel_credentials(authority, key, chain)
    options = [
        ("grpc.ssl_target_name_override", NODE.dns_name),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # the stubs know no Check
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def test_no_date_parts_a_node_from_its_page_server(ground: Ground, tmp_path: Path) -> None:
    """Both have the same key; without it the ended certificate is refused."""
    ground.node.certify(PAST)
    ours = Certificates(ground.node.directory)
    argv = ["--listen", "127.0.0.1:0", "--control", "127.0.0.1:0", "--ram-dir", str(ground.ram)]
    argv += ["--images-dir", str(tmp_path / "images"), "--tls-dir", str(ground.node.directory)]
    config = page_server.Config.from_argv(argv)
    async with page_server.serving(config, NativePageCore()) as pages:

        async def reload(pin: Callable[[], bytes]) -> None:
            tls = PeerTls(certificates=ours, name=NODE.dns_name, pin=pin)
            async with grpc_client.open_channel(str(pages.control), tls) as channel:
                stub = admin_grpc.ImageAdminServiceStub(channel)
                request = admin_pb2.ReloadImagesRequest()
                await grpc_client.call(
                    channel, stub.ReloadImages, request, timeout_s=WAIT_S, connect_s=5.0
                )

        await reload(ours.own_pin)
        with pytest.raises(NotExecutedError):
            await reload(bytes)


async def test_a_file_of_pins_that_is_damaged_locks_nobody_out(
    ground: Ground, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    pem = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    (tmp_path / "state" / "orchestrators.pem").write_bytes(pem + b"\xff\x00 junk")
    async with ground.agent(), client_of(ground) as client:
        assert (await client.hello()).node == "a"


async def test_the_last_orchestrators_are_known_and_nobody_elses_key(ground: Ground) -> None:
    authority = certificates.make_authority(days=5, now=NOW)
    own, pinned = ORCHESTRATOR.dns_name.encode(), b"orchestrator.godwit.pinned"

    def make(subject: Subject = ORCHESTRATOR) -> bytes:
        pair = certificates.issue(authority, subject, days=5, now=NOW)
        return continuation.make(pair.key_pem, subject.dns_name)

    async with ground.agent() as running:
        security = running.node.security
        assert security is not None

        def take(der: bytes, *names: bytes) -> list[bytes]:
            security.take_caller(der, {"x509_subject_alternative_name": names})
            known = map(x509.load_pem_x509_certificate, security.certificates.pinned_callers())
            return [each.public_bytes(Encoding.DER) for each in known]

        # Somebody else's; on a node's connection, on one by keys, on none.
        assert take(make(NODE), own) == []
        assert take(make(), NODE.dns_name.encode()) == []
        assert take(make(), own, pinned) == []
        assert take(make()) == []
        met = [make() for _ in range(CALLER_COUNT_MAX + 1)]
        known = [take(der, own) for der in met]
        assert known[-1] == met[1:]


# --- what is taken for one


def _pair() -> Pair:
    authority = certificates.make_authority(days=5, now=NOW)
    return certificates.issue(authority, NODE, days=5, now=NOW)


def test_it_follows_from_key_and_name_and_says_nothing_else() -> None:
    pair, other = _pair(), _pair()
    key = continuation.key_sha256(pair.certificate)
    made = continuation.make(pair.key_pem, NODE.dns_name)
    assert made == continuation.make(pair.key_pem, NODE.dns_name)
    assert continuation.check(made, dns_name=NODE.dns_name, key=key).startswith(b"-----BEGIN")
    assert len(made) < continuation.LEN_MAX
    named = continuation.make(pair.key_pem, ORCHESTRATOR.dns_name)
    strange = continuation.make(other.key_pem, NODE.dns_name)
    issued = pair.certificate.public_bytes(Encoding.DER)
    for wrong in (named, strange, issued, made[:-1], made + bytes(5000), b""):
        with pytest.raises(InvalidArgumentError, match="CONTINUATION_INVALID"):
            continuation.check(wrong, dns_name=NODE.dns_name, key=key)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_words(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match="CONTINUATION_INVALID"):
        continuation.check(data, dns_name=NODE.dns_name, key=bytes(32))
