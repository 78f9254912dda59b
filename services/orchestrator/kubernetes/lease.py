# SPDX-License-Identifier: Apache-2.0
"""Holding a Lease of coordination.k8s.io, as other controllers do.

By the rules of client-go: a Lease is free once nobody has been seen to renew it for its duration,
by *our* monotonic clock, so that no two clocks need agree. Ours and not the client library's: the
lock of kubernetes 37.0.2 cannot create a Lease (it gives the call an argument that the call
refuses), goes by the wall clock, and leaves the Lease held when it is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import time
from collections.abc import AsyncIterator, Callable

from services.orchestrator.kubernetes import names
from services.orchestrator.kubernetes.api import Api, ConflictError, KubernetesError, Object
from services.orchestrator.kubernetes.settings import LeaseTimes

log = logging.getLogger(__name__)


class Lease:
    """One Lease, which several processes want."""

    def __init__(
        self,
        api: Api,
        key: str,
        identity: str,
        times: LeaseTimes,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`key`: NAMESPACE/NAME. `identity`: ours, and nobody else's."""
        self._api = api
        self._key = key
        self._identity = identity
        self._times = times
        self._monotonic = monotonic
        self._seen: tuple[str, str] = ("", "")
        """Who held it when it was read last, and when they had renewed it, by their clock."""
        self._seen_s = monotonic()
        """When we saw that, by ours."""

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[asyncio.Event]:
        """Hold it for the length of the block, which begins when it is ours.

        The event: it is not ours any more. At the end it is given back, so that the next one need
        not wait.
        """
        while True:
            if await self._try():
                break
            await asyncio.sleep(self._times.retry_s)
        log.info("lease %s is ours", self._key)
        lost = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(self._keep(lost))
            try:
                yield lost
            finally:
                keeping.cancel()
        if not lost.is_set():
            await self._give_back()

    async def _keep(self, lost: asyncio.Event) -> None:
        renewed_s = self._monotonic()
        while self._monotonic() - renewed_s < self._times.renew_s:
            await asyncio.sleep(self._times.retry_s)
            began_s = self._monotonic()
            if await self._try():
                renewed_s = began_s
        lost.set()

    async def _try(self) -> bool:
        """Take it, or renew it. True: it is ours."""
        try:
            async with asyncio.timeout(self._times.renew_s / 2):
                return await self._take()
        except ConflictError:
            return False  # Somebody was first.
        except (KubernetesError, TimeoutError) as error:
            log.warning("lease %s: %s", self._key, error)
            return False

    async def _take(self) -> bool:
        found = await self._api.find(names.LEASES, self._key)
        if found is None:
            namespace, _, name = self._key.rpartition("/")
            body = {"metadata": {"name": name}, "spec": self._spec({})}
            await self._api.create(names.LEASES, body, namespace=namespace)
            return True
        spec = found.get("spec", {})
        holder = spec.get("holderIdentity", "")
        if holder and holder != self._identity and not self._is_over(spec):
            return False
        await self._write(found, self._spec(spec))
        return True

    def _is_over(self, spec: Object) -> bool:
        """Nobody renewed it for as long as it is good for."""
        now = (spec.get("holderIdentity", ""), spec.get("renewTime", ""))
        if now != self._seen:
            self._seen, self._seen_s = now, self._monotonic()
        duration_s = float(spec.get("leaseDurationSeconds", self._times.duration_s))
        return self._monotonic() - self._seen_s >= duration_s

    def _spec(self, before: Object) -> Object:
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = before.get("holderIdentity") == self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(round(self._times.duration_s), 1),
            "renewTime": now,
            "acquireTime": before.get("acquireTime", now) if mine else now,
            "leaseTransitions": before.get("leaseTransitions", 0) + (not mine and bool(before)),
        }

    async def _write(self, found: Object, spec: Object) -> None:
        version = found["metadata"]["resourceVersion"]
        body = {"metadata": {"resourceVersion": version}, "spec": spec}
        await self._api.patch(names.LEASES, self._key, body)

    async def _give_back(self) -> None:
        with contextlib.suppress(KubernetesError, TimeoutError):
            async with asyncio.timeout(self._times.retry_s):
                found = await self._api.get(names.LEASES, self._key)
                if found["spec"].get("holderIdentity") == self._identity:
                    await self._write(found, {"holderIdentity": ""})
