# SPDX-License-Identifier: Apache-2.0
"""The device plugin's process against a kubelet's half of the protocol, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from godwit.kubelet.v1beta1 import device_plugin_pb2 as pb
from godwit.kubelet.v1beta1 import device_plugin_pb2_grpc as pb_grpc

from services.common.lifecycle import ExitStatus
from services.device_plugin.main import Config

SHARES = 5


class Kubelet(pb_grpc.RegistrationServicer):
    """What a kubelet does with plugins: takes registrations, and watches who registered."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.registered: asyncio.Queue[pb.RegisterRequest] = asyncio.Queue()
        self.refusals = 0

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.Empty:  # noqa: N802
        if self.refusals:
            self.refusals -= 1
            await context.abort(grpc.StatusCode.INTERNAL, "not now")
        self.registered.put_nowait(request)
        return pb.Empty()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """From a start to an end; a start removes every socket, as the real one's does."""
        for path in self.directory.iterdir():
            path.unlink()
        server = grpc.aio.server()
        pb_grpc.add_RegistrationServicer_to_server(self, server)
        server.add_insecure_port(f"unix:{self.directory / 'kubelet.sock'}")
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)

    async def both(self) -> dict[str, pb.RegisterRequest]:
        """The next registration of each of the two resources."""
        found: dict[str, pb.RegisterRequest] = {}
        while len(found) < 2:
            request = await self.registered.get()
            found[request.resource_name] = request
        return found

    @contextlib.asynccontextmanager
    async def plugin(self, request: pb.RegisterRequest) -> AsyncIterator[Any]:
        """Call the plugin that registered."""
        assert request.version == "v1beta1"
        target = f"unix:{self.directory / request.endpoint}"
        async with grpc.aio.insecure_channel(target) as channel:
            yield pb_grpc.DevicePluginStub(channel)


@pytest.fixture
def kubelet(tmp_path: Path) -> Kubelet:
    (tmp_path / "plugins").mkdir()
    return Kubelet(tmp_path / "plugins")


@pytest.fixture
def process(kubelet: Kubelet, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """With devices that every machine has, under the names that it may lack."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "kvm").symlink_to("/dev/null")
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "services.device_plugin", f"--kubelet-dir={kubelet.directory}"),
            *(f"--dev-dir={tmp_path / 'dev'}", f"--shares={SHARES}"),
            *("--device=godwit.io/kvm=kvm", "--device=godwit.io/userfaultfd=userfaultfd"),
        ]
    ) as process:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait() == ExitStatus.OK


async def test_a_kubelet_gives_devices_to_containers(
    kubelet: Kubelet, process: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    async with kubelet.running():
        found = await kubelet.both()
        assert found.keys() == {"godwit.io/kvm", "godwit.io/userfaultfd"}
        async with kubelet.plugin(found["godwit.io/kvm"]) as stub:
            options = await stub.GetDevicePluginOptions(pb.Empty())
            assert not options.pre_start_required
            assert not options.get_preferred_allocation_available
            watch = stub.ListAndWatch(pb.Empty())
            listed = await watch.read()
            assert [each.health for each in listed.devices] == ["Healthy"] * SHARES
            assert len({each.ID for each in listed.devices}) == SHARES
            asked = pb.AllocateRequest(
                container_requests=[
                    pb.ContainerAllocateRequest(devices_ids=[listed.devices[0].ID]),
                    pb.ContainerAllocateRequest(
                        devices_ids=[listed.devices[1].ID, listed.devices[2].ID]
                    ),
                ]
            )
            given = await stub.Allocate(asked)
            wanted = pb.DeviceSpec(
                container_path="/dev/kvm", host_path="/dev/kvm", permissions="rw"
            )
            assert [list(each.devices) for each in given.container_responses] == [[wanted]] * 2
            # The device goes, and comes again: the module is unloaded, and loaded.
            (tmp_path / "dev" / "kvm").unlink()
            listed = await watch.read()
            assert [each.health for each in listed.devices] == ["Unhealthy"] * SHARES
            (tmp_path / "dev" / "kvm").symlink_to("/dev/null")
            listed = await watch.read()
            assert [each.health for each in listed.devices] == ["Healthy"] * SHARES
            watch.cancel()


async def test_a_device_that_is_not_there_is_not_given_out(
    kubelet: Kubelet, process: subprocess.Popen[bytes]
) -> None:
    async with kubelet.running():
        found = await kubelet.both()
        async with kubelet.plugin(found["godwit.io/userfaultfd"]) as stub:
            watch = stub.ListAndWatch(pb.Empty())
            listed = await watch.read()
            assert [each.health for each in listed.devices] == ["Unhealthy"] * SHARES
            watch.cancel()


async def test_a_kubelet_that_was_started_again_is_registered_at_again(
    kubelet: Kubelet, process: subprocess.Popen[bytes]
) -> None:
    """It has removed the plugins' sockets, and knows none of them any more."""
    async with kubelet.running():
        first = await kubelet.both()
    async with kubelet.running():
        second = await kubelet.both()
        assert second == first
        async with kubelet.plugin(second["godwit.io/kvm"]) as stub:
            watch = stub.ListAndWatch(pb.Empty())
            assert len((await watch.read()).devices) == SHARES
            watch.cancel()


async def test_a_kubelet_that_refuses_is_asked_again(
    kubelet: Kubelet, process: subprocess.Popen[bytes]
) -> None:
    kubelet.refusals = 3
    async with kubelet.running():
        assert len(await kubelet.both()) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--device=kvm"],
        ["--device=godwit.io/kvm"],
        ["--device=godwit.io/kvm=../etc/shadow"],
        ["--device=godwit.io/kvm=a/../../etc"],
        ["--device=godwit.io/kvm=/etc/shadow"],
        ["--device=godwit.io/kvm=kvm", "--device=godwit.io/kvm=null"],
        ["--device=godwit.io/kvm=kvm", "--shares=0"],
        ["--device=godwit.io/kvm=kvm", "--kubelet-dir=/nowhere"],
        [],
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        Config.from_argv([f"--kubelet-dir={tmp_path}", *arguments])
    assert raised.value.code == ExitStatus.BAD_CONFIG
