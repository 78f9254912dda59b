# SPDX-License-Identifier: Apache-2.0
"""The agent as a process: what it prints, how it ends, and that its guests do not end with it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import httpx
import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.agent.v1 import fault_agent_service_pb2_grpc
from godwit.common.v1 import common_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common import grpc_client
from services.common.vm_spec import VmSpec
from services.fault_agent import journal, processes
from tests.harness.console import Console
from tests.integration.agent.nodes import Host

MakeSpec = Callable[..., VmSpec]


class AgentProcess:
    """A running `python -m services.fault_agent`."""

    def __init__(self, process: asyncio.subprocess.Process, line: str) -> None:
        self.process = process
        self.addresses = dict(word.split("=", 1) for word in line.split()[1:])

    async def end(self, number: signal.Signals) -> int:
        """Send a signal and wait."""
        self.process.send_signal(number)
        return await self.process.wait()


def arguments(host: Host, *more: str) -> list[str]:
    """Of an agent on this host."""
    return [
        *(sys.executable, "-m", "services.fault_agent", "--node", host.name),
        *("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"),
        *("--state-dir", str(host.directory), "--ram-dir", str(host.ram_dir)),
        *("--images-dir", str(host.images_dir), "--page-server-control", host.control),
        *more,
    ]


@contextlib.asynccontextmanager
async def running(host: Host, *more: str) -> AsyncIterator[AgentProcess]:
    """Start one; it is ended if the test has not."""
    process = await asyncio.create_subprocess_exec(
        *arguments(host, *more), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    try:
        assert line.startswith("listening grpc=127.0.0.1:"), line
        yield AgentProcess(process, line)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def start_guest(agent: AgentProcess, spec: VmSpec) -> None:
    """StartVm, epoch 1."""
    async with grpc_client.open_channel(agent.addresses["grpc"]) as channel:
        stub = fault_agent_service_pb2_grpc.FaultAgentServiceStub(channel)
        request = pb.StartVmRequest(
            fence=common_pb2.Fence(vm_id=spec.vm_id, epoch=1), spec_json=spec.canonical_json()
        )
        await grpc_client.call(channel, stub.StartVm, request, timeout_s=60)


async def test_it_serves_health_reflection_and_metrics(host_a: Host) -> None:
    async with running(host_a) as agent:
        async with grpc.aio.insecure_channel(agent.addresses["grpc"]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(
                health_pb2.HealthCheckRequest(service="godwit.agent.v1.FaultAgentService")
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"http://{agent.addresses['metrics']}/metrics")).text
        assert 'godwit_agent_vms{role="resident"} 0.0' in text
        assert "godwit_invariant_violations" in text
        assert await agent.end(signal.SIGTERM) == 0


@pytest.mark.requires("qemu")
async def test_its_guests_do_not_end_with_it(host_a: Host, make_spec: MakeSpec) -> None:
    """However it ends; and the next one holds them again."""
    path = host_a.directory / "vms/guest" / journal.FILE
    console = Console(path.parent / "console-1.log")
    async with running(host_a) as agent:
        await start_guest(agent, make_spec())
        await console.wait_beat(5)
        await agent.end(signal.SIGTERM)
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = journal.read(path).process
        assert process is not None
        assert processes.is_alive(process)
        await console.wait_beat(console.last_beat() + 20)
        async with running(host_a) as agent:
            assert await vmm_state(agent) == pb.VMM_STATE_RUNNING
            await agent.end(number)
    assert console.errors() == []


async def vmm_state(agent: AgentProcess) -> int:
    """Of the guest."""
    async with grpc_client.open_channel(agent.addresses["grpc"]) as channel:
        stub = fault_agent_service_pb2_grpc.FaultAgentServiceStub(channel)
        request = pb.DescribeRequest(vm_id="guest")
        answer = await grpc_client.call(channel, stub.Describe, request, timeout_s=10)
    return answer.evidence.vmm_state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--listen", "0.0.0.0:0"], "LISTEN_NOT_LOOPBACK"),
        (["--listen", "nowhere"], "ADDRESS_INVALID"),
        (["--node", "Not A Name"], "--node"),
        (["--drain-s", "0"], "--drain-s"),
        (["--orchestrator", "nowhere"], "ADDRESS_INVALID"),
    ],
)
async def test_a_bad_command_line_is_refused(host_a: Host, change: list[str], words: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *arguments(host_a, *change), stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert words in errors.decode()


async def test_a_second_agent_on_the_same_state_is_refused(host_a: Host) -> None:
    async with running(host_a):
        process = await asyncio.create_subprocess_exec(
            *arguments(host_a), stderr=asyncio.subprocess.PIPE
        )
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert "STATE_DIR_LOCKED" in errors.decode()
