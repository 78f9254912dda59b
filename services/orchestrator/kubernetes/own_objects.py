# SPDX-License-Identifier: Apache-2.0
"""What a reconciler does to objects of its own kind: status, finalizer, end.

Each write gives the version that was read; nothing of an informer's copy is changed.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from services.orchestrator.kubernetes.api import Api, Kind, Object, key_of


async def write_status(api: Api, kind: Kind, found: Object, status: dict[str, Any]) -> None:
    """Write the status over the one that was read; what it no longer says goes.

    Raises:
        ConflictError: the object was written since.
    """
    gone = dict.fromkeys(found.get("status", {}).keys() - status.keys())
    body = {
        "metadata": {"resourceVersion": found["metadata"]["resourceVersion"]},
        "status": status | gone,
    }
    await api.patch(kind, key_of(found), body, subresource="status")


async def set_finalizer(api: Api, kind: Kind, found: Object, name: str, *, there: bool) -> Object:
    """Add a finalizer, or take it away; the object as it is then.

    Raises:
        ConflictError: the object was written since.
    """
    metadata = found["metadata"]
    others = [each for each in metadata.get("finalizers", ()) if each != name]
    body = {
        "metadata": {
            "finalizers": [*others, name] if there else others,
            "resourceVersion": metadata["resourceVersion"],
        }
    }
    return await api.patch(kind, key_of(found), body)


async def delete_after(
    api: Api, kind: Kind, found: Object, ttl_s: float, *, now_ns: int
) -> float | None:
    """Delete what ended so long ago; else: in how many seconds. It has a status.completionTime."""
    ended = dt.datetime.fromisoformat(found["status"]["completionTime"])
    left_s = ended.timestamp() + ttl_s - now_ns / 1e9
    if left_s > 0:
        return left_s
    await api.delete(kind, key_of(found), uid=found["metadata"]["uid"])
    return None
