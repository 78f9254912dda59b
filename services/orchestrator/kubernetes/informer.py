# SPDX-License-Identifier: Apache-2.0
"""A copy of what the API server has of one kind, kept by list and watch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable

from services.orchestrator.kubernetes.api import (
    Api,
    GoneError,
    Kind,
    KubernetesError,
    Object,
    key_of,
)

log = logging.getLogger(__name__)

RETRY_S_MIN = 0.2
RETRY_S_MAX = 10.0


class Informer:
    """Objects by key, and who wants to hear of each change. `async with informer.running()`.

    It is behind by what the network takes, and by a whole outage while that lasts; whoever writes
    gives the resource version that was read, and a conflict says that it was behind. Nothing that
    is in it is to be changed.
    """

    def __init__(self, api: Api, kind: Kind, *, namespace: str = "", selector: str = "") -> None:
        """`namespace`: empty for all."""
        self.kind = kind
        self._api = api
        self._namespace = namespace
        self._selector = selector
        self._objects: dict[str, Object] = {}
        self._listed = asyncio.Event()
        self.on_change: list[Callable[[Object], None]] = []
        """Hear every object that is new, changed or gone, as it was last."""
        self.list_count = 0
        """How often it had to list."""

    def get(self, key: str) -> Object | None:
        """The last that is known of it."""
        return self._objects.get(key)

    def all(self) -> Iterable[Object]:
        """Everything."""
        return list(self._objects.values())

    async def listed(self) -> None:
        """Return once it has a first whole copy."""
        await self._listed.wait()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow for the length of the block."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._follow())
            try:
                yield
            finally:
                task.cancel()

    async def _follow(self) -> None:
        delay_s = RETRY_S_MIN
        version = ""
        while True:
            try:
                if not version:
                    version = await self._list()
                async for kind, found in self._api.watch(
                    self.kind, version, namespace=self._namespace, selector=self._selector
                ):
                    delay_s = RETRY_S_MIN
                    version = found["metadata"]["resourceVersion"]
                    if kind != "BOOKMARK":
                        self._take(found, gone=kind == "DELETED")
                # Ended in peace; by something that always ends it at once, it would spin.
                await asyncio.sleep(RETRY_S_MIN)
            except GoneError:
                version = ""
            except KubernetesError as error:
                log.warning("%s: %s; again in %.1f s", self.kind.plural, error.message, delay_s)
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                delay_s = min(delay_s * 2, RETRY_S_MAX)

    async def _list(self) -> str:
        found, version = await self._api.list(
            self.kind, namespace=self._namespace, selector=self._selector
        )
        self.list_count += 1
        now = {key_of(each): each for each in found}
        for key in self._objects.keys() - now.keys():
            self._take(self._objects[key], gone=True)
        for each in found:
            known = self._objects.get(key_of(each))
            if not known or _version(known) != _version(each):
                self._take(each, gone=False)
        self._listed.set()
        return version

    def _take(self, found: Object, *, gone: bool) -> None:
        key = key_of(found)
        if gone:
            self._objects.pop(key, None)
        else:
            found.setdefault("apiVersion", self.kind.api_version)
            found.setdefault("kind", self.kind.name)
            self._objects[key] = found
        for hear in self.on_change:
            hear(found)


def _version(found: Object) -> str:
    return str(found["metadata"]["resourceVersion"])
