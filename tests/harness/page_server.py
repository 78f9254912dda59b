# SPDX-License-Identifier: Apache-2.0
"""A real page server process and the node around it: RAM files, image records, a control client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from godwit.page.v1 import image_admin_service_pb2 as admin_pb
from godwit.page.v1 import image_admin_service_pb2_grpc as admin_grpc

from services.common import grpc_client
from services.page_server.images import this_boot_id

PAGE = 4096
START_S = 60.0
POLL_S = 0.005

LISTENING = re.compile(r"listening page=(\S+) control=(\S+) metrics=(\S+)\n")


@dataclass(kw_only=True)
class Process:
    """A page server that answers."""

    popen: subprocess.Popen[str]
    page: str
    control: str
    metrics: str
    log_path: Path

    def log(self) -> str:
        """What it has written to stderr."""
        return self.log_path.read_text()

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        self.popen.kill()
        self.popen.wait()

    def term(self) -> None:
        """Ask it to drain."""
        self.popen.send_signal(signal.SIGTERM)


class PageNode:
    """A node: what the fault agent does for its page server."""

    def __init__(self, directory: Path, ram_dir: Path) -> None:
        self.directory = directory
        self.ram_dir = ram_dir
        self.images_dir = directory / "images"
        self.hooks_dir = directory / "hooks"
        self.images_dir.mkdir()
        self.hooks_dir.mkdir()

    def make_ram(self, content: bytes, name: str = "ram") -> Path:
        """A RAM file; runs of zero pages become holes."""
        path = self.ram_dir / name
        with path.open("wb") as file:
            file.truncate(len(content))
            for offset in range(0, len(content), PAGE):
                page = content[offset : offset + PAGE]
                if any(page):
                    file.seek(offset)
                    file.write(page)
        return path

    def write_record(self, ram: Path, image_id: str = "web.1", **changes: Any) -> dict[str, Any]:
        """Write an image record as the agent does, atomically."""
        found = ram.stat()
        region = {
            "gpa": 0,
            "size_bytes": found.st_size,
            "file_offset": 0,
            "page_size_bytes": PAGE,
        }
        fields = {
            "image_id": image_id,
            "vm_id": "web",
            "boot_id": this_boot_id(),
            "epoch": 7,
            "inode": found.st_ino,
            "generation": 1,
            "state": "frozen",
            "ram_path": str(ram),
            "regions": [region],
        } | changes
        scratch = self.images_dir / f".{image_id}.json.new"
        scratch.write_text(json.dumps(fields))
        scratch.rename(self.images_dir / f"{image_id}.json")
        return fields

    @contextlib.contextmanager
    def process(
        self,
        *argv: str,
        listen: str = "127.0.0.1:0",
        control: str = "127.0.0.1:0",
        user: int | None = None,
    ) -> Iterator[Process]:
        """A page server for the length of the block; killed if it is still there then.

        `user`: whose it is; None: ours.
        """
        popen, log_path = self.spawn(
            *("--listen", listen, "--control", control),
            *("--images-dir", str(self.images_dir), "--ram-dir", str(self.ram_dir)),
            *argv,
            user=user,
        )
        try:
            assert popen.stdout is not None
            line = popen.stdout.readline()
            match = LISTENING.fullmatch(line)
            assert match, f"said {line!r}, exit {popen.poll()}: {log_path.read_text()}"
            yield Process(
                popen=popen,
                page=match[1],
                control=match[2],
                metrics=match[3],
                log_path=log_path,
            )
        finally:
            popen.kill()
            popen.wait()
            if popen.stdout is not None:
                popen.stdout.close()

    def spawn(self, *argv: str, user: int | None = None) -> tuple[subprocess.Popen[str], Path]:
        """The bare process, with hooks on, and where its log is."""
        log_path = self.directory / f"page_server.{time.monotonic_ns()}.log"
        with log_path.open("w") as log:
            popen = subprocess.Popen(
                [sys.executable, "-m", "services.page_server", *argv],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "GODWIT_HOOKS_DIR": str(self.hooks_dir)},
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        return popen, log_path


@contextlib.contextmanager
def page_node(directory: Path) -> Iterator[PageNode]:
    """A node whose records are under `directory`, and whose memory goes with the block."""
    ram_dir = Path(tempfile.mkdtemp(prefix="godwit-test-", dir="/dev/shm"))
    try:
        yield PageNode(directory, ram_dir)
    finally:
        shutil.rmtree(ram_dir)


async def reload(control: str) -> admin_pb.ReloadImagesResponse:
    """Tell a page server to read its records."""
    async with grpc_client.open_channel(control) as channel:
        stub = admin_grpc.ImageAdminServiceStub(channel)
        request = admin_pb.ReloadImagesRequest()
        return await grpc_client.call(channel, stub.ReloadImages, request, timeout_s=START_S)


def pattern(page_count: int, *, holes: Sequence[int] = (), salt: int = 0) -> bytes:
    """Pages that are all different; those in `holes` are zero."""
    return b"".join(
        bytes(PAGE) if page in holes else (b"%08x%08x" % (page, salt)) * (PAGE // 16)
        for page in range(page_count)
    )
