# SPDX-License-Identifier: Apache-2.0
"""The parts around a process's work: metrics endpoint, signals, background tasks, hooks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge

from services.common import hooks, lifecycle, metrics
from services.common.errors import InvalidArgumentError
from services.common.lifecycle import ExitStatus
from services.common.listen import Address

GIL_TICKS_MAX = 3
"""A thread that is about to wait when the GIL is taken may still count itself."""

LOOPBACK = Address(host="127.0.0.1", port=0)


async def ask(address: Address, request: bytes) -> tuple[bytes, bytes]:
    """What the endpoint answers: head and body."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(request)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


async def test_metrics_in_both_formats() -> None:
    registry = metrics.new_registry()
    metrics.invariant_violations(registry).labels("I4").inc()
    async with metrics.serving(registry, LOOPBACK) as address:
        head, body = await ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b'godwit_invariant_violations_total{invariant="I4"} 1.0' in body
        assert b"process_resident_memory_bytes" in body
        head, body = await ask(
            address,
            b"GET /metrics?a=b HTTP/1.1\r\n"
            b"Accept: application/openmetrics-text; version=1.0.0\r\n\r\n",
        )
        assert b"Content-Type: application/openmetrics-text" in head
        assert body.endswith(b"# EOF\n")
        assert f"Content-Length: {len(body)}".encode() in head


@pytest.mark.parametrize(
    ("request_line", "status"),
    [(b"GET / HTTP/1.1", 404), (b"POST /metrics HTTP/1.1", 405), (b"HEAD /metrics HTTP/1.1", 200)],
)
async def test_other_requests(request_line: bytes, status: int) -> None:
    async with metrics.serving(CollectorRegistry(), LOOPBACK) as address:
        head, body = await ask(address, request_line + b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert bool(body) == (status != 200)


@pytest.mark.parametrize("junk", [b"\r\n\r\n", b"GET\r\n\r\n", b"x" * 100_000, b"GET /metrics"])
async def test_junk_hurts_nobody(junk: bytes) -> None:
    async with metrics.serving(CollectorRegistry(), LOOPBACK) as address:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(junk)
        writer.write_eof()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        head, _ = await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert b"200" in head


async def test_a_collector_that_fails_does_not_take_the_endpoint_down() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("a", "b", registry=registry)
    gauge.set_function(lambda: 1 / 0)
    async with metrics.serving(registry, LOOPBACK) as address:
        head, _ = await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert b" 500 " in head
        gauge.set_function(lambda: 1)
        head, _ = await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert b" 200 " in head


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_stop_and_nothing_more(number: signal.Signals) -> None:
    with lifecycle.stop_on_signal() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        await stop.wait()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


async def test_background_tasks_end_with_the_block() -> None:
    cancelled = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with lifecycle.background({"forever": forever}):
        await asyncio.sleep(0)
    assert cancelled.is_set()


async def test_a_failing_task_takes_the_block_down() -> None:
    async def fail() -> None:
        raise KeyError("x")

    with pytest.RaisesGroup(KeyError):
        async with lifecycle.background({"fail": fail}):
            await asyncio.Event().wait()


async def test_the_error_of_the_block_is_not_hidden() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    with pytest.RaisesGroup(InvalidArgumentError):
        async with lifecycle.background({"forever": forever}):
            raise InvalidArgumentError("X", "y")


def test_run_maps_refusals_to_bad_config(capsys: pytest.CaptureFixture[str]) -> None:
    async def refuse() -> ExitStatus:
        raise InvalidArgumentError("LISTEN_NOT_LOOPBACK", "no", hint="do this")

    assert lifecycle.run("test", refuse) == ExitStatus.BAD_CONFIG
    assert "LISTEN_NOT_LOOPBACK: no (do this)" in capsys.readouterr().err


def test_run_raises_bugs() -> None:
    async def fail() -> ExitStatus:
        raise KeyError("x")

    with pytest.raises(KeyError):
        lifecycle.run("test", fail)


# --- hooks ---


async def test_without_a_directory_a_point_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GODWIT_HOOKS_DIR", raising=False)
    assert not await hooks.reach("p")
    before = signal.getsignal(signal.SIGUSR2)
    hooks.hold_gil_on_signal()
    assert signal.getsignal(signal.SIGUSR2) == before


async def test_hold_fail_and_skip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GODWIT_HOOKS_DIR", str(tmp_path))
    hold = tmp_path / "p.hold"
    hold.touch()
    async with asyncio.TaskGroup() as group:
        passing = group.create_task(hooks.reach("p"))
        while not (tmp_path / "p.reached").exists():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0)
        assert not passing.done()
        hold.unlink()
        assert not await passing
    (tmp_path / "p.skip").touch()
    assert await hooks.reach("p")
    (tmp_path / "p.fail").touch()
    with pytest.raises(hooks.HookFailure):
        await hooks.reach("p")
    assert not (tmp_path / "p.fail").exists()


def test_the_gil_is_held_and_let_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GODWIT_HOOKS_DIR", str(tmp_path))
    (tmp_path / "gil.hold_ms").write_text("100")
    before = signal.getsignal(signal.SIGUSR2)
    try:
        hooks.hold_gil_on_signal()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert (tmp_path / "gil.held.reached").exists()
        assert int((tmp_path / "gil.released.reached").read_text()) <= GIL_TICKS_MAX
    finally:
        signal.signal(signal.SIGUSR2, before)
