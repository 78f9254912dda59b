# SPDX-License-Identifier: Apache-2.0
"""The process around a page core in memory: order at the start, reload, drain, exit status."""

from __future__ import annotations

import asyncio
import errno
import urllib.request
from pathlib import Path

import pytest
from godwit.common.v1 import common_pb2
from godwit.page.v1 import image_admin_service_pb2 as pb
from godwit.page.v1 import image_admin_service_pb2_grpc as pb_grpc

from services.common import grpc_client
from services.common.errors import UnavailableError
from services.common.lifecycle import ExitStatus
from services.page_server import main
from services.page_server.servicer import NAME
from services.pagecore.fake import FakePageCore, FakePageServer
from tests.unit.page_server.conftest import Node

BASE = ["--listen", "127.0.0.1:0", "--control", "127.0.0.1:0"]


def config_of(node: Node, *more: str) -> main.Config:
    return main.Config.from_argv([*BASE, "--images-dir", str(node.images_dir), *more])


async def test_reload_answers_what_is_in_force(node: Node) -> None:
    core = FakePageCore()
    ram = node.make_ram()
    node.write(node.fields(ram))
    async with (
        main.serving(config_of(node), core) as running,
        grpc_client.open_channel(str(running.control)) as channel,
    ):
        assert set(core.page_servers[0].images) == {"web.1"}
        node.write(node.fields(ram, state="frozen", generation=2))
        (node.images_dir / "bad.json").write_text("{")
        stub = pb_grpc.ImageAdminServiceStub(channel)
        answer = await grpc_client.call(
            channel, stub.ReloadImages, pb.ReloadImagesRequest(), timeout_s=10
        )
        assert [image.generation for image in answer.images] == [2]
        assert answer.images[0].state == common_pb2.IMAGE_STATE_FROZEN
        assert [refused.image_id for refused in answer.refused_images] == ["bad"]
        assert answer.page_address == str(running.page)
        text = await asyncio.to_thread(_get, f"http://{running.metrics}/metrics")
    assert 'godwit_page_server_images{state="frozen"} 1.0' in text
    assert 'godwit_page_server_pages_total{kind="demand"} 0.0' in text
    assert NAME == "godwit.page.v1.ImageAdminService"


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


async def test_nobody_is_answered_before_the_records_are_read(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A destination that reconnects to a restarted server must not hear IMAGE_UNKNOWN."""
    node.write(node.fields(node.make_ram()))
    images_at_start: list[set[str]] = []
    start = FakePageServer.start

    def note(server: FakePageServer) -> None:
        images_at_start.append(set(server.images))
        start(server)

    monkeypatch.setattr(FakePageServer, "start", note)
    async with main.serving(config_of(node), FakePageCore()):
        pass
    assert images_at_start == [{"web.1"}]


async def test_drain_waits_for_readers_of_frozen_images(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = asyncio.Event()

    async def reach(_point: str) -> bool:
        looked.set()
        return False

    monkeypatch.setattr("services.common.hooks.reach", reach)
    core = FakePageCore()
    node.write(node.fields(node.make_ram(), state="frozen"))
    async with main.serving(config_of(node), core) as running, asyncio.TaskGroup() as group:
        server = core.page_servers[0]
        server.streams["web.1"] = 2
        draining = group.create_task(main.drain(running, 600))
        for _look in range(2):
            looked.clear()
            await looked.wait()
        assert server.draining
        assert not draining.done()
        server.streams["web.1"] = 0
        assert await draining == ExitStatus.OK


async def test_drain_deadline_names_the_images(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    core = FakePageCore()
    node.write(node.fields(node.make_ram(), state="frozen"))
    async with main.serving(config_of(node), core) as running:
        core.page_servers[0].streams["web.1"] = 1
        assert await main.drain(running, 0.001) == ExitStatus.GUESTS_DEPEND
    assert "image web.1 has 1 streams" in caplog.text


async def test_an_idle_server_drains_at_once(node: Node) -> None:
    node.write(node.fields(node.make_ram(), state="frozen"))
    async with main.serving(config_of(node), FakePageCore()) as running:
        assert await main.drain(running, 600) == ExitStatus.OK


async def test_everything_is_closed(node: Node) -> None:
    core = FakePageCore()
    async with main.serving(config_of(node), core):
        assert not core.page_servers[0].closed
    assert core.page_servers[0].closed


async def test_a_taken_port_says_so(node: Node) -> None:
    core = FakePageCore()
    core.errors["create_page_server"] = errno.EADDRINUSE
    with pytest.raises(UnavailableError, match="LISTEN_FAILED"):
        async with main.serving(config_of(node), core):
            pass


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--listen", "0.0.0.0:1"], "LISTEN_NOT_LOOPBACK"),
        (["--control", "[::]:1"], "LISTEN_NOT_LOOPBACK"),
        (["--metrics", "192.0.2.1:1"], "LISTEN_NOT_LOOPBACK"),
        (["--listen", "here"], "ADDRESS_INVALID"),
        (["--drain-s", "0"], "--drain-s"),
        (["--drain-s", "nan"], "--drain-s"),
        (["--connections-max", "0"], "--connections-max"),
    ],
)
def test_bad_configuration_exits_2_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.Config.from_argv([*BASE, "--images-dir", str(tmp_path), *argv])
    assert caught.value.code == ExitStatus.BAD_CONFIG
    assert named in capsys.readouterr().err


def test_the_flag_allows_other_addresses(node: Node) -> None:
    config = config_of(node, "--listen", "0.0.0.0:7443", "--insecure-plaintext")
    assert str(config.listen) == "0.0.0.0:7443"
