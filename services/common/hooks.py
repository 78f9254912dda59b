# SPDX-License-Identifier: Apache-2.0
"""Named points at which a test can hold, fail or kill a process.

Without GODWIT_HOOKS_DIR every point is a no-op. With it, reaching point P
writes `P.reached` there, and then
  `P.hold` exists: waits until it is removed;
  `P.fail` exists: removes it and raises HookFailure;
  `P.skip` exists: returns True: the caller leaves out the act that follows;
  `P.exit` exists: removes it and ends the process at once, as kill -9 would.
Tests park a process at a point and so prove a race without sleeping. docs/testing.md lists the
points.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import threading
from pathlib import Path
from types import FrameType

POLL_S = 0.002
HOLD_GIL_MS = 2000


class HookFailure(Exception):  # noqa: N818 - it is what a test orders, not an error
    """Raised at a point whose `.fail` file a test has placed."""


async def reach(point: str) -> bool:
    """Pass `point`; True tells the caller to leave out what follows (tests only)."""
    directory = os.environ.get("GODWIT_HOOKS_DIR")
    if not directory:
        return False
    base = Path(directory)
    (base / f"{point}.reached").touch()
    exit_file = base / f"{point}.exit"
    if exit_file.exists():
        exit_file.unlink()
        os._exit(137)
    while (base / f"{point}.hold").exists():  # noqa: ASYNC110 - another process removes it
        await asyncio.sleep(POLL_S)
    fail_file = base / f"{point}.fail"
    if fail_file.exists():
        fail_file.unlink()
        raise HookFailure(point)
    return (base / f"{point}.skip").exists()


def hold_gil_on_signal() -> None:
    """With GODWIT_HOOKS_DIR, let SIGUSR2 hold the GIL: no Python runs here meanwhile.

    It lasts as many milliseconds as the file `gil.hold_ms` says, else two seconds, and touches
    `gil.held.reached` before and `gil.released.reached` after: what a peer saw answered in
    between was answered without Python. `gil.released.reached` says how often another thread got
    the GIL meanwhile: a few times would be many too many. Call it from main(), in the main thread.
    """
    if not os.environ.get("GODWIT_HOOKS_DIR"):
        return
    # A PyDLL call keeps the GIL, a CDLL call would let it go; poll(2) on nothing sleeps.
    poll = ctypes.PyDLL(None).poll

    def hold(_number: int, _frame: FrameType | None) -> None:
        base = Path(os.environ["GODWIT_HOOKS_DIR"])
        wanted = base / "gil.hold_ms"
        hold_ms = int(wanted.read_text()) if wanted.exists() else HOLD_GIL_MS
        over = threading.Event()
        ticks: list[None] = []

        def tick() -> None:
            while not over.wait(0.001):
                ticks.append(None)

        witness = threading.Thread(target=tick)
        witness.start()
        (base / "gil.held.reached").touch()
        before = len(ticks)
        poll(None, ctypes.c_ulong(0), ctypes.c_int(hold_ms))
        during = len(ticks) - before
        over.set()
        witness.join()
        (base / "gil.released.reached").write_text(str(during))

    signal.signal(signal.SIGUSR2, hold)
