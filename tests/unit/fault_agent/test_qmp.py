# SPDX-License-Identifier: Apache-2.0
"""Promise: the monitor's client survives a monitor that is mute, late, talkative, wrong or gone."""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from services.fault_agent.drivers.api import VmmUnreachableError
from services.fault_agent.drivers.qmp import QmpClient, QmpError

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'


class Monitor:
    """A scripted monitor: a test receives commands and sends whatever it likes."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.connection: socket.socket | None = None
        self.fds: list[int] = []
        self._lines: list[bytes] = []
        self._received = b""

    async def accept(self) -> None:
        loop = asyncio.get_running_loop()
        self.connection, _ = await loop.sock_accept(self._listener)
        await self.send(GREETING)
        command = await self.receive()
        assert command["execute"] == "qmp_capabilities"
        await self.answer(command, {})

    async def send(self, data: bytes) -> None:
        assert self.connection is not None
        await asyncio.get_running_loop().sock_sendall(self.connection, data)

    async def answer(self, command: dict[str, Any], result: object) -> None:
        await self.send(json.dumps({"return": result, "id": command["id"]}).encode() + b"\n")

    async def receive(self) -> dict[str, Any]:
        assert self.connection is not None
        while not self._lines:
            readable = asyncio.Event()
            asyncio.get_running_loop().add_reader(self.connection, readable.set)
            await readable.wait()
            asyncio.get_running_loop().remove_reader(self.connection)
            size = array.array("i").itemsize
            data, ancillary, _, _ = self.connection.recvmsg(65536, socket.CMSG_LEN(4 * size))
            for _, _, raw in ancillary:
                self.fds += array.array("i", raw[: len(raw) - len(raw) % size])
            self._received += data
            *lines, self._received = self._received.split(b"\n")
            self._lines += lines
        command: dict[str, Any] = json.loads(self._lines.pop(0))
        return command


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[QmpClient, Monitor]]:
    with listening(tmp_path / "qmp.sock") as monitor:
        async with asyncio.TaskGroup() as group:
            group.create_task(monitor.accept())
            client = await connect(tmp_path / "qmp.sock")
        yield client, monitor
        client.close()
        assert monitor.connection is not None
        monitor.connection.close()


@contextlib.contextmanager
def listening(path: Path) -> Any:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        yield Monitor(listener)


async def connect(
    path: Path, *, timeout_s: float = 5.0, alive: Callable[[], bool] = lambda: True
) -> QmpClient:
    return await QmpClient.connect(path, timeout_s=timeout_s, alive=alive)


async def test_answers_go_to_their_commands(pair: tuple[QmpClient, Monitor]) -> None:
    client, monitor = pair
    async with asyncio.TaskGroup() as group:
        first = group.create_task(client.execute("one"))
        second = group.create_task(client.execute("two", {"a": 1}))
        commands = [await monitor.receive(), await monitor.receive()]
        assert commands[1]["arguments"] == {"a": 1}
        # In the wrong order, with an event between, in pieces.
        reply = json.dumps({"return": 2, "id": commands[1]["id"]}).encode() + b"\n"
        await monitor.send(reply[:5])
        await asyncio.sleep(0)
        await monitor.send(reply[5:] + b'{"event": "STOP"}\n')
        await monitor.answer(commands[0], 1)
    assert (first.result(), second.result()) == (1, 2)


async def test_an_error_is_raised_with_its_text(pair: tuple[QmpClient, Monitor]) -> None:
    client, monitor = pair
    async with asyncio.TaskGroup() as group:
        task = group.create_task(raises(client.execute("cont"), QmpError))
        command = await monitor.receive()
        error = {"class": "GenericError", "desc": 'Failed to get "write" lock'}
        await monitor.send(json.dumps({"error": error, "id": command["id"]}).encode() + b"\n")
    assert 'Failed to get "write" lock' in task.result().message


async def raises(awaitable: Any, kind: type[Any]) -> Any:
    with pytest.raises(kind) as caught:
        await awaitable
    return caught.value


async def test_a_mute_monitor_costs_one_deadline_and_its_late_answer_nothing(
    pair: tuple[QmpClient, Monitor],
) -> None:
    client, monitor = pair
    with pytest.raises(VmmUnreachableError, match="cont"):
        await client.execute("cont", timeout_s=0.01)
    late = await monitor.receive()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(client.execute("query-status"))
        command = await monitor.receive()
        await monitor.answer(late, "late")
        await monitor.answer(command, "in time")
    assert task.result() == "in time"


async def test_events_are_kept_from_the_moment_somebody_asks(
    pair: tuple[QmpClient, Monitor],
) -> None:
    client, monitor = pair
    with client.events("MIGRATION") as events:
        await monitor.send(b'{"event": "STOP"}\n{"event": "MIGRATION", "data": {"status": "a"}}\n')
        await monitor.send(b'{"event": "MIGRATION", "data": {"status": "b"}}\n')
        assert [await events.next(), await events.next()] == [{"status": "a"}, {"status": "b"}]


async def test_descriptors_travel_with_their_command(pair: tuple[QmpClient, Monitor]) -> None:
    client, monitor = pair
    ours, theirs = os.pipe()
    async with asyncio.TaskGroup() as group:
        group.create_task(client.execute("getfd", {"fdname": "x"}, fds=[theirs]))
        command = await monitor.receive()
        await monitor.answer(command, {})
    os.write(theirs, b"ours stays open")
    os.write(monitor.fds[0], b"!")
    assert os.read(ours, 100) == b"ours stays open!"
    for fd in (ours, theirs, *monitor.fds):
        os.close(fd)


@pytest.mark.parametrize("last_words", [b"", b"this is not json\n", b"[]\n", b'{"ev'])
async def test_the_end_of_the_connection_reaches_everybody_who_waits(
    pair: tuple[QmpClient, Monitor], last_words: bytes
) -> None:
    client, monitor = pair
    with client.events("MIGRATION") as events:
        async with asyncio.TaskGroup() as group:
            group.create_task(raises(client.execute("cont"), VmmUnreachableError))
            group.create_task(raises(events.next(), VmmUnreachableError))
            await monitor.receive()
            assert monitor.connection is not None
            await monitor.send(last_words)
            monitor.connection.shutdown(socket.SHUT_RDWR)
        assert client.closed
        await raises(events.next(), VmmUnreachableError)
    await raises(client.execute("cont"), VmmUnreachableError)
    with client.events("STOP") as late:
        await raises(late.next(), VmmUnreachableError)


async def test_connect_waits_for_the_socket_and_gives_up_with_the_process(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    with pytest.raises(VmmUnreachableError, match="ended before"):
        await connect(path, alive=lambda: False)
    async with asyncio.TaskGroup() as group:
        connecting = group.create_task(connect(path))
        await asyncio.sleep(0)
        with listening(path) as monitor:
            await monitor.accept()
            client = await connecting
    client.close()
    assert monitor.connection is not None
    monitor.connection.close()


async def test_a_monitor_that_another_client_holds_is_unreachable(tmp_path: Path) -> None:
    """QEMU serves one client: a second one is accepted by the kernel and greeted by nobody."""
    with (
        listening(tmp_path / "qmp.sock"),
        pytest.raises(VmmUnreachableError, match="no monitor"),
    ):
        await connect(tmp_path / "qmp.sock", timeout_s=0.05)


async def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    fd = os.open(directory, os.O_PATH)
    try:
        with listening(Path(f"/proc/self/fd/{fd}/qmp.sock")) as monitor:
            async with asyncio.TaskGroup() as group:
                group.create_task(monitor.accept())
                client = await connect(directory / "qmp.sock")
            client.close()
            assert monitor.connection is not None
            monitor.connection.close()
    finally:
        os.close(fd)
