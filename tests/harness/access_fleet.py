# SPDX-License-Identifier: Apache-2.0
"""Servers to be asked who may what: an orchestrator, an agent, a page server, with certificates.

They are those of the processes, in this one, on real sockets with real TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import ssl
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
from godwit.page.v1 import page_service_pb2

from services.common.auth.rules import Rule
from services.common.auth.tokens import new_token
from services.common.certificates import Kind
from services.common.listen import Address
from services.common.peer_tls import ORCHESTRATOR_NAME, node_name
from services.fault_agent import main as fault_agent
from services.orchestrator.agents import Deadlines
from services.orchestrator.auth.settings import AuthSettings
from services.orchestrator.fetch_tokens import FetchTokens
from services.orchestrator.main import Settings, orchestrating
from services.page_server import main as page_server
from services.page_server.images import this_boot_id
from services.pagecore.fake import FakePageCore
from services.pagecore.native import NativePageCore
from tests.harness.access_table import REPLAYED
from tests.harness.certificates import FleetCertificates, Shown

WAIT_S = 30.0
NODE, OTHER, THIRD = "a", "b", "c"
"""Whose the agent and the page server are; whom the image is for; who has nothing to do with it."""
PAGE = 4096
IMAGE_ID, EPOCH = "vm.1", 7
ROLES = ("viewer", "operator", "admin")
_LOOPBACK = Address(host="127.0.0.1", port=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessFleet:
    """What listens, and what callers show."""

    rest: Address
    servers: Mapping[str, tuple[Address, str]]
    """By the beginning of a service's name: where, and the name in the certificate there."""
    shown: Mapping[str, Shown | None]
    """By caller; None: no certificate."""
    tokens: Mapping[str, str]
    """Bearer tokens by role, and the one that was revoked."""
    fetch_tokens: FetchTokens
    """Their public key is in the record of the image that is served."""

    def where(self, rule: Rule) -> tuple[Address, str]:
        """The server of an RPC. What every server has is asked of the orchestrator."""
        found = [self.servers[key] for key in self.servers if rule.rpc.startswith(key)]
        return found[0] if found else self.servers["godwit.fleet."]

    def _trusted(self) -> Path:
        return next(shown.authority for shown in self.shown.values() if shown)

    def http(self, who: str, token: str = "") -> httpx.AsyncClient:
        """A client of REST that shows what `who` has, and brings a bearer token."""
        context = ssl.create_default_context(cafile=str(self._trusted()))
        context.check_hostname = False  # it is called by its address
        if shown := self.shown[who]:
            context.load_cert_chain(shown.certificate, shown.key)
        return httpx.AsyncClient(
            base_url=f"https://{self.rest}",
            verify=context,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            trust_env=False,
            timeout=WAIT_S,
        )

    def channel(self, who: str, where: tuple[Address, str]) -> grpc.Channel:
        """A connection that shows what `who` has.

        Not one of grpc.aio: that one calls it INTERNAL if a stream is refused before its first
        message has been written, and does not say by what.
        """
        address, name = where
        shown = self.shown[who]
        credentials = grpc.ssl_channel_credentials(
            self._trusted().read_bytes(),
            shown.key.read_bytes() if shown else None,
            shown.certificate.read_bytes() if shown else None,
        )
        options = [
            ("grpc.ssl_target_name_override", name),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        return grpc.secure_channel(str(address), credentials, options=options)

    def hello(self, *, image_id: str = "vm.of-nobody", destination: str = "") -> bytes:
        """A first message of Fetch, with a token for `destination` if there is one."""
        token = (
            self.fetch_tokens.issue(
                image_id=image_id, epoch=EPOCH + 1, destination=node_name(destination)
            )
            if destination
            else b""
        )
        return page_service_pb2.FetchRequest(
            hello=page_service_pb2.FetchHello(
                session_id="s",
                image_id=image_id,
                epoch=EPOCH + 1,
                lane=page_service_pb2.LANE_DEMAND,
                token=token,
            )
        ).SerializeToString()


def _certificates(directory: Path) -> dict[str, Shown | None]:
    made = FleetCertificates(directory)
    return {
        "nobody": None,
        "wrong authority": made.issue(Kind.ADMIN, "eve", by_stranger=True),
        "expired": made.issue(Kind.ADMIN, "old", expired=True),
        "viewer": made.issue(Kind.VIEWER, "vera"),
        "operator": made.issue(Kind.OPERATOR, "oscar"),
        "admin": made.issue(Kind.ADMIN, "ada"),
        "node itself": made.issue(Kind.NODE, NODE),
        "other node": made.issue(Kind.NODE, OTHER),
        "orchestrator": made.issue(Kind.ORCHESTRATOR),
        REPLAYED: None,
    }


def _write_image(directory: Path, ram: Path, token_key: bytes) -> None:
    """A record of an image that is for OTHER."""
    directory.mkdir()
    memory = ram / "memory"
    memory.write_bytes(b"m" * PAGE)
    region = {"gpa": 0, "size_bytes": PAGE, "file_offset": 0, "page_size_bytes": PAGE}
    record = {
        "image_id": IMAGE_ID,
        "vm_id": "vm",
        "boot_id": this_boot_id(),
        "epoch": EPOCH,
        "inode": memory.stat().st_ino,
        "generation": 1,
        "state": "frozen",
        "ram_path": str(memory),
        "regions": [region],
        "destination": node_name(OTHER),
        "destination_epoch": EPOCH + 1,
        "token_key": token_key.hex(),
    }
    (directory / f"{IMAGE_ID}.json").write_text(json.dumps(record))


async def _revoke(fleet: AccessFleet, path: Path, good_lines: str) -> None:
    """The token is good; then its line goes, and some time later it is not."""
    async with fleet.http("nobody", fleet.tokens[REPLAYED]) as http:
        assert (await http.get("/v1/nodes")).status_code == 200
        await asyncio.to_thread(path.write_text, good_lines)
        async with asyncio.timeout(WAIT_S):
            while (await http.get("/v1/nodes")).status_code != 401:  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def access_fleet(directory: Path) -> AsyncIterator[AccessFleet]:
    """All of it, for the length of the block. `directory`: empty."""
    shown = _certificates(directory / "certificates")
    tokens, lines = {}, {}
    for who, role in (*zip(ROLES, ROLES, strict=True), (REPLAYED, "admin")):
        tokens[who], line = new_token(who.replace(" ", "-"), role)
        lines[who] = f"{line}\n"
    tokens_file = directory / "tokens"
    tokens_file.write_text("".join(lines.values()))
    signs = FetchTokens()
    orchestrators, nodes = shown["orchestrator"], shown["node itself"]
    assert orchestrators
    assert nodes
    ram = Path(tempfile.mkdtemp(prefix="godwit-test-", dir="/dev/shm"))
    try:
        _write_image(directory / "images", ram, signs.public_key)
        tls = ["--tls-dir", str(nodes.directory)]
        of_pages = ["--listen", "127.0.0.1:0", "--control", "127.0.0.1:0", *tls]
        of_pages += ["--images-dir", str(directory / "images"), "--ram-dir", str(ram)]
        of_agent = ["--node", NODE, "--listen", "127.0.0.1:0", *tls]
        of_agent += ["--page-server-control", "127.0.0.1:1", "--ram-dir", str(ram)]
        of_agent += ["--state-dir", str(directory / "state")]
        settings = Settings(
            store=directory / "godwit.db",
            rest=_LOOPBACK,
            grpc=_LOOPBACK,
            deadlines=Deadlines(connect_s=0.2, hello_s=0.5),
            tls_dir=orchestrators.directory,
            auth=AuthSettings(tokens_file=tokens_file, audit_log=directory / "audit"),
        )
        async with (
            orchestrating(settings) as orchestrator,
            page_server.serving(page_server.Config.from_argv(of_pages), NativePageCore()) as pages,
            fault_agent.serving(fault_agent.Config.from_argv(of_agent), FakePageCore()) as agent,
        ):
            fleet = AccessFleet(
                rest=orchestrator.rest,
                servers={
                    "godwit.fleet.": (orchestrator.grpc, ORCHESTRATOR_NAME),
                    "godwit.agent.": (agent.grpc, node_name(NODE)),
                    "godwit.page.v1.ImageAdminService": (pages.control, node_name(NODE)),
                    "godwit.page.v1.PageService": (pages.page, node_name(NODE)),
                },
                shown=shown,
                tokens=tokens,
                fetch_tokens=signs,
            )
            await _revoke(fleet, tokens_file, "".join(lines[role] for role in ROLES))
            yield fleet
    finally:
        shutil.rmtree(ram)
