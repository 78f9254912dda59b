# SPDX-License-Identifier: Apache-2.0
"""One resource of a kubelet: a device node that several containers may share.

A device node that a hostPath volume brings into a container cannot be opened there: the container's
device control group does not have it. What a kubelet is told in Allocate it puts in both. The
alternative, `privileged: true`, gives every device of the node.

The kubelet may be started again at any time, and then forgets its plugins and removes their
sockets; a plugin that is not asked to ListAndWatch is one that the kubelet does not know. So this
looks once a second, and binds and registers again when kubelet.sock is another, its own socket is
gone, or nobody has been watching for a while.

Source: Kubernetes, device plugins ("Handling kubelet restarts").
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import stat
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from godwit.kubelet.v1beta1 import device_plugin_pb2 as pb
from godwit.kubelet.v1beta1 import device_plugin_pb2_grpc as pb_grpc

from services.common.errors import GodwitError, UnavailableError

log = logging.getLogger(__name__)

VERSION = "v1beta1"
KUBELET_SOCKET = "kubelet.sock"
HEALTHY = "Healthy"
UNHEALTHY = "Unhealthy"
LOOK_S = 1.0
CALL_S = 5.0
UNWATCHED_S_MAX = 30.0
"""How long nobody may watch before it registers again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """What is offered."""

    name: str
    """Domain and name, as pods ask for it."""
    device: Path
    """The device node, as pods have it: /dev/kvm."""
    seen_at: Path
    """The same, where this process can look at it."""
    shares: int
    """Containers that may have it at a time. The device itself knows no limit."""

    @property
    def endpoint(self) -> str:
        """Name of its socket in the kubelet's directory."""
        return f"{self.name.replace('/', '_')}.sock"

    def is_there(self) -> bool:
        """Whether the node has the device. It is not opened: this process may not."""
        try:
            return stat.S_ISCHR(self.seen_at.stat().st_mode)
        except OSError:
            return False


class Plugin(pb_grpc.DevicePluginServicer):
    """Serves one resource to one kubelet. Used by one loop."""

    def __init__(self, resource: Resource, kubelet_dir: Path) -> None:
        self.resource = resource
        self._dir = kubelet_dir
        self._healthy = resource.is_there()
        self._changed = asyncio.Condition()
        self._watchers = 0
        self._watched_at = time.monotonic()
        self._server: grpc.aio.Server | None = None
        self._bound: int = 0
        """Inode of our socket."""
        self._kubelet: int = 0
        """Inode of the kubelet's socket at which we are registered; 0: at none."""
        self._complained = False

    @property
    def socket(self) -> Path:
        """Where the kubelet calls."""
        return self._dir / self.resource.endpoint

    async def keep(self) -> None:
        """Be served and registered until cancelled. A kubelet that is away is waited for."""
        try:
            while True:
                await self._look()
                await asyncio.sleep(LOOK_S)
        finally:
            await self._unbind()

    async def _look(self) -> None:
        await self._look_at_device()
        kubelet = _inode(self._dir / KUBELET_SOCKET)
        if self._watchers:
            self._watched_at = time.monotonic()
        forgotten = time.monotonic() - self._watched_at > UNWATCHED_S_MAX
        if kubelet and kubelet == self._kubelet and not forgotten and self._is_bound():
            return
        try:
            if not self._is_bound():
                await self._bind()
            if not kubelet:
                raise UnavailableError("KUBELET_AWAY", f"{self._dir / KUBELET_SOCKET} is not there")
            await self._register()
        except (GodwitError, OSError) as error:
            self._kubelet = 0
            if not self._complained:
                log.warning("%s is not registered: %s", self.resource.name, error)
            self._complained = True
            return
        self._kubelet, self._complained = kubelet, False
        self._watched_at = time.monotonic()
        log.info("%s is registered, %d shares", self.resource.name, self.resource.shares)

    async def _look_at_device(self) -> None:
        healthy = self.resource.is_there()
        if healthy == self._healthy:
            return
        async with self._changed:
            self._healthy = healthy
            self._changed.notify_all()
        log.warning("%s: %s", self.resource.seen_at, HEALTHY if healthy else UNHEALTHY)

    def _is_bound(self) -> bool:
        return self._bound != 0 and _inode(self.socket) == self._bound

    async def _bind(self) -> None:
        await self._unbind()
        server = grpc.aio.server()
        pb_grpc.add_DevicePluginServicer_to_server(self, server)
        try:
            bound = server.add_insecure_port(f"unix:{self.socket}")
        except RuntimeError as error:
            bound = 0
            why = str(error)
        else:
            why = "it is taken"
        if not bound:
            raise UnavailableError("LISTEN_FAILED", f"cannot bind {self.socket}: {why}")
        await server.start()
        self._server, self._bound = server, _inode(self.socket)

    async def _unbind(self) -> None:
        server, self._server, self._bound = self._server, None, 0
        if server is not None:
            await server.stop(None)
        with contextlib.suppress(OSError):
            self.socket.unlink()

    async def _register(self) -> None:
        request = pb.RegisterRequest(
            version=VERSION,
            endpoint=self.resource.endpoint,
            resource_name=self.resource.name,
            options=pb.DevicePluginOptions(),
        )
        async with grpc.aio.insecure_channel(f"unix:{self._dir / KUBELET_SOCKET}") as channel:
            stub = pb_grpc.RegistrationStub(channel)
            try:
                await stub.Register(request, timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                raise UnavailableError(
                    "REGISTRATION_REFUSED",
                    f"the kubelet says {error.code().name}: {error.details()}",
                ) from error

    def _list(self) -> pb.ListAndWatchResponse:
        health = HEALTHY if self._healthy else UNHEALTHY
        short = self.resource.name.rpartition("/")[2]
        return pb.ListAndWatchResponse(
            devices=[
                pb.Device(ID=f"{short}-{number}", health=health)
                for number in range(self.resource.shares)
            ]
        )

    # --- what the kubelet calls

    async def GetDevicePluginOptions(  # noqa: N802 - its name
        self, _request: pb.Empty, _context: Any
    ) -> pb.DevicePluginOptions:
        return pb.DevicePluginOptions()

    async def ListAndWatch(  # noqa: N802
        self, _request: pb.Empty, _context: Any
    ) -> AsyncIterator[pb.ListAndWatchResponse]:
        self._watchers += 1
        try:
            while True:
                async with self._changed:
                    said = self._healthy
                    answer = self._list()
                yield answer
                async with self._changed:
                    await self._changed.wait_for(lambda: self._healthy != said)  # noqa: B023
        finally:
            self._watchers -= 1

    async def Allocate(  # noqa: N802
        self, request: pb.AllocateRequest, _context: Any
    ) -> pb.AllocateResponse:
        path = str(self.resource.device)
        # One node, however many shares of it a container asked for.
        spec = pb.DeviceSpec(container_path=path, host_path=path, permissions="rw")
        return pb.AllocateResponse(
            container_responses=[
                pb.ContainerAllocateResponse(devices=[spec]) for _ in request.container_requests
            ]
        )


def _inode(path: Path) -> int:
    """Of a socket; 0: there is none."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else 0
