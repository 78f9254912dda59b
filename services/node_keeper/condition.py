# SPDX-License-Identifier: Apache-2.0
"""The condition GodwitRetainsImages of a Kubernetes node.

True: memory of guests is kept here that nobody else has, or is on its way here; the node must not
be shut down. One small PATCH when that changes and a heartbeat now and then, so the standard
library's HTTP client does: the official one would cost more memory than the rest of this process.

Source: Kubernetes API, NodeCondition; strategic merge patch of status.conditions, by its key type.
"""

from __future__ import annotations

import datetime as dt
import http.client
import json
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from services.common.errors import FailedPreconditionError, UnavailableError
from services.node_keeper.dependence import IN_FLIGHT, Dependence, Why

TYPE = "GodwitRetainsImages"
ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CALL_S = 10.0
_MESSAGE_LEN_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What the node says of itself."""

    holds: bool
    reason: str
    message: str

    @classmethod
    def of(cls, found: Sequence[Dependence]) -> Condition:
        """From what depends on the node; guests that merely run here do not count."""
        kept = [each for each in found if each.why in IN_FLIGHT]
        if not kept:
            return cls(
                holds=False, reason="NothingRetained", message="no guest's memory is kept here"
            )
        reason = "GuestsInFlight"
        if all(each.why is Why.RETAINED for each in kept):
            reason = "MemoryRetained"
        elif any(each.why is Why.UNREADABLE for each in kept):
            reason = "JournalUnreadable"
        text = f"do not shut this node down: {', '.join(map(str, kept))}"
        return cls(holds=True, reason=reason, message=text[:_MESSAGE_LEN_MAX])


class NodeStatus:
    """One node's status at an API server. Blocks while it calls."""

    def __init__(self, *, url: str, node: str, account_dir: Path = ACCOUNT_DIR) -> None:
        self._url = urlsplit(url)
        self._node = node
        self._account_dir = account_dir
        self._told: Condition | None = None
        self._since = ""

    @classmethod
    def in_cluster(cls, node: str, env: Mapping[str, str] = os.environ) -> NodeStatus:
        """The API server that this pod's environment names.

        Raises:
            FailedPreconditionError: NOT_IN_CLUSTER.
        """
        host, port = env.get("KUBERNETES_SERVICE_HOST"), env.get("KUBERNETES_SERVICE_PORT")
        if not host or not port:
            raise FailedPreconditionError(
                "NOT_IN_CLUSTER",
                "KUBERNETES_SERVICE_HOST and _PORT are not set",
                hint="--node-condition is for pods of a Kubernetes cluster",
            )
        return cls(url=f"https://{f'[{host}]' if ':' in host else host}:{port}", node=node)

    def tell(self, condition: Condition, now: dt.datetime) -> None:
        """Write the condition.

        Raises:
            UnavailableError: API_SERVER_UNREACHABLE, or NODE_STATUS_REFUSED with its words.
        """
        stamp = f"{now:%Y-%m-%dT%H:%M:%SZ}"
        if self._told is None:
            self._since = self._known_since(condition) or stamp
        elif self._told.holds != condition.holds:
            self._since = stamp
        self._call(
            "PATCH",
            "/status",
            {
                "status": {
                    "conditions": [
                        {
                            "type": TYPE,
                            "status": "True" if condition.holds else "False",
                            "reason": condition.reason,
                            "message": condition.message,
                            "lastHeartbeatTime": stamp,
                            "lastTransitionTime": self._since,
                        }
                    ]
                }
            },
        )
        self._told = condition

    def _known_since(self, condition: Condition) -> str:
        """Since when the node has said so; "": it says something else, or nothing."""
        status = "True" if condition.holds else "False"
        for each in self._call("GET", "").get("status", {}).get("conditions", []):
            if each["type"] == TYPE and each["status"] == status:
                return str(each["lastTransitionTime"])
        return ""

    def _call(self, method: str, part: str, body: object = None) -> dict[str, Any]:
        path = f"/api/v1/nodes/{quote(self._node, safe='')}{part}"
        try:
            # Both are read anew each time: the kubelet replaces them.
            token = (self._account_dir / "token").read_text().strip()
            context = ssl.create_default_context(cafile=str(self._account_dir / "ca.crt"))
            connection = http.client.HTTPSConnection(
                self._url.hostname or "", self._url.port, timeout=CALL_S, context=context
            )
            try:
                connection.request(
                    method,
                    path,
                    body=None if body is None else json.dumps(body),
                    headers={
                        "Authorization": f"Bearer {token}",
                        "Accept": "application/json",
                        "Content-Type": "application/strategic-merge-patch+json",
                    },
                )
                answer = connection.getresponse()
                text = answer.read()
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(
                "API_SERVER_UNREACHABLE", f"{self._url.netloc}: {error!r}"
            ) from error
        if answer.status != http.HTTPStatus.OK:
            raise UnavailableError(
                "NODE_STATUS_REFUSED",
                f"{method} {path}: {answer.status} {text[:500].decode(errors='replace')}",
                hint="the account needs nodes get and nodes/status patch (deploy/helm)",
            )
        decoded: dict[str, Any] = json.loads(text)
        return decoded
