# SPDX-License-Identifier: Apache-2.0
"""With certificates a node's services obey those whom the table of rules names, and nobody else."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as agent_pb
from godwit.agent.v1 import fault_agent_service_pb2_grpc as agent_grpc
from godwit.page.v1 import image_admin_service_pb2 as page_pb
from godwit.page.v1 import image_admin_service_pb2_grpc as page_grpc

from services.common import grpc_client
from services.common.errors import GodwitError
from services.common.peer_tls import PeerTls, node_name
from services.common.tls import Certificates
from services.demo.cluster_tls import OPERATOR, ORCHESTRATOR, ClusterTls, make_cluster_tls
from services.fault_agent import main as agent_main
from services.page_server import main as page_server_main
from services.pagecore.fake import FakePageCore

ANY_PORT = "127.0.0.1:0"
DENIED = "PERMISSION_DENIED"


@pytest.fixture
def tls(tmp_path: Path) -> ClusterTls:
    return make_cluster_tls(tmp_path / "tls", ("a", "b"))


def as_member(tls: ClusterTls, member: str) -> PeerTls:
    """How a member calls node a."""
    return PeerTls(certificates=Certificates(tls.member(member)), name=node_name("a"))


@pytest.mark.parametrize(
    ("member", "refusal"),
    [("a", ""), ("b", DENIED), (ORCHESTRATOR, DENIED), (OPERATOR, DENIED)],
)
async def test_a_page_server_obeys_its_own_node(
    tls: ClusterTls, tmp_path: Path, member: str, refusal: str
) -> None:
    config = page_server_main.Config.from_argv(
        [
            *("--listen", ANY_PORT, "--control", ANY_PORT, "--tls-dir", str(tls.member("a"))),
            *("--images-dir", str(tmp_path / "images")),
        ]
    )
    async with (
        page_server_main.serving(config, FakePageCore()) as running,
        grpc_client.open_channel(str(running.control), as_member(tls, member)) as channel,
    ):
        stub = page_grpc.ImageAdminServiceStub(channel)
        request = page_pb.ReloadImagesRequest()
        assert (
            await reason_of(grpc_client.call(channel, stub.ReloadImages, request, timeout_s=20))
            == refusal
        )


@pytest.mark.parametrize(
    ("member", "refusal"),
    [(ORCHESTRATOR, ""), ("b", DENIED), (OPERATOR, DENIED)],
)
async def test_an_agent_obeys_orchestrators(
    tls: ClusterTls, tmp_path: Path, member: str, refusal: str
) -> None:
    config = agent_main.Config.from_argv(
        [
            *("--node", "a", "--listen", ANY_PORT, "--tls-dir", str(tls.member("a"))),
            *("--state-dir", str(tmp_path / "state"), "--ram-dir", str(tmp_path / "ram")),
            *("--page-server-control", "127.0.0.1:1"),
        ]
    )
    async with (
        agent_main.serving(config, FakePageCore()) as running,
        grpc_client.open_channel(str(running.grpc), as_member(tls, member)) as channel,
    ):
        stub = agent_grpc.FaultAgentServiceStub(channel)
        request = agent_pb.ListVmsRequest()
        assert (
            await reason_of(grpc_client.call(channel, stub.ListVms, request, timeout_s=20))
            == refusal
        )


async def reason_of(call: Awaitable[Any]) -> str:
    """Why it was refused; empty: it was done."""
    try:
        await call
    except GodwitError as error:
        return error.reason
    return ""
