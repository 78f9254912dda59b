# SPDX-License-Identifier: Apache-2.0
"""The C programs that tests drive line by line: native/tests/*_main.c, of `make native-test`."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[2] / "build" / "native-plain"

PAGE = 4096
MIB = 1 << 20


class Program:
    """A running program that answers in lines."""

    def __init__(self, name: str, *argv: str) -> None:
        path = BUILD / name
        if not path.exists():
            pytest.fail(f"{path} is not there: make native-build-plain")
        self._popen = subprocess.Popen(
            [str(path), *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, line: str) -> None:
        """Send one line, wait for nothing."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(line + "\n")
        self._popen.stdin.flush()

    def hear(self) -> str:
        """The next line, without its end; empty when the program has ended."""
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().rstrip("\n")

    def ask(self, line: str) -> str:
        """Send one line and wait for its answer."""
        self.tell(line)
        return self.hear()

    def close(self) -> None:
        """End its input; it must then end with success."""
        with contextlib.suppress(BrokenPipeError):
            self._popen.communicate(timeout=60)
        assert self._popen.returncode == 0, f"exit status {self._popen.returncode}"

    def kill(self) -> None:
        """Kill -9 if it is still there."""
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.communicate()


@contextlib.contextmanager
def program(name: str, *argv: str) -> Iterator[Program]:
    """A program for the length of the block."""
    running = Program(name, *argv)
    try:
        yield running
        running.close()
    finally:
        running.kill()


class Server(Program):
    """A native page server."""

    def __init__(self, *, heartbeat_ms: int = 1000, connection_count_max: int = 16) -> None:
        super().__init__("serve_main")
        answer = self.ask(f"start {heartbeat_ms} {connection_count_max}")
        assert answer.startswith("port "), answer
        self.port = int(answer.split()[1])

    @property
    def address(self) -> str:
        """host:port for a client."""
        return f"127.0.0.1:{self.port}"

    def put(
        self,
        path: Path,
        image_id: str = "img",
        *,
        epoch: int = 1,
        generation: int = 1,
        state: int = 2,
        regions: str | None = None,
    ) -> None:
        """Serve a file whole, or `regions`: GPA:SIZE:FILE_OFFSET:PAGE_SIZE, separated by blanks."""
        regions = regions or f"0:{path.stat().st_size}:0:{PAGE}"
        assert self.ask(f"put {image_id} {epoch} {generation} {state} {path} {regions}") == "ok"

    def stats(self) -> dict[str, int]:
        """The counters, as struct gw_serve_stats names them."""
        pairs = (word.split("=") for word in self.ask("stats").split())
        return {name: int(value) for name, value in pairs}

    def stream_count(self, image_id: str = "img") -> int:
        """Fetch streams open on an image."""
        return int(self.ask(f"streams {image_id}").removeprefix("count "))


@contextlib.contextmanager
def page_server(*, heartbeat_ms: int = 1000) -> Iterator[Server]:
    """A native page server for the length of the block."""
    server = Server(heartbeat_ms=heartbeat_ms)
    try:
        yield server
        server.close()
    finally:
        server.kill()


def page_of(index: int) -> bytes:
    """What page `index` of a test memory holds: all different, a few zero."""
    if index % 64 >= 48 or index % 16 == 5:
        return bytes(PAGE)
    return (b"%016x" % (index * 0x9E3779B97F4A7C15 & (1 << 64) - 1)) * (PAGE // 16)


def make_memory(path: Path, len_bytes: int) -> bytes:
    """Write a test memory, with holes for the longer runs of zeros, and return it."""
    content = b"".join(page_of(index) for index in range(len_bytes // PAGE))
    with path.open("wb") as file:
        file.truncate(len_bytes)
        for offset in range(0, len_bytes, PAGE):
            if offset // PAGE % 64 < 48:
                file.seek(offset)
                file.write(content[offset : offset + PAGE])
    return content
