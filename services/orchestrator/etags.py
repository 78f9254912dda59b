# SPDX-License-Identifier: Apache-2.0
"""Tags of what can be changed: two people who read the same and write both, and one is told."""

from __future__ import annotations

import hashlib

from godwit.fleet.v1 import types_pb2
from google.protobuf.message import Message

from services.common.errors import AbortedError
from services.orchestrator.store.schedule import NodeSettings, VmSettings

ANY = "*"
"""If-Match: *, whatever it is, as long as there is one."""


def etag_of(said: Message) -> str:
    """Of what was said, in quotes as HTTP has it: the same for the same, and else not."""
    digest = hashlib.sha256(said.SerializeToString(deterministic=True))
    return f'"{digest.hexdigest()[:20]}"'


def require_match(given: str, now: str, what: str) -> None:
    """Refuse a change of what is not as it was read. `given`: empty for a change in any case.

    `now`: empty if there is nothing.

    Raises:
        AbortedError: ETAG_MISMATCH.
    """
    if not given or given == now or (given == ANY and now):
        return
    raise AbortedError(
        "ETAG_MISMATCH",
        f"{what} has been changed since it was read" if now else f"there is no {what} any more",
        hint="read it again, look at what is different, and repeat the change with its new etag",
        metadata={"etag": now},
    )


def node_etag(settings: NodeSettings) -> str:
    """Of what operators said about a node."""
    return etag_of(
        types_pb2.Node(labels=settings.labels, taints=sorted(settings.taints), link=settings.link)
    )


def vm_etag(settings: VmSettings) -> str:
    """Of what operators said about a VM."""
    return etag_of(types_pb2.Vm(labels=settings.labels, placement=placement_of(settings)))


def placement_of(settings: VmSettings) -> types_pb2.VmPlacement:
    """Where a VM may be, for the wire."""
    placing = settings.placing
    return types_pb2.VmPlacement(
        selector=placing.selector,
        tolerations=sorted(placing.tolerations),
        apart=placing.apart,
        near=placing.near,
        group=placing.group,
    )
