# SPDX-License-Identifier: Apache-2.0
"""The API server as it speaks: JSON in, JSON out, and its refusals as types.

Connection, trust and credentials are those of the official client. Its models are not used: a
controller must write back what it does not understand.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
from kubernetes.aio import client, config

from services.common.errors import InvalidArgumentError, UnavailableError

Object = dict[str, Any]
"""An object of the API, as JSON has it."""

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
REQUEST_S_MAX = 30.0
WATCH_S = 300
"""After so long a watch is begun anew: what lies between may have forgotten it."""


class KubernetesError(UnavailableError):
    """The API server refused, or does not answer. `status`: of HTTP; 0: it did not answer."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "KUBERNETES_UNAVAILABLE"):
        super().__init__(reason, message, hint="see the API server, and what RBAC lets us do")
        self.status = status


class NotFoundError(KubernetesError):
    """404: there is no such object."""


class ConflictError(KubernetesError):
    """409: it was written since it was read, or there is one already. Look again."""


class GoneError(KubernetesError):
    """410: that resource version is forgotten. List again."""


class RefusedError(KubernetesError):
    """400, 403, 422: the same request will be refused again."""


_BY_STATUS: Mapping[int, type[KubernetesError]] = {
    400: RefusedError,
    403: RefusedError,
    404: NotFoundError,
    409: ConflictError,
    410: GoneError,
    422: RefusedError,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of objects, and where they are."""

    group: str
    version: str
    plural: str
    name: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """As objects say it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Of one object, or without `name` of all in the namespace, or of all that there are."""
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts += [each for each in (self.plural, name, subresource) if each]
        return "/" + "/".join(parts)


def key_of(found: Object) -> str:
    """NAMESPACE/NAME, or NAME."""
    metadata = found["metadata"]
    namespace = metadata.get("namespace", "")
    return f"{namespace}/{metadata['name']}" if namespace else str(metadata["name"])


def split_key(key: str) -> tuple[str, str]:
    """The namespace, which may be empty, and the name."""
    namespace, _, name = key.rpartition("/")
    return namespace, name


async def connect(kubeconfig: Path | None) -> client.ApiClient:
    """A client as a kubeconfig says, or (None) as the pod's service account.

    Raises:
        InvalidArgumentError: KUBECONFIG_INVALID.
    """
    made = client.Configuration()
    try:
        if kubeconfig is None:
            config.load_incluster_config(client_configuration=made)  # type: ignore[no-untyped-call]
        else:
            await config.load_kube_config(  # type: ignore[no-untyped-call]
                str(kubeconfig), client_configuration=made
            )
    except (config.ConfigException, OSError) as error:
        where = str(kubeconfig) if kubeconfig else "the service account of this pod"
        raise InvalidArgumentError(
            "KUBECONFIG_INVALID",
            f"{where} cannot be used: {error}",
            hint="run in a pod with a service account, or give --kubeconfig",
        ) from error
    return client.ApiClient(made)


class Api:
    """Calls of one API server."""

    def __init__(self, made: client.ApiClient) -> None:
        self.client = made

    async def close(self) -> None:
        """End its connections."""
        await self.client.close()  # type: ignore[no-untyped-call]

    async def get(self, kind: Kind, key: str) -> Object:
        """One object."""
        return await self._json("GET", kind.path(*split_key(key)))

    async def find(self, kind: Kind, key: str) -> Object | None:
        """One object, or None where there is none."""
        with contextlib.suppress(NotFoundError):
            return await self.get(kind, key)
        return None

    async def list(
        self, kind: Kind, *, namespace: str = "", selector: str = "", page: int = 500
    ) -> tuple[list[Object], str]:
        """All objects, and the resource version from which a watch goes on. Read page by page."""
        found: list[Object] = []
        query = {"limit": str(page)} | ({"labelSelector": selector} if selector else {})
        while True:
            answer = await self._json("GET", kind.path(namespace), query=query)
            for each in answer.get("items") or ():
                # In a list they do not say what they are.
                each.setdefault("apiVersion", kind.api_version)
                each.setdefault("kind", kind.name)
                found.append(each)
            metadata = answer["metadata"]
            if not metadata.get("continue"):
                return found, str(metadata["resourceVersion"])
            query["continue"] = metadata["continue"]

    async def watch(
        self, kind: Kind, resource_version: str, *, namespace: str = "", selector: str = ""
    ) -> AsyncIterator[tuple[str, Object]]:
        """What happens after a resource version: (ADDED, MODIFIED, DELETED or BOOKMARK, object).

        Ends when the server ends it.

        Raises:
            GoneError: list again.
        """
        query = {
            "watch": "1",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_S),
        } | ({"labelSelector": selector} if selector else {})
        # Longer than the server's own end; between bookmarks there may be nothing to read.
        response = await self._send(
            "GET", kind.path(namespace), query=query, timeout_s=WATCH_S + REQUEST_S_MAX
        )
        try:
            while line := await _read(response.response.content.readline()):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    _refuse(event["object"].get("code", 500), event["object"].get("message", ""))
                yield event["type"], event["object"]
        finally:
            response.response.close()

    async def create(self, kind: Kind, body: Object, *, namespace: str = "") -> Object:
        """Make an object."""
        whole = {"apiVersion": kind.api_version, "kind": kind.name} | body
        return await self._json("POST", kind.path(namespace), body=whole)

    async def patch(self, kind: Kind, key: str, body: Object, *, subresource: str = "") -> Object:
        """Merge `body` into an object; with metadata.resourceVersion only if that is the last."""
        namespace, name = split_key(key)
        path = kind.path(namespace, name, subresource)
        return await self._json("PATCH", path, body=body, media=MERGE_PATCH)

    async def delete(self, kind: Kind, key: str, *, uid: str = "") -> None:
        """Delete an object, of this `uid`; none there is as good."""
        body = {"preconditions": {"uid": uid}} if uid else {}
        with contextlib.suppress(NotFoundError):
            await self._json("DELETE", kind.path(*split_key(key)), body=body)

    async def _json(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        media: str = JSON,
    ) -> Object:
        response = await self._send(method, path, query=query, body=body, media=media)
        text = await _read(response.read())
        return json.loads(text) if text else {}

    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        media: str = JSON,
        timeout_s: float = REQUEST_S_MAX,
    ) -> Any:
        """The answer, its body not yet read."""
        sent = await self.client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": JSON} | ({} if body is None else {"Content-Type": media}),
            body=body,
            auth_settings=["BearerToken"],
        )
        response = await _read(self.client.call_api(*sent, _request_timeout=timeout_s))
        if not 200 <= response.status < 300:
            _refuse(response.status, _message(await _read(response.read())))
        return response


async def _read(reading: Any) -> Any:
    """Await it; what the connection does wrong as an error of ours."""
    try:
        return await reading
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise KubernetesError(f"the API server does not answer: {error!r}") from error


def _message(body: bytes) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        return str(json.loads(body).get("message", ""))
    return body[:200].decode(errors="replace")


def _refuse(status: int, message: str) -> NoReturn:
    kind = _BY_STATUS.get(status, KubernetesError)
    raise kind(
        f"the API server says {status}: {message}", status=status, reason=f"KUBERNETES_{status}"
    )
