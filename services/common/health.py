# SPDX-License-Identifier: Apache-2.0
"""grpc.health.v1 with one status a service. "" is the process as a whole: readiness."""

from __future__ import annotations

from collections.abc import Iterable

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVICE_NAME = str(health.SERVICE_NAME)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """What a process says about its services."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = tuple(services)
        self._servicer = health.aio.HealthServicer()

    @property
    def servicer(self) -> health_pb2_grpc.HealthServicer:
        """To be registered with a server."""
        return self._servicer

    async def set_serving(self, serving: bool, service: str | None = None) -> None:
        """Change the status of one service, or of all and the process. No effect after `drain`."""
        names = ("", *self._services) if service is None else (service,)
        for name in names:
            await self._servicer.set(name, _SERVING if serving else _NOT_SERVING)

    async def drain(self) -> None:
        """Everything is NOT_SERVING from now on, for good."""
        await self._servicer.enter_graceful_shutdown()
