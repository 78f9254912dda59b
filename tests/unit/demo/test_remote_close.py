# SPDX-License-Identifier: Apache-2.0
"""The sabotage tool closes what it was told to close, in a process that lives on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from services.demo.remote_close import close_in

_ECHO = """
import sys, threading
threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
for line in sys.stdin:
    print(line, end="", flush=True)
"""


def _ask(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.requires("root")
def test_closes_the_descriptor_and_the_process_goes_on() -> None:
    """The last writer of a pipe is gone, and the interrupted read(2) is made again."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", _ECHO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[writing],
    )
    with process:
        os.close(writing)
        assert _ask(process, "before") == "before"
        close_in(process.pid, writing)
        assert os.read(reading, 1) == b"", "somebody still holds the pipe"
        os.close(reading)
        assert _ask(process, "after") == "after"
        with pytest.raises(OSError, match=r"close\(77\)"):
            close_in(process.pid, 77)
        assert _ask(process, "and again") == "and again"
        process.kill()
