# SPDX-License-Identifier: Apache-2.0
"""A part of a cluster: it starts, comes back where it was, and says why it does not start."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from services.common.errors import UnavailableError
from services.demo.part import Part

LISTENER = """
import asyncio, os, sys
from services.common.hooks import reach
async def main():
    address = sys.argv[sys.argv.index("--listen") + 1]
    host, port = address.split(":")
    server = await asyncio.start_server(lambda r, w: w.close(), host, int(port))
    print(f"listening grpc={host}:{server.sockets[0].getsockname()[1]}", flush=True)
    await reach("served")
    await asyncio.Event().wait()
asyncio.run(main())
"""


def make_part(tmp_path: Path, program: str) -> Part:
    (tmp_path / "part_program.py").write_text(program)
    repo = Path(__file__).resolve().parents[3]
    return Part(
        "a.agent",
        ["part_program", "--listen", "127.0.0.1:0"],
        pinned={"grpc": "--listen"},
        directory=tmp_path,
        environment={"PYTHONPATH": f"{tmp_path}:{repo}"},
        hooked=True,
    )


async def test_starts_again_at_the_same_address(
    tmp_path: Path,
) -> None:
    part = make_part(tmp_path, LISTENER)
    part.hooks.hold("served")
    first = await part.start()
    address = part.addresses["grpc"]
    async with asyncio.timeout(20):
        await part.hooks.reached("served")
    assert part.pid == first.pid
    await part.kill()
    assert not part.is_running
    part.hooks.release("served")
    await part.start()
    assert part.addresses["grpc"] == address
    part.signal(signal.SIGSTOP)
    part.signal(signal.SIGCONT)
    await part.stop()
    assert not part.is_running


async def test_says_why_it_does_not_start(tmp_path: Path) -> None:
    part = make_part(tmp_path, "raise SystemExit('no such bridge')")
    with pytest.raises(UnavailableError, match=r"a\.agent did not start: .*no such bridge") as why:
        await part.start()
    assert why.value.reason == "PART_FAILED"
    assert not part.is_running
