# SPDX-License-Identifier: Apache-2.0
"""A section in a process of its own: whatever it does, the others are measured and judged.

    python -m tests.bench.child SECTION FILE [--quick] [--rounds N] [--seconds S]

writes the section's result to FILE. One that fails or does not end is a result too, with the
reason; its bars are missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.processes import REPO
from tests.bench.section import Result, Scale, failed
from tests.bench.sections import SECTIONS

_GRACE_S = 20.0
"""Of one that is told to stop: it takes down what it started."""
_TAIL = 4096


def measure(name: str, scale: Scale, path: Path, limit_s: float) -> Result:
    """Run a section; its result, or why there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    log = path.with_suffix(".log")
    command = [sys.executable, "-m", "tests.bench.child", name, str(path)]
    command += ["--quick"] if scale.quick else []
    command += ["--rounds", str(scale.rounds)] if scale.rounds else []
    command += ["--seconds", str(scale.seconds)]
    with log.open("wb") as errors:
        child = subprocess.Popen(command, cwd=REPO, stderr=errors, start_new_session=True)
    try:
        status = child.wait(limit_s if math.isfinite(limit_s) else None)
        why = f"it ended with {status}: {_last_words(log)}"
    except subprocess.TimeoutExpired:
        why = f"it did not end within {limit_s:.0f} s"
    finally:
        _end(child)
    try:
        result: Result = json.loads(path.read_text())
    except (OSError, ValueError):
        return failed(why)
    return result


def _last_words(log: Path) -> str:
    lines = log.read_bytes()[-_TAIL:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _end(child: subprocess.Popen[bytes]) -> None:
    """It and all that it started."""
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def main() -> None:
    """Measure one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    args = parser.parse_args()
    # Ended by whomever, what was started is taken down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scale = Scale(quick=args.quick, rounds=args.rounds, seconds=args.seconds)
    begin_s = time.monotonic()
    result = SECTIONS[args.section].run(scale)
    print(f"{args.section}: {time.monotonic() - begin_s:.0f} s", file=sys.stderr, flush=True)
    scratch = args.path.with_suffix(".new")
    scratch.write_text(json.dumps(result))
    scratch.rename(args.path)


if __name__ == "__main__":
    main()
