# SPDX-License-Identifier: Apache-2.0
"""A page server as it is deployed: its own process, the native core, a client on grpcio.

Promises: what is read is what the RAM file has; a withdrawn or superseded image is refused; SIGTERM
finishes what is under way; kill -9 costs a reconnect; Python is not on the page path.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from godwit.common.v1 import common_pb2
from godwit.page.v1 import page_service_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common import grpc_client
from services.common.lifecycle import ExitStatus
from tests.harness.page_client import PageClient
from tests.harness.page_server import PAGE, PageNode, Process, page_node, pattern, reload

PAGE_COUNT = 1024
HOLES = range(100, 900)
CONTENT = pattern(PAGE_COUNT, holes=HOLES)
GIL_TICKS_MAX = 3
EPOCH = 8
"""The destination's: above the image's."""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[PageNode]:
    with page_node(tmp_path) as node:
        yield node


async def until(condition: Callable[[], bool]) -> None:
    """Wait for another process; the test's own time limit ends what never comes."""
    while not condition():  # noqa: ASYNC110 - another process makes it true
        await asyncio.sleep(0.005)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    return grpc_client.to_error(error).reason


@contextlib.asynccontextmanager
async def refused(code: grpc.StatusCode, reason: str = "") -> AsyncIterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() == code
    assert reason in (caught.value.details() or "") or reason == reason_of(caught.value)


async def test_every_page_is_read_as_it_is(node: PageNode) -> None:
    """On both lanes, in wants of several sizes; holes stay holes in the source."""
    ram = node.make_ram(CONTENT)
    node.write_record(ram)
    blocks = ram.stat().st_blocks
    with node.process() as process:
        async with PageClient(process.page) as client:
            described = await client.describe("web.1")
            extents = [(item.offset_bytes, item.len_bytes) for item in described.data_extents]
            assert extents == [(0, 100 * PAGE), (900 * PAGE, 124 * PAGE)]
            for lane, step in ((pb.LANE_DEMAND, 7 * PAGE), (pb.LANE_BULK, 1 << 20)):
                got = b""
                async with client.fetch("web.1", epoch=EPOCH, lane=lane) as fetch:
                    assert fetch.ready.image == described.image
                    for offset in range(0, len(CONTENT), step):
                        len_bytes = min(step, len(CONTENT) - offset)
                        got += await fetch.read(offset, len_bytes, generation=1)
                assert got == CONTENT
        text = await asyncio.to_thread(_get, f"http://{process.metrics}/metrics")
    assert ram.stat().st_blocks == blocks, "reading has inflated the source"
    sent = {
        kind: float(value) for kind, value in re.findall(r'pages_total\{kind="(\w+)"\} (\S+)', text)
    }
    assert sent["demand"] > 0
    assert sent["bulk"] > 0
    assert sent["zero"] >= len(HOLES)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


async def test_images_come_and_go_by_reload(node: PageNode) -> None:
    with node.process() as process:
        async with PageClient(process.page) as client:
            async with refused(grpc.StatusCode.NOT_FOUND, "IMAGE_UNKNOWN"):
                await client.describe("web.1")
            fields = node.write_record(node.make_ram(CONTENT))
            (node.images_dir / "bad.json").write_text("{")
            answer = await reload(process.control)
            assert answer.page_address == process.page
            assert [image.image_id for image in answer.images] == ["web.1"]
            assert answer.images[0].inode == fields["inode"]
            assert [item.image_id for item in answer.refused_images] == ["bad"]
            async with client.fetch("web.1", epoch=EPOCH) as fetch:
                assert await fetch.read(0, generation=1) == CONTENT[:PAGE]
                (node.images_dir / "web.1.json").unlink()
                assert not (await reload(process.control)).images
                assert (await fetch.end()).code() == grpc.StatusCode.NOT_FOUND
            async with refused(grpc.StatusCode.NOT_FOUND, "IMAGE_UNKNOWN"):
                await client.describe("web.1")


async def test_a_new_generation_refuses_old_wants(node: PageNode) -> None:
    """Thawed and frozen again: what the destination was told before is not true any more."""
    ram = node.make_ram(CONTENT)
    node.write_record(ram, state="live", generation=1)
    with node.process() as process:
        async with PageClient(process.page) as client:
            async with client.fetch("web.1", epoch=EPOCH) as fetch:
                assert fetch.ready.image.state == common_pb2.IMAGE_STATE_LIVE
                assert await fetch.read(0, generation=1, final=False) == CONTENT[:PAGE]
                node.write_record(ram, state="frozen", generation=2)
                await reload(process.control)
                assert await fetch.read(PAGE, generation=2) == CONTENT[PAGE : 2 * PAGE]
            async with refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_GENERATION"):
                await _read_once(client, generation=1)


async def _read_once(client: PageClient, *, generation: int, epoch: int = EPOCH) -> bytes:
    """One page by a stream of its own."""
    async with client.fetch("web.1", epoch=epoch) as fetch:
        return await fetch.read(0, generation=generation)


async def test_an_epoch_that_is_not_above_the_images_is_refused(node: PageNode) -> None:
    node.write_record(node.make_ram(CONTENT), epoch=EPOCH)
    with node.process() as process:
        async with (
            PageClient(process.page) as client,
            refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH"),
        ):
            await _read_once(client, generation=1, epoch=EPOCH)


