# SPDX-License-Identifier: Apache-2.0
"""An agent dies at every step; the next one knows what is true and goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb
from godwit.common.v1 import common_pb2

from services.common.errors import FailedPreconditionError, GodwitError
from services.common.vm_spec import VmSpec
from services.fault_agent import journal, journal_file, processes
from services.fault_agent.journal import Role
from tests.harness.console import Console
from tests.integration.agent import nodes
from tests.integration.agent.nodes import Agent, CopyingPageCore, Host, Orders, running_agent

pytestmark = pytest.mark.requires("qemu")

MakeSpec = Callable[..., VmSpec]
ORDERS = Orders(vm_id="guest", epoch=2, migration_id="m2")


@pytest.fixture
async def a(host_a: Host, core: CopyingPageCore) -> AsyncIterator[Agent]:
    """The source's agent, which lives on."""
    async with running_agent(host_a, core) as agent:
        yield agent


async def to_paused(a: Agent, b: Agent, spec: VmSpec, *, booted: bool = False) -> None:
    """Up to the pause; only a guest that has booted has heartbeats to be counted."""
    await nodes.start_vm(a, spec, epoch=1)
    if booted:
        await Console(a.vm_dir("guest") / "console-1.log").wait_beat(5)
    await nodes.prepare(a, b, ORDERS)
    await nodes.pause(a, ORDERS)


