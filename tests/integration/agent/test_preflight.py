# SPDX-License-Identifier: Apache-2.0
"""Preflight on a real node: everything passes, and each thing that is wrong fails one check."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common import grpc_client
from services.common.errors import GodwitError
from services.common.vm_spec import VmSpec
from services.demo.guest_image import make_disk
from tests.integration.agent import nodes
from tests.integration.agent.nodes import Agent, CopyingPageCore, Host, Orders, running_agent

pytestmark = pytest.mark.requires("qemu")

MakeSpec = Callable[..., VmSpec]


@pytest.fixture
async def a(host_a: Host, core: CopyingPageCore) -> AsyncIterator[Agent]:
    """The source's agent."""
    async with running_agent(host_a, core) as agent:
        yield agent


@pytest.fixture
async def b(host_b: Host, core: CopyingPageCore) -> AsyncIterator[Agent]:
    """The destination's agent."""
    async with running_agent(host_b, core) as agent:
        yield agent


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk on storage that both nodes share."""
    path = tmp_path / "disk.raw"
    make_disk(path, mib=1)
    return path


async def failed(agent: Agent, spec: VmSpec, side: pb.Side.ValueType) -> list[str]:
    """Names of the checks that did not pass; each says what to do."""
    peer = pb.Capabilities(
        vmm_versions={"qemu": await agent.serving.node.drivers["qemu"].version()}
    )
    request = pb.PreflightRequest(
        side=side, vm_id=spec.vm_id, spec_json=spec.canonical_json(), peer_capabilities=peer
    )
    answer = await grpc_client.call(agent.channel, agent.stub.Preflight, request, timeout_s=60)
    assert all(check.reason and (check.passed or check.hint) for check in answer.checks)
    assert len(answer.checks) > 5 or not answer.checks[0].passed
    return [check.check for check in answer.checks if not check.passed]


def move_away(path: Path, target: Path) -> None:
    """Leave another, empty file under its name."""
    path.rename(target)
    path.touch()


async def test_a_guest_that_can_go(a: Agent, b: Agent, disk: Path, make_spec: MakeSpec) -> None:
    spec = make_spec(disks=({"path": str(disk)},))
    await nodes.start_vm(a, spec, epoch=1)
    assert await failed(a, spec, pb.SIDE_SOURCE) == []
    assert await failed(b, spec, pb.SIDE_DESTINATION) == []
    assert await failed(a, spec, pb.SIDE_DESTINATION) == ["vm-absent"]
    assert await failed(b, spec, pb.SIDE_SOURCE) == ["vm-resident"]
    # Nothing was changed by asking.
    assert (await nodes.describe(b, "guest")).role == pb.VM_ROLE_UNKNOWN


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"kernel": "/nonexistent"}, "files-present"),
        ({"initrd": "relative"}, "files-present"),
        ({"memory_bytes": 8 << 40}, "memory"),
        ({"extra_devices": ("vfio-pci,host=0",)}, "devices-movable"),
        (
            {"nics": ({"mac": "52:54:00:00:00:01", "tap": {"bridge": "none-such"}},)},
            "tap-bridge",
        ),
        (
            {
                "nics": (
                    {
                        "mac": "52:54:00:00:00:01",
                        "tap": {"bridge": "br0", "netns": "none-such"},
                    },
                )
            },
            "tap-bridge",
        ),
    ],
)
async def test_each_thing_that_is_wrong_fails_one_check(
    b: Agent, make_spec: MakeSpec, change: dict[str, object], expected: str
) -> None:
    assert await failed(b, make_spec(**change), pb.SIDE_DESTINATION) == [expected]


async def test_a_disk_that_is_not_shared(
    a: Agent, b: Agent, disk: Path, tmp_path: Path, make_spec: MakeSpec
) -> None:
    """A copy under the same path is what a node without the shared storage would have."""
    spec = make_spec(disks=({"path": str(disk)},))
    await nodes.start_vm(a, spec, epoch=1)
    move_away(disk, tmp_path / "the-source-has-this-one")
    make_disk(disk, mib=1)
    assert await failed(b, spec, pb.SIDE_DESTINATION) == ["disk-shared"]
    orders = Orders(vm_id="guest", epoch=2, migration_id="m2")
    with pytest.raises(GodwitError, match="disk-shared") as refusal:
        await nodes.prepare(a, b, orders)
    assert refusal.value.reason == "PREFLIGHT_FAILED"
    await asyncio.to_thread(disk.unlink)
    assert await failed(b, spec, pb.SIDE_DESTINATION) == [
        "files-present",
        "disk-direct-io",
        "disk-shared",
    ]


@pytest.mark.parametrize("feature", ["missing-shmem", "event-remove"])
async def test_a_kernel_without_a_feature(
    b: Agent, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, feature: str
) -> None:
    monkeypatch.setenv("GODWIT_MASK_UFFD_FEATURES", feature)
    assert await failed(b, make_spec(), pb.SIDE_DESTINATION) == ["uffd-features"]


async def test_another_qemu_at_the_source(b: Agent, make_spec: MakeSpec) -> None:
    spec = make_spec()
    request = pb.PreflightRequest(
        side=pb.SIDE_DESTINATION,
        vm_id="guest",
        spec_json=spec.canonical_json(),
        peer_capabilities=pb.Capabilities(vmm_versions={"qemu": "6.0.0"}),
    )
    answer = await grpc_client.call(b.channel, b.stub.Preflight, request, timeout_s=60)
    assert [check.check for check in answer.checks if not check.passed] == ["vmm-version"]


async def test_a_guest_that_is_not_running_stays(a: Agent, make_spec: MakeSpec) -> None:
    spec = make_spec()
    await nodes.start_vm(a, spec, epoch=1)
    vmm = a.serving.node.vm("guest").vmm
    assert vmm is not None
    await vmm.pause()
    assert await failed(a, spec, pb.SIDE_SOURCE) == ["vm-running"]


async def test_memory_behind_another_file_stays(a: Agent, make_spec: MakeSpec) -> None:
    spec = make_spec()
    await nodes.start_vm(a, spec, epoch=1)
    path = Path(a.serving.node.vm("guest").record.ram_path)
    move_away(path, path.with_suffix(".moved"))
    assert await failed(a, spec, pb.SIDE_SOURCE) == ["ram-shared-file"]


async def test_a_page_server_that_is_not_there(
    host_a: Host, core: CopyingPageCore, make_spec: MakeSpec
) -> None:
    spec = make_spec()
    host_a.control = "127.0.0.1:1"
    async with running_agent(host_a, core) as agent:
        await nodes.start_vm(agent, spec, epoch=1)
        assert await failed(agent, spec, pb.SIDE_SOURCE) == ["page-server"]
