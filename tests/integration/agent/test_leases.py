# SPDX-License-Identifier: Apache-2.0
"""Promise: an agent gives no memory away twice, and none for ever; whoever commands it.

Real QEMUs, a real tmpfs that is too small for both guests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import FailedPreconditionError, ResourceExhaustedError
from services.common.vm_spec import VmSpec
from tests.harness import small_disk
from tests.integration.agent import nodes
from tests.integration.agent.nodes import Agent, CopyingPageCore, Host, Orders, running_agent

pytestmark = pytest.mark.requires("qemu", "root")

MakeSpec = Callable[..., VmSpec]
FIRST = Orders(vm_id="guest", epoch=2, migration_id="m1")
SECOND = Orders(vm_id="other", epoch=2, migration_id="m2")


@pytest.fixture
async def host_b(tmp_path: Path) -> AsyncIterator[Host]:
    """Room for one guest of 192 MiB and what is left spare, not for two."""
    with small_disk.mounted(tmp_path / "ram", "400M,huge=never") as ram:
        async with nodes.running_host("b", tmp_path / "hosts", ram) as host:
            yield host


@pytest.fixture
async def a(host_a: Host, core: CopyingPageCore, make_spec: MakeSpec) -> AsyncIterator[Agent]:
    """Two guests run here."""
    async with running_agent(host_a, core) as agent:
        await nodes.start_vm(agent, make_spec(), epoch=1)
        nic = {"mac": "52:54:00:12:34:57"}
        await nodes.start_vm(agent, make_spec("other", nics=(nic,)), epoch=1)
        yield agent


async def test_memory_that_is_promised_is_not_promised_again(
    a: Agent, host_b: Host, core: CopyingPageCore
) -> None:
    """Nothing of it is filled yet: the file system itself would have room for both."""
    async with running_agent(host_b, core) as b:
        said = await asyncio.gather(
            nodes.prepare(a, b, FIRST), nodes.prepare(a, b, SECOND), return_exceptions=True
        )
        [refused] = [each for each in said if isinstance(each, BaseException)]
        assert isinstance(refused, ResourceExhaustedError)
        assert refused.reason == "MEMORY_SHORT"
        came, left = (FIRST, SECOND) if said[1] is refused else (SECOND, FIRST)
    # It is the journal that promises it, not the process.
    async with running_agent(host_b, core) as b:
        with pytest.raises(ResourceExhaustedError, match="MEMORY_SHORT"):
            await nodes.prepare(a, b, left)
        # Taken back it is free again.
        await nodes.abort(b, came, pb.SIDE_DESTINATION)
        assert (await nodes.prepare(a, b, left)).epoch_prepared == left.epoch


async def test_what_nobody_asks_for_again_is_given_back(
    a: Agent, host_b: Host, core: CopyingPageCore
) -> None:
    """The orchestrator is dead for good: the lease is over, and the late command is refused."""
    async with running_agent(host_b, core, arrival_lease_s=0.3) as b:
        await nodes.prepare(a, b, FIRST)
        evidence = await nodes.describe(b, "guest")
        while evidence.role != pb.VM_ROLE_GONE:  # a test that hangs has failed
            await asyncio.sleep(0.05)
            evidence = await nodes.describe(b, "guest")
        assert evidence.vmm_state == pb.VMM_STATE_DEAD
        assert not list(host_b.ram_dir.glob("**/*.ram"))
        with pytest.raises(FailedPreconditionError, match="WRONG_STATE"):
            await nodes.activate(b, FIRST)
        assert (await nodes.prepare(a, b, SECOND)).epoch_prepared == SECOND.epoch


async def test_what_is_loaded_waits_for_the_decision(
    a: Agent, host_b: Host, core: CopyingPageCore
) -> None:
    """I8: past LOADED the store may have committed; no lease ends that."""
    async with running_agent(host_b, core) as b:
        await nodes.prepare(a, b, FIRST)
        await nodes.pause_and_transfer(a, b, FIRST)
    async with running_agent(host_b, core, arrival_lease_s=0.1) as b:
        for _ in range(20):  # ten leases
            await asyncio.sleep(0.05)
            assert (await nodes.describe(b, "guest")).role == pb.VM_ROLE_ARRIVING
        assert (await nodes.activate(b, FIRST)).vmm_state == pb.VMM_STATE_RUNNING
