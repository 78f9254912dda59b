# SPDX-License-Identifier: Apache-2.0
"""Wait until no guest depends on this node: what stands before the end of an agent or page server.

    godwit node-wait --state-dir DIR        (an agent's)
    godwit node-wait --images-dir DIR       (a page server's)

The preStop hook of the node's pod, ExecStop of a unit, a script before a reboot. It tells nobody
anything and moves nobody: `godwit drain NODE` does.

Exit status: 0 nothing depends on it any more; 2 wrong usage; 3 --timeout-s passed, and each guest
that depends on it is named.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from services.common import telemetry
from services.common.lifecycle import ExitStatus
from services.fault_agent import processes
from services.node_keeper import dependence
from services.node_keeper.dependence import Dependence

log = logging.getLogger(__name__)

PROGRAM = "node_wait"
LOOK_S = 1.0
REPORT_S = 30.0


def main(argv: Sequence[str] | None = None) -> ExitStatus:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR")
    parser.add_argument("--images-dir", type=Path, metavar="DIR")
    parser.add_argument("--timeout-s", type=float, default=float("inf"), metavar="SECONDS")
    args = parser.parse_args(argv)
    if args.state_dir is None and args.images_dir is None:
        parser.error("say what to look at: --state-dir, --images-dir or both")
    boot_id = processes.boot_id()

    def look() -> list[Dependence]:
        found = dependence.of_state(args.state_dir, boot_id) if args.state_dir else []
        return found + (dependence.of_images(args.images_dir) if args.images_dir else [])

    with telemetry.configured(PROGRAM):
        return wait(look, timeout_s=args.timeout_s)


def wait(look: Callable[[], list[Dependence]], *, timeout_s: float) -> ExitStatus:
    """Look until nothing depends, or `timeout_s` has passed."""
    deadline = time.monotonic() + timeout_s
    report_at = time.monotonic()
    while found := look():
        now = time.monotonic()
        named = ", ".join(map(str, found))
        if now >= deadline:
            log.error("guests depend on this node still: %s; `godwit drain` moves them", named)
            return ExitStatus.GUESTS_DEPEND
        if now >= report_at:
            report_at = now + REPORT_S
            log.info("waiting for %s", named)
        time.sleep(min(LOOK_S, deadline - now))
    log.info("no guest depends on this node")
    return ExitStatus.OK


if __name__ == "__main__":
    sys.exit(main())
