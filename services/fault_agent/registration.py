# SPDX-License-Identifier: Apache-2.0
"""Tells the orchestrator where this agent listens, again and again: it may be the one restarted."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from godwit.fleet.v1 import node_service_pb2, node_service_pb2_grpc

from services.common import grpc_client
from services.common.errors import FailedPreconditionError, GodwitError
from services.common.listen import Address
from services.common.peer_tls import PeerTls

log = logging.getLogger(__name__)

RETRY_S = 0.5
REPEAT_S = 30.0
CALL_S = 5.0


def read_token(path: Path) -> str:
    """The bearer token that stands in a file now: it may be renewed at any time.

    Raises:
        FailedPreconditionError: TOKEN_UNREADABLE. What is in the file is not repeated.
    """
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FailedPreconditionError("TOKEN_UNREADABLE", f"{path}: {error}") from error
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise FailedPreconditionError(
            "TOKEN_UNREADABLE",
            f"{path}: there is no token in it",
            hint="`godwit tokens new NODE node` makes one",
        )
    return token


async def keep_registered(
    orchestrator: str,
    node: str,
    agent: Address,
    tls: PeerTls | None = None,
    token_file: Path | None = None,
) -> None:
    """Register until cancelled. Guests depend on nothing of this.

    `token_file`: where the bearer token is, for an orchestrator that asks for one.
    """
    known: bool | None = None
    async with grpc_client.open_channel(orchestrator, tls) as channel:
        stub = node_service_pb2_grpc.NodeServiceStub(channel)
        request = node_service_pb2.RegisterNodeRequest(name=node, agent_address=str(agent))
        while True:
            try:
                await grpc_client.call(
                    channel,
                    stub.RegisterNode,
                    request,
                    timeout_s=CALL_S,
                    peer="the orchestrator",
                    bearer=read_token(token_file) if token_file else "",
                )
            except GodwitError as error:
                if known is not False:
                    log.warning("not registered at %s: %s", orchestrator, error)
                known = False
            else:
                if known is not True:
                    log.info("registered at %s as %s, %s", orchestrator, node, agent)
                known = True
            await asyncio.sleep(REPEAT_S if known else RETRY_S)