async def test_a_resident_is_held_again(
    host_a: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    async with running_agent(host_a, core) as agent:
        await nodes.start_vm(agent, make_spec(), epoch=1)
        before = await nodes.describe(agent, "guest")
    async with running_agent(host_a, core) as agent:
        after = await nodes.describe(agent, "guest")
        assert before.incarnation != after.incarnation
        after.incarnation = before.incarnation
        assert after == before


async def test_two_agents_on_one_journal_are_one_too_many(
    host_a: Host, core: CopyingPageCore
) -> None:
    async with running_agent(host_a, core):
        with pytest.raises(FailedPreconditionError, match="another agent") as refusal:
            async with running_agent(host_a, core):
                pass
        assert refusal.value.reason == "STATE_DIR_LOCKED"


async def test_the_source_agent_dies_while_the_guest_is_paused(
    host_a: Host, host_b: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    """The image is published again as FROZEN, and both ends of the decision are still open."""
    async with running_agent(host_b, core) as b:
        async with running_agent(host_a, core) as a:
            await to_paused(a, b, make_spec())
            before = await nodes.describe(a, "guest")
            for path in host_a.images_dir.glob("*.json"):
                path.unlink()
        async with running_agent(host_a, core) as a:
            after = await nodes.describe(a, "guest")
            assert (after.role, after.vmm_state) == (pb.VM_ROLE_DEPARTING, pb.VMM_STATE_PAUSED)
            assert after.image == before.image
            assert len(list(host_a.images_dir.glob("*.json"))) == 1
            await nodes.transfer(a, b, ORDERS)
            await nodes.activate(b, ORDERS)
            await nodes.seal(a, ORDERS)
            assert (await nodes.describe(b, "guest")).vmm_state == pb.VMM_STATE_RUNNING


async def test_the_source_agent_dies_after_the_transfer_and_is_asked_again(
    host_a: Host, host_b: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    """The state was saved and loaded, the answer lost: the destination's LOADED is the answer."""
    async with running_agent(host_b, core) as b:
        async with running_agent(host_a, core) as a:
            await to_paused(a, b, make_spec(), booted=True)
            await nodes.transfer(a, b, ORDERS)
        async with running_agent(host_a, core) as a:
            await nodes.transfer(a, b, ORDERS)
            console = Console(a.vm_dir("guest") / "console-1.log")
            last = console.last_beat()
            await nodes.abort(b, ORDERS, pb.SIDE_DESTINATION)
            await nodes.resume(a, ORDERS, epoch=3)
            await console.wait_beat(last + 10)
            assert console.errors() == []


async def test_a_seal_begun_is_ended_by_the_next_agent(
    host_a: Host,
    host_b: Host,
    core: CopyingPageCore,
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SEALED is durable, the VMM lives: it is killed, never resumed."""
    async with running_agent(host_b, core) as b:
        async with running_agent(host_a, core) as a:
            await to_paused(a, b, make_spec())
            await nodes.transfer(a, b, ORDERS)
            monkeypatch.setenv("GODWIT_HOOKS_DIR", str(tmp_path))
            (tmp_path / "agent.seal.before_kill.fail").touch()
            with pytest.raises(GodwitError):
                await nodes.seal(a, ORDERS)
            process = a.serving.node.vm("guest").record.process
            assert process is not None
            assert processes.is_alive(process)
        async with running_agent(host_a, core) as a:
            assert not processes.is_alive(process)
            evidence = await nodes.describe(a, "guest")
            assert (evidence.role, evidence.epoch_sealed) == (pb.VM_ROLE_SEALED, 2)
            assert evidence.image.state == common_pb2.IMAGE_STATE_FROZEN
            with pytest.raises(GodwitError, match=r"WRONG_STATE|DECISION_CONFLICT"):
                await nodes.resume(a, ORDERS, epoch=3)


async def test_an_arrival_that_was_never_prepared_is_taken_back(
    a: Agent,
    host_b: Host,
    core: CopyingPageCore,
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await nodes.start_vm(a, make_spec(), epoch=1)
    monkeypatch.setenv("GODWIT_HOOKS_DIR", str(tmp_path))
    hold = tmp_path / "agent.prepare.before_prepared.hold"
    hold.touch()
    path = host_b.directory / "vms/guest" / journal.FILE
    async with running_agent(host_b, core) as b:
        async with asyncio.TaskGroup() as group:
            group.create_task(nodes.prepare(a, b, ORDERS))
            while not hold.with_suffix(".reached").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            record = path.read_bytes()
            hold.unlink()
        process = b.serving.node.vm("guest").record.process
    assert process is not None
    # As kill -9 at that point would have left it.
    path.write_bytes(record)
    async with running_agent(host_b, core) as b:
        evidence = await nodes.describe(b, "guest")
        assert (evidence.role, evidence.vmm_state) == (pb.VM_ROLE_GONE, pb.VMM_STATE_DEAD)
        assert not processes.is_alive(process)
        assert list(host_b.ram_dir.iterdir()) == []
        # The same order given again is obeyed.
        assert (await nodes.prepare(a, b, ORDERS)).epoch_prepared == 2


async def test_a_spawn_that_was_never_journaled_is_found(
    host_a: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    async with running_agent(host_a, core) as agent:
        await nodes.start_vm(agent, make_spec(), epoch=1)
        process = agent.serving.node.vm("guest").record.process
    assert process is not None
    path = host_a.directory / "vms/guest" / journal.FILE
    journal_file.create(path, journal.encode(replace(journal.read(path), process=None)))
    async with running_agent(host_a, core) as agent:
        assert not processes.is_alive(process)
        assert (await nodes.describe(agent, "guest")).vmm_state == pb.VMM_STATE_DEAD


async def test_the_destination_agent_dies_when_loaded(
    a: Agent, host_b: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    async with running_agent(host_b, core) as b:
        await to_paused(a, b, make_spec(), booted=True)
        await nodes.transfer(a, b, ORDERS)
    async with running_agent(host_b, core) as b:
        evidence = await nodes.describe(b, "guest")
        assert (evidence.role, evidence.epoch_loaded) == (pb.VM_ROLE_ARRIVING, 2)
        assert evidence.vmm_state == pb.VMM_STATE_PAUSED
        await nodes.activate(b, ORDERS)
        await nodes.seal(a, ORDERS)
        await nodes.wait_phase(b, ORDERS, pb.ARRIVAL_PHASE_COMPLETE)
        left = Console(a.vm_dir("guest") / "console-1.log")
        console = Console(b.vm_dir("guest") / "console-2.log")
        await console.wait_beat(left.last_beat() + 20)
        assert console.follows(left)
        assert console.errors() == []


@pytest.mark.parametrize("point", ["after_activating", "after_cont"])
async def test_the_destination_agent_dies_around_cont(
    a: Agent,
    host_b: Host,
    core: CopyingPageCore,
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
) -> None:
    """ACTIVATING is durable: no Abort any more; the same Activate again ends it."""
    core.complete_at_once = False
    async with running_agent(host_b, core) as b:
        await to_paused(a, b, make_spec())
        await nodes.transfer(a, b, ORDERS)
        monkeypatch.setenv("GODWIT_HOOKS_DIR", str(tmp_path))
        (tmp_path / f"agent.activate.{point}.fail").touch()
        with pytest.raises(GodwitError):
            await nodes.activate(b, ORDERS)
    async with running_agent(host_b, core) as b:
        evidence = await nodes.describe(b, "guest")
        assert evidence.epoch_activating == 2
        ran = point == "after_cont"
        assert evidence.role == (pb.VM_ROLE_ARRIVED if ran else pb.VM_ROLE_ARRIVING)
        state = pb.VMM_STATE_RUNNING if ran else pb.VMM_STATE_PAUSED
        assert evidence.vmm_state == state
        with pytest.raises(GodwitError, match=r"WRONG_STATE|DECISION_CONFLICT"):
            await nodes.abort(b, ORDERS, pb.SIDE_DESTINATION)
        activated = await nodes.activate(b, ORDERS)
        assert (activated.role, activated.vmm_state) == (
            pb.VM_ROLE_ARRIVED,
            pb.VMM_STATE_RUNNING,
        )
        assert core.arrivals[-1].config.adopt
        while not core.arrivals[-1].bulk_started:  # noqa: ASYNC110 - a moment after `cont`
            await asyncio.sleep(0.01)
        core.arrivals[-1].install_all()
        await nodes.wait_phase(b, ORDERS, pb.ARRIVAL_PHASE_COMPLETE)
    # And once more, after everything is here: nothing is left to take up.
    async with running_agent(host_b, core) as b:
        complete = await nodes.wait_phase(b, ORDERS, pb.ARRIVAL_PHASE_COMPLETE)
        assert complete.counters.bulk_page_count == complete.counters.page_count > 0
        await nodes.seal(a, ORDERS)
        await nodes.release(a, ORDERS, pb.SIDE_SOURCE)
        await nodes.release(b, ORDERS, pb.SIDE_DESTINATION)
        assert [path.suffix for path in host_b.ram_dir.iterdir()] == [".ram"]


async def test_after_a_reboot_nothing_runs_by_itself(
    host_a: Host,
    core: CopyingPageCore,
    make_spec: MakeSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The record's memory went with the last boot. Only a start from nothing is obeyed."""
    async with running_agent(host_a, core) as agent:
        await nodes.start_vm(agent, make_spec(), epoch=1)
    await nodes.kill_vmms(host_a)
    monkeypatch.setattr(processes, "boot_id", lambda: "another-boot")
    async with running_agent(host_a, core) as agent:
        evidence = await nodes.describe(agent, "guest")
        assert (evidence.role, evidence.vmm_state) == (pb.VM_ROLE_RESIDENT, pb.VMM_STATE_DEAD)
        with pytest.raises(GodwitError, match="NODE_REBOOTED"):
            await nodes.resume(agent, Orders(vm_id="guest", epoch=5, migration_id="m"), epoch=5)
        with pytest.raises(GodwitError, match="NODE_REBOOTED"):
            await nodes.prepare(agent, agent, Orders(vm_id="guest", epoch=6, migration_id="m6"))
        started = await nodes.start_vm(agent, make_spec(), epoch=7)
        assert started.vmm_state == pb.VMM_STATE_RUNNING


async def test_a_corrupt_journal_closes_one_vm_and_no_other(
    host_a: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    async with running_agent(host_a, core) as agent:
        await nodes.start_vm(agent, make_spec("one"), epoch=1)
        await nodes.start_vm(agent, make_spec("two"), epoch=1)
        process = agent.serving.node.vm("one").record.process
    path = host_a.directory / "vms/one" / journal.FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    async with running_agent(host_a, core) as agent:
        with pytest.raises(GodwitError, match="JOURNAL_CORRUPT"):
            await nodes.describe(agent, "one")
        with pytest.raises(GodwitError, match="JOURNAL_CORRUPT"):
            await nodes.start_vm(agent, make_spec("one"), epoch=9)
        assert (await nodes.describe(agent, "two")).vmm_state == pb.VMM_STATE_RUNNING
        assert process is not None
        assert processes.is_alive(process), "what is not known is left alone"
        assert [vm.record.role for vm in agent.serving.node.known_vms()] == [Role.RESIDENT]
    path.write_bytes(whole)
