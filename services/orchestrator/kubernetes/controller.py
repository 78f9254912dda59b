# SPDX-License-Identifier: Apache-2.0
"""Runs the controller: where this orchestrator leads its store, and holds the Lease.

The Lease keeps two controllers from writing over each other. It is not what keeps a guest from
running twice: that is the decision in the store, whatever any Lease says (I2, I13).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from services.common.errors import GodwitError
from services.orchestrator.events.model import Kind, Subject
from services.orchestrator.fleet import Fleet
from services.orchestrator.homes import HomesInCharge
from services.orchestrator.kubernetes.api import Api, connect
from services.orchestrator.kubernetes.drains import Drains
from services.orchestrator.kubernetes.events import Events
from services.orchestrator.kubernetes.eviction import Evictions
from services.orchestrator.kubernetes.lease import Lease
from services.orchestrator.kubernetes.migrations import Migrations
from services.orchestrator.kubernetes.nodes import ClusterNodes
from services.orchestrator.kubernetes.pods import Pods
from services.orchestrator.kubernetes.settings import Settings
from services.orchestrator.kubernetes.webhook import serving_webhook
from services.orchestrator.kubernetes.workqueue import WorkQueue
from services.orchestrator.migration import TERMINAL
from services.orchestrator.move import Context
from services.orchestrator.operations.service import Operations

log = logging.getLogger(__name__)

LEASE_NAME = "godwit-controller"
MIRROR_S = 2.0
"""An object that asked for a migration may take so long to say so. Seconds."""


class Controller:
    """All reconcilers over one API server. `async with controller.running()` is its life."""

    def __init__(
        self,
        api: Api,
        settings: Settings,
        context: Context,
        fleet: Fleet,
        operations: Operations,
        homes: HomesInCharge,
    ) -> None:
        self._context = context
        self._fleet = fleet
        self._homes = homes
        events = Events(api, context.role.name)
        namespace = settings.namespace
        self.pods = Pods(api, context.store, namespace=namespace)
        self.migrations = Migrations(
            api, fleet, self.pods, events, namespace=namespace, ttl_s=settings.ttl_s
        )
        self.drains = Drains(api, operations, events)
        self.nodes = ClusterNodes(
            api,
            fleet,
            self.drains,
            on_cordon=settings.on_cordon,
            when_uncordoned=settings.when_uncordoned,
        )
        self.evictions = Evictions(fleet, context.store, self.pods)
        self._following = WorkQueue(self._follow, what="migration")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Make everything right, again and again, for the length of the block."""
        self._context.changes.on_publish.append(self._published)
        try:
            async with contextlib.AsyncExitStack() as stack:
                informers = (
                    self.pods.informer,
                    self.migrations.informer,
                    self.drains.informer,
                    self.nodes.informer,
                    self.nodes.agents,
                )
                for informer in informers:
                    await stack.enter_async_context(informer.running())
                for informer in informers:
                    await informer.listed()
                self._homes.use(self.pods.prepare)
                for queue in (
                    self.pods.queue,
                    self.migrations.queue,
                    self.drains.queue,
                    self.nodes.queue,
                    self._following,
                ):
                    await stack.enter_async_context(queue.running())
                for row in await self._context.store.migrations.unfinished():
                    self._following.add(row.migration_id)
                log.info("controller: at work")
                yield
        finally:
            self._homes.use(None)
            self._context.changes.on_publish.remove(self._published)

    def _published(self, subject: Subject | None) -> None:
        if subject is not None and subject[0] is Kind.MIGRATION:
            self._following.add(subject[1])

    async def _follow(self, migration_id: str) -> float | None:
        """The store has written a migration: its object, and its VM's pods, may be behind."""
        row = await self._context.store.migrations.get(migration_id)
        if row is None:
            return None
        if row.phase in TERMINAL:
            self.pods.queue.add(row.vm_id)
        if self.migrations.has(migration_id):
            self.migrations.published(migration_id)
            return None
        pod = self.pods.of(row.vm_id)
        if pod is None:
            return None  # A VM without a pod is nobody's to see here.
        if self.migrations.asks_for(row.vm_id):
            return MIRROR_S
        view = await self._fleet.get_migration(migration_id)
        await self.migrations.mirror(view, pod["metadata"]["namespace"])
        return None


async def run(
    settings: Settings,
    context: Context,
    fleet: Fleet,
    operations: Operations,
    homes: HomesInCharge,
) -> None:
    """Control, whenever the Lease is ours, until cancelled."""
    api = Api(await connect(settings.kubeconfig))
    key = f"{settings.lease_namespace}/{LEASE_NAME}"
    try:
        while True:
            controller = Controller(api, settings, context, fleet, operations, homes)
            lease = Lease(api, key, context.role.name, settings.lease)
            try:
                async with (
                    lease.held() as lost,
                    controller.running(),
                    # Last: before it has seen the pods it would let all of them go.
                    serving_webhook(settings, controller.evictions.app()),
                ):
                    await lost.wait()
                log.warning("controller: the Lease is lost")
            except* GodwitError as failed:
                log.warning("controller: %s", failed.exceptions[0])
            except* Exception:
                # Whatever is wrong with it, guests move without it as well.
                log.exception("controller: a bug")
            await asyncio.sleep(settings.lease.retry_s)
    finally:
        await api.close()
