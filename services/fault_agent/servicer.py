# SPDX-License-Identifier: Apache-2.0
"""FaultAgentService over the handlers. Nothing is decided here."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import AsyncIterator
from importlib import metadata
from typing import Any, TypeAlias

import grpc.aio
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.agent.v1 import fault_agent_service_pb2_grpc
from godwit.common.v1 import common_pb2

from services.common.errors import FailedPreconditionError, InvalidArgumentError
from services.common.grpc_server import Service
from services.common.vm_spec import VmSpec
from services.fault_agent import host
from services.fault_agent.arrival_engine import ArrivalEngines
from services.fault_agent.arrivals import Arrivals
from services.fault_agent.departures import Departures
from services.fault_agent.evidence import read_fence
from services.fault_agent.images import PageServerUnreachableError
from services.fault_agent.journal import Transferred
from services.fault_agent.node import Node
from services.fault_agent.preflight import Preflight
from services.fault_agent.progress import watch_progress
from services.fault_agent.residents import Residents

SERVICE_NAME = "godwit.agent.v1.FaultAgentService"
VERSION_MIN = 1
VERSION_MAX = 1

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class FaultAgentServicer(fault_agent_service_pb2_grpc.FaultAgentServiceServicer):
    """One method an rpc. Commands run to their end whoever hangs up."""

    def __init__(self, node: Node, engines: ArrivalEngines) -> None:
        preflight = Preflight(node)
        self._node = node
        self._preflight = preflight
        self._residents = Residents(node, preflight)
        self._departures = Departures(node, preflight)
        self._arrivals = Arrivals(node, preflight, engines)
        self.leases = self._arrivals.leases
        """What is promised to guests that come."""

    def service(self) -> Service:
        """To be served."""
        return Service(
            name=SERVICE_NAME,
            add=lambda server: fault_agent_service_pb2_grpc.add_FaultAgentServiceServicer_to_server(
                self, server
            ),
        )

    async def Hello(self, request: pb.HelloRequest, context: _Context) -> pb.HelloResponse:  # noqa: N802
        """Agree on a version; say who this is."""
        version = min(request.version_max, VERSION_MAX)
        if version < max(request.version_min, VERSION_MIN) or not request.version_min:
            raise FailedPreconditionError(
                "VERSION_UNSUPPORTED",
                f"this agent speaks {VERSION_MIN}..{VERSION_MAX},"
                f" the caller {request.version_min}..{request.version_max}",
                hint="upgrade the older one; neighbouring releases understand each other",
            )
        if request.adopt_store:
            # Whoever merges journals must not take one that cannot be read for an empty one.
            for corrupt in self._node.corrupt.values():
                raise corrupt
            await self._node.obey(request.store_incarnation)
        security = self._node.security
        if security is not None and request.continuation:
            security.take_caller(request.continuation, context.auth_context())
        if not self._node.images.page_address:
            with contextlib.suppress(PageServerUnreachableError):
                await self._node.images.reload()
        return pb.HelloResponse(
            version=version,
            node=self._node.config.name,
            boot_id=self._node.boot_id,
            incarnation=self._node.incarnation,
            software_version=metadata.version("godwit"),
            page_address=self._node.images.page_address,
            store_incarnation=self._node.store.incarnation,
            certificate_key=self._node.certificate_key,
            continuation=security.certificates.loaded.continuation_der if security else b"",
            certificate_ends_unix_s=security.ends_unix_s() if security else 0,
            capabilities=await self._capabilities(),
        )

    async def ListVms(self, request: pb.ListVmsRequest, context: _Context) -> pb.ListVmsResponse:  # noqa: N802, ARG002
        """The inventory."""
        return pb.ListVmsResponse(
            vms=[await self._node.evidence(vm) for vm in self._node.known_vms()]
        )

    async def Describe(self, request: pb.DescribeRequest, context: _Context) -> pb.DescribeResponse:  # noqa: N802, ARG002
        """Evidence."""
        vm = self._node.peek(request.vm_id)
        return pb.DescribeResponse(evidence=await self._node.evidence(vm))

    async def Preflight(  # noqa: N802
        self,
        request: pb.PreflightRequest,
        context: _Context,  # noqa: ARG002
    ) -> pb.PreflightResponse:
        """The checks."""
        if request.side == pb.SIDE_SOURCE:
            checks = await self._preflight.source(self._node.peek(request.vm_id))
        elif request.side == pb.SIDE_DESTINATION:
            spec = VmSpec.parse(request.spec_json)
            if spec.vm_id != request.vm_id:
                raise InvalidArgumentError(
                    "FIELD_INVALID", f"vm_id is {request.vm_id!r}, the spec is of {spec.vm_id}"
                )
            checks = await self._preflight.destination(spec, request.peer_capabilities)
        else:
            raise InvalidArgumentError("FIELD_INVALID", "side must be SOURCE or DESTINATION")
        return pb.PreflightResponse(
            checks=[
                common_pb2.Check(
                    check=check.check, passed=check.passed, reason=check.reason, hint=check.hint
                )
                for check in checks
            ]
        )

    async def StartVm(self, request: pb.StartVmRequest, context: _Context) -> pb.StartVmResponse:  # noqa: N802, ARG002
        """Start a VM from its spec."""
        fence = read_fence(request.fence)
        work = self._residents.start(fence, request.spec_json)
        return pb.StartVmResponse(evidence=await self._node.run_to_end(work, "StartVm"))

    async def StopVm(self, request: pb.StopVmRequest, context: _Context) -> pb.StopVmResponse:  # noqa: N802, ARG002
        """End a VM that lives here."""
        work = self._residents.stop(read_fence(request.fence))
        return pb.StopVmResponse(evidence=await self._node.run_to_end(work, "StopVm"))

    async def Prepare(self, request: pb.PrepareRequest, context: _Context) -> pb.PrepareResponse:  # noqa: N802, ARG002
        """Make ready for a move."""
        fence, side = read_fence(request.fence), request.WhichOneof("side")
        if side == "departure":
            leaving = self._departures.prepare(fence, request.departure)
            return await self._node.run_to_end(leaving, "Prepare")
        if side == "arrival":
            work = self._arrivals.prepare(fence, request.arrival)
            evidence = await self._node.run_to_end(work, "Prepare")
            return pb.PrepareResponse(evidence=evidence, certificate_key=self._node.certificate_key)
        raise InvalidArgumentError("FIELD_INVALID", "side must be departure or arrival")

    async def Pause(self, request: pb.PauseRequest, context: _Context) -> pb.PauseResponse:  # noqa: N802, ARG002
        """Stop the vCPUs, freeze the image."""
        began_ns = time.monotonic_ns()
        fence = read_fence(request.fence)
        key = request.destination_key.hex()
        work = self._departures.pause(fence, request.transfer_to, key)
        evidence, done = await self._node.run_to_end(work, "Pause")
        return pb.PauseResponse(
            evidence=evidence,
            transferred=_transferred(done) if done else None,
            before_stop_ns=max(self._node.vm(fence.vm_id).stop_began_ns - began_ns, 0),
        )

    async def Resume(self, request: pb.ResumeRequest, context: _Context) -> pb.ResumeResponse:  # noqa: N802, ARG002
        """Let the guest run on here."""
        work = self._departures.resume(read_fence(request.fence))
        return pb.ResumeResponse(evidence=await self._node.run_to_end(work, "Resume"))

    async def TransferDeviceState(  # noqa: N802
        self,
        request: pb.TransferDeviceStateRequest,
        context: _Context,  # noqa: ARG002
    ) -> pb.TransferDeviceStateResponse:
        """Hand the device state over."""
        fence = read_fence(request.fence)
        work = self._departures.transfer(fence, request.destination_address)
        done = await self._node.run_to_end(work, "TransferDeviceState")
        return _transferred(done)

    async def LoadDeviceState(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.LoadDeviceStateRequest],
        context: _Context,  # noqa: ARG002
    ) -> pb.LoadDeviceStateResponse:
        """Take a device state."""
        return await self._node.run_to_end(self._arrivals.load(request_iterator), "LoadDeviceState")

    async def Activate(self, request: pb.ActivateRequest, context: _Context) -> pb.ActivateResponse:  # noqa: N802, ARG002
        """Let the guest run here."""
        began_ns = time.monotonic_ns()
        fence = read_fence(request.fence)
        work = self._arrivals.activate(fence)
        evidence = await self._node.run_to_end(work, "Activate")
        since_ns = self._node.vm(fence.vm_id).runs_since_ns
        return pb.ActivateResponse(
            evidence=evidence,
            after_run_ns=time.monotonic_ns() - since_ns if since_ns > began_ns else 0,
        )

    async def Seal(self, request: pb.SealRequest, context: _Context) -> pb.SealResponse:  # noqa: N802, ARG002
        """Make sure that the guest never runs here again."""
        work = self._departures.seal(read_fence(request.fence))
        return pb.SealResponse(evidence=await self._node.run_to_end(work, "Seal"))

    async def Abort(self, request: pb.AbortRequest, context: _Context) -> pb.AbortResponse:  # noqa: N802, ARG002
        """Take back."""
        fence = read_fence(request.fence)
        handlers = {
            pb.SIDE_SOURCE: self._departures.abort,
            pb.SIDE_DESTINATION: self._arrivals.abort,
        }
        handler = handlers.get(request.side)
        if handler is None:
            raise InvalidArgumentError("FIELD_INVALID", "side must be SOURCE or DESTINATION")
        return pb.AbortResponse(evidence=await self._node.run_to_end(handler(fence), "Abort"))

    async def Recall(self, request: pb.RecallRequest, context: _Context) -> pb.RecallResponse:  # noqa: N802, ARG002
        """Take a COMMITTED back."""
        fence = read_fence(request.fence)
        handlers = {
            pb.SIDE_SOURCE: self._departures.recall,
            pb.SIDE_DESTINATION: self._arrivals.recall,
        }
        handler = handlers.get(request.side)
        if handler is None:
            raise InvalidArgumentError("FIELD_INVALID", "side must be SOURCE or DESTINATION")
        return pb.RecallResponse(evidence=await self._node.run_to_end(handler(fence), "Recall"))

    async def Release(self, request: pb.ReleaseRequest, context: _Context) -> pb.ReleaseResponse:  # noqa: N802, ARG002
        """Free the source's memory, or end the destination's bookkeeping."""
        fence = read_fence(request.fence)
        if request.side == pb.SIDE_SOURCE:
            work = self._departures.release(fence, memory_complete=request.memory_complete)
        elif request.side == pb.SIDE_DESTINATION:
            work = self._arrivals.release(fence)
        else:
            raise InvalidArgumentError("FIELD_INVALID", "side must be SOURCE or DESTINATION")
        return pb.ReleaseResponse(evidence=await self._node.run_to_end(work, "Release"))

    async def WatchProgress(  # noqa: N802
        self,
        request: pb.WatchProgressRequest,
        context: _Context,  # noqa: ARG002
    ) -> AsyncIterator[pb.WatchProgressResponse]:
        """Stream how the memory arrives."""
        vm = self._node.peek(request.vm_id)
        async with contextlib.aclosing(
            watch_progress(vm, request.epoch, request.interval_ms)
        ) as steps:
            async for step in steps:
                yield step

    async def _capabilities(self) -> pb.Capabilities:
        node = self._node
        versions = {name: await driver.version() for name, driver in node.drivers.items()}
        found = {name: version for name, version in versions.items() if version}
        return pb.Capabilities(
            kernel_release=platform.release(),
            uffd_features=node.pagecore.uffd_features(),
            drivers=sorted(found),
            vmm_versions=found,
            memory_total_bytes=host.memory_total_bytes(),
            memory_available_bytes=host.memory_available_bytes(node.config.ram_dir),
        )


def _transferred(done: Transferred) -> pb.TransferDeviceStateResponse:
    return pb.TransferDeviceStateResponse(
        len_bytes=done.len_bytes,
        sha256=bytes.fromhex(done.sha256),
        save_ns=done.save_ns,
        load_ns=done.load_ns,
    )
