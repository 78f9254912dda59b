# SPDX-License-Identifier: Apache-2.0
"""Events about our objects (events.k8s.io/v1): each once, whoever tells it.

Their names are made of what they tell, so that a controller that does not know what the one before
it told may tell it again.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import logging

from services.orchestrator.kubernetes import names
from services.orchestrator.kubernetes.api import Api, ConflictError, Object, RefusedError

log = logging.getLogger(__name__)

NOTE_LEN_MAX = 1000
_CONTROLLER = "godwit.io/orchestrator"


class Events:
    """Tells."""

    def __init__(self, api: Api, instance: str) -> None:
        """`instance`: the process that tells."""
        self._api = api
        self._instance = instance[:128]
        self._told: dict[str, None] = {}
        """Names that are there for certain; the last ones, in order."""

    async def tell(
        self,
        about: Object,
        *,
        key: str,
        reason: str,
        note: str,
        at_ns: int,
        warning: bool = False,
        related: Object | None = None,
    ) -> None:
        """Say that something happened to `about`. `key` tells it from all else that happens."""
        metadata = about["metadata"]
        digest = hashlib.sha256(f"{metadata['uid']}/{key}".encode()).hexdigest()[:16]
        name = f"{metadata['name'][:230]}.{digest}"
        if name in self._told:
            return
        namespace = metadata.get("namespace", "default")
        at = dt.datetime.fromtimestamp(at_ns / 1e9, tz=dt.UTC)
        body: Object = {
            "metadata": {"name": name, "namespace": namespace},
            "eventTime": at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "action": reason[:128],
            "reason": reason[:128],
            "note": note[:NOTE_LEN_MAX],
            "type": "Warning" if warning else "Normal",
            "regarding": _reference(about),
            "reportingController": _CONTROLLER,
            "reportingInstance": self._instance,
        }
        if related:
            body["related"] = _reference(related)
        with contextlib.suppress(ConflictError):  # told already
            await self._create(body, namespace)
        self._told[name] = None
        while len(self._told) > 10_000:
            self._told.pop(next(iter(self._told)))

    async def _create(self, body: Object, namespace: str) -> None:
        """Nothing hangs on an event: one that is refused, for good, is a line in the log."""
        try:
            await self._api.create(names.EVENTS, body, namespace=namespace)
        except RefusedError as error:
            regarding = body["regarding"]
            if "namespace" in regarding:
                log.warning("event %s is refused: %s", body["reason"], error.message)
                return
            # Before 1.25, a kind without namespaces that the server does not know has to have one.
            body = {**body, "regarding": {**regarding, "namespace": namespace}}
            await self._create(body, namespace)


def _reference(found: Object) -> Object:
    metadata = found["metadata"]
    reference = {
        "apiVersion": found["apiVersion"],
        "kind": found["kind"],
        "name": metadata["name"],
        "namespace": metadata.get("namespace", ""),
        "uid": metadata.get("uid", ""),
    }
    return {name: value for name, value in reference.items() if value}
