# SPDX-License-Identifier: Apache-2.0
"""Tells the orchestrator where this agent listens, again and again: it may be the one restarted."""

from __future__ import annotations

import asyncio
import logging

from godwit.fleet.v1 import node_service_pb2, node_service_pb2_grpc

from services.common import grpc_client
from services.common.errors import GodwitError
from services.common.listen import Address
from services.common.peer_tls import PeerTls

log = logging.getLogger(__name__)

RETRY_S = 0.5
REPEAT_S = 30.0
CALL_S = 5.0


async def keep_registered(
    orchestrator: str, node: str, agent: Address, tls: PeerTls | None = None
) -> None:
    """Register until cancelled. Guests depend on nothing of this."""
    known: bool | None = None
    async with grpc_client.open_channel(orchestrator, tls) as channel:
        stub = node_service_pb2_grpc.NodeServiceStub(channel)
        request = node_service_pb2.RegisterNodeRequest(name=node, agent_address=str(agent))
        while True:
            try:
                await grpc_client.call(
                    channel, stub.RegisterNode, request, timeout_s=CALL_S, peer="the orchestrator"
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
