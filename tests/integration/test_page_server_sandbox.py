# SPDX-License-Identifier: Apache-2.0
"""Promise: a page server can reach nothing but what it serves, and what is refused harms no guest.

The process is the real one; the kernel refuses, not our code.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from services.common.privileges import landlock
from tests.harness.page_client import PageClient
from tests.harness.page_server import PAGE, PageNode, page_node, pattern, reload

CONTENT = pattern(64)
EPOCH = 8
NOBODY = 65534

INTRUDER = """
import os, socket, sys
from pathlib import Path
from services.page_server.confinement import Confinement
from services.pagecore.api import SandboxMode
from services.pagecore.native import NativePageCore

images, ram = map(Path, sys.argv[1:])
open_ram = Confinement(images_dir=images, ram_dirs=(ram,), mode=SandboxMode.ENFORCE).enter(
    NativePageCore()
)

def tries(name, act):
    try:
        act()
        print(name, "done")
    except OSError as error:
        print(name, type(error).__name__)

tries("read-shadow", lambda: open("/etc/shadow").close())
tries("read-home", lambda: os.listdir(Path.home()))
tries("read-elsewhere", lambda: open("/dev/shm/" + sys.stdin.read().strip()).close())
tries("read-image", lambda: open(ram / "ram").close())
tries("write-image", lambda: open(ram / "ram", "r+b").close())
tries("write-record", lambda: open(images / "x.json", "w").close())
tries("parents-memory", lambda: open(f"/proc/{os.getppid()}/mem").close())
tries("own-status", lambda: open("/proc/self/status").close())
tries("exec", lambda: os.execv("/bin/true", ["true"]))
tries("fork", os.fork)
tries("packets", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close())
tries("kill", lambda: os.kill(os.getppid(), 0))
import wave  # a module that nobody has imported yet
print("import done")
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[PageNode]:
    with page_node(tmp_path) as node:
        yield node


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """Guest memory, but not of this page server's directory."""
    path = Path(f"/dev/shm/godwit-test-elsewhere-{id(object())}")
    path.write_bytes(CONTENT)
    yield path
    path.unlink()


def need_landlock() -> None:
    if landlock.abi() == 0:
        pytest.skip("needs landlock: a kernel with CONFIG_SECURITY_LANDLOCK, in its list of lsm=")


def _threads(pid: int) -> dict[str, dict[str, str]]:
    return {
        (task / "comm").read_text().strip(): dict(
            line.split(":\t", 1)
            for line in (task / "status").read_text().splitlines()
            if ":\t" in line
        )
        for task in Path(f"/proc/{pid}/task").iterdir()
    }


async def test_every_thread_of_the_process_is_filtered_and_it_serves(node: PageNode) -> None:
    node.write_record(node.make_ram(CONTENT))
    with node.process() as process:
        async with PageClient(process.page) as client, client.fetch("web.1", epoch=EPOCH) as fetch:
            assert await fetch.read(0, len(CONTENT), generation=1) == CONTENT
            threads = _threads(process.popen.pid)
        assert len(threads) > 2
        for name, status in threads.items():
            assert status["Seccomp"] == "2", name
            assert status["NoNewPrivs"] == "1", name


async def _refusal(node: PageNode, elsewhere: Path) -> str:
    """Why an image is refused that is memory, of the right inode: our own code would serve it."""
    with node.process() as process:
        node.write_record(elsewhere, "there.1")
        node.write_record(node.make_ram(CONTENT), "here.1")
        answer = await reload(process.control)
        assert [image.image_id for image in answer.images] == ["here.1"]
        async with PageClient(process.page) as client:
            with pytest.raises(grpc.aio.AioRpcError, match="IMAGE_UNKNOWN"):
                await client.describe("there.1")
            async with client.fetch("here.1", epoch=EPOCH) as fetch:
                assert await fetch.read(0, generation=1) == CONTENT[:PAGE]
        return answer.refused_images[0].reason


async def test_the_kernel_refuses_memory_of_another_directory(
    node: PageNode, elsewhere: Path
) -> None:
    need_landlock()
    assert "Permission denied (is it beneath" in await _refusal(node, elsewhere)


async def test_without_landlock_memory_is_opened_beneath_its_directory(
    node: PageNode, elsewhere: Path
) -> None:
    (node.hooks_dir / "page_server.landlock.skip").touch()
    assert "is in no --ram-dir" in await _refusal(node, elsewhere)
    (node.ram_dir / "link").symlink_to(elsewhere)
    assert "symbolic link" in await _refusal(node, node.ram_dir / "link")


async def test_what_was_served_before_a_restart_is_served_after_it(
    node: PageNode, elsewhere: Path
) -> None:
    """Somebody has changed --ram-dir, and a guest waits: it gets its memory."""
    node.write_record(elsewhere)
    with node.process() as process:
        node.write_record(elsewhere, generation=2)
        assert [image.generation for image in (await reload(process.control)).images] == [2]
        async with PageClient(process.page) as client, client.fetch("web.1", epoch=EPOCH) as fetch:
            assert await fetch.read(0, generation=2) == CONTENT[:PAGE]


@pytest.fixture
def open_node() -> Iterator[PageNode]:
    """A node that every user may look into."""
    probe = [sys.executable, "-c", "import services.page_server.main"]
    try:
        subprocess.run(probe, user=NOBODY, cwd="/", check=True, capture_output=True)
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip("needs a checkout and a Python that every user can read")
    with tempfile.TemporaryDirectory() as directory, page_node(Path(directory)) as node:
        node.directory.chmod(0o755)
        node.ram_dir.chmod(0o755)
        node.hooks_dir.chmod(0o777)
        yield node


@pytest.mark.requires("root")
async def test_an_ordinary_user_serves_what_it_may_read(open_node: PageNode) -> None:
    """Without root, without a capability: file modes are enough."""
    ram = open_node.make_ram(CONTENT)
    ram.chmod(0o644)
    open_node.write_record(ram)
    with open_node.process(user=NOBODY) as process:
        async with PageClient(process.page) as client, client.fetch("web.1", epoch=EPOCH) as fetch:
            assert await fetch.read(0, len(CONTENT), generation=1) == CONTENT
        assert f"user {NOBODY}, keeps no capability" in process.log()


def test_whoever_takes_the_process_over_can_do_little(node: PageNode, elsewhere: Path) -> None:
    """A small process enters the same confinement and tries what an intruder would."""
    need_landlock()
    node.make_ram(CONTENT)
    done = subprocess.run(
        [sys.executable, "-c", INTRUDER, str(node.images_dir), str(node.ram_dir)],
        input=elsewhere.name,
        capture_output=True,
        text=True,
        check=True,
    )
    refused = "PermissionError"
    assert dict(line.split(" ", 1) for line in done.stdout.splitlines()) == {
        "read-shadow": refused,
        "read-home": refused,
        "read-elsewhere": refused,
        "read-image": "done",
        "write-image": refused,
        "write-record": refused,
        "parents-memory": refused,
        "own-status": "done",
        "exec": refused,
        "fork": refused,
        "packets": "OSError",
        "kill": refused,
        "import": "done",
    }, done.stderr