async def test_sigterm_finishes_what_is_under_way(node: PageNode) -> None:
    """NOT_SERVING, nothing new, the open stream to its end, then exit 0."""
    node.write_record(node.make_ram(CONTENT))
    with node.process() as process:
        async with (
            PageClient(process.page) as client,
            grpc_client.open_channel(process.control) as channel,
        ):
            health: Any = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            async with client.fetch("web.1", epoch=EPOCH) as fetch:
                assert await fetch.read(0, generation=1) == CONTENT[:PAGE]
                process.term()
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                await until((node.hooks_dir / "page_server.draining.reached").exists)
                async with (
                    PageClient(process.page) as late,
                    refused(grpc.StatusCode.UNAVAILABLE),
                ):
                    await _read_once(late, generation=1)
                whole = await fetch.read(0, 1 << 20, generation=1)
                assert whole == CONTENT[: 1 << 20]
                assert process.popen.poll() is None
            watch.cancel()
        assert await asyncio.to_thread(process.popen.wait) == ExitStatus.OK


async def test_the_drain_deadline_is_an_exit_status(node: PageNode) -> None:
    node.write_record(node.make_ram(CONTENT))
    with node.process("--drain-s", "0.2") as process:
        async with (
            PageClient(process.page) as client,
            client.fetch("web.1", epoch=EPOCH) as fetch,
        ):
            process.term()
            await fetch.end()
        status = await asyncio.to_thread(process.popen.wait)
        assert status == ExitStatus.GUESTS_DEPEND
        assert "web.1" in process.log()


async def test_an_idle_server_ends_at_once(node: PageNode) -> None:
    with node.process() as process:
        process.term()
        assert await asyncio.to_thread(process.popen.wait) == ExitStatus.OK


async def test_killed_and_started_again_it_serves_the_same(node: PageNode) -> None:
    """The same port, the same memory; the client only connects again."""
    node.write_record(node.make_ram(CONTENT))
    with node.process() as first:
        async with PageClient(first.page) as client:
            assert await _read_once(client, generation=1) == CONTENT[:PAGE]
            described = await client.describe("web.1")
            async with client.fetch("web.1", epoch=EPOCH) as fetch:
                first.kill()
                assert (await fetch.end()).code() == grpc.StatusCode.UNAVAILABLE
            with node.process(listen=first.page, control=first.control) as second:
                assert second.page == first.page
                assert await client.describe("web.1", wait_for_ready=True) == described
                assert await _read_once(client, generation=1) == CONTENT[:PAGE]


async def test_nobody_is_answered_before_the_records_are_read(node: PageNode) -> None:
    """A waiting destination that comes back early waits; it is not told IMAGE_UNKNOWN."""
    node.write_record(node.make_ram(CONTENT))
    with node.process() as first:
        pass
    hold = node.hooks_dir / "page_server.start.hold"
    reached = node.hooks_dir / "page_server.start.reached"
    reached.unlink()
    hold.touch()
    enough = node.directory / "enough"
    async with asyncio.TaskGroup() as group, PageClient(first.page) as client:
        group.create_task(asyncio.to_thread(_serve_until, enough, node, first))
        try:
            await until(reached.exists)
            early = group.create_task(client.describe("web.1", wait_for_ready=True))
            _done, pending = await asyncio.wait({early}, timeout=0.3)
            assert early in pending
            hold.unlink()
            assert (await early).image.image_id == "web.1"
        finally:  # the thread ends whatever failed
            hold.unlink(missing_ok=True)
            enough.touch()


def _serve_until(enough: Path, node: PageNode, before: Process) -> None:
    """A process on the address of `before`, until a file is there. Blocks."""
    with node.process(listen=before.page) as process:
        while not enough.exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(0.01)


async def test_pages_go_out_while_the_gil_is_held(node: PageNode) -> None:
    """Two seconds without any Python in the process: the control port is silent, pages flow."""
    node.write_record(node.make_ram(CONTENT))
    held = node.hooks_dir / "gil.held.reached"
    released = node.hooks_dir / "gil.released.reached"
    with node.process() as process:
        async with (
            PageClient(process.page) as client,
            client.fetch("web.1", epoch=EPOCH) as fetch,
            grpc_client.open_channel(process.control) as channel,
        ):
            health: Any = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest())
            process.popen.send_signal(signal.SIGUSR2)
            await until(held.exists)
            python = asyncio.ensure_future(health.Check(health_pb2.HealthCheckRequest()))
            for page in range(64):
                offset = page * PAGE
                got = await fetch.read(offset, generation=1)
                assert got == CONTENT[offset : offset + PAGE]
            async with PageClient(process.page) as other:
                assert await _read_once(other, generation=1) == CONTENT[:PAGE]
            assert not released.exists(), "the machine is too slow to tell"
            assert not python.done(), "the GIL was not held"
            await python
            assert int(released.read_text()) <= GIL_TICKS_MAX, "other threads had the GIL"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--listen", "0.0.0.0:0"], "--insecure-plaintext"),
        (["--control", "0.0.0.0:0"], "--insecure-plaintext"),
        (["--metrics", "[::]:0"], "--insecure-plaintext"),
    ],
)
def test_plaintext_off_loopback_needs_the_flag(node: PageNode, argv: list[str], named: str) -> None:
    base = ["--listen", "127.0.0.1:0", "--control", "127.0.0.1:0"]
    popen, log_path = node.spawn(*base, "--images-dir", str(node.images_dir), *argv)
    out, _ = popen.communicate()
    assert (popen.returncode, out) == (ExitStatus.BAD_CONFIG, "")
    assert named in log_path.read_text()


async def test_a_taken_port_is_bad_configuration(node: PageNode) -> None:
    with node.process() as first:
        argv = ["--control", "127.0.0.1:0", "--images-dir", str(node.images_dir)]
        popen, log_path = node.spawn("--listen", first.page, *argv)
        out, _ = await asyncio.to_thread(popen.communicate)
    assert (popen.returncode, out) == (ExitStatus.BAD_CONFIG, "")
    assert first.page in log_path.read_text()
