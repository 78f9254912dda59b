# SPDX-License-Identifier: Apache-2.0
"""Tell the world what depends on this node, and keep its certificates.

    godwit node-keeper --state-dir DIR --node NAME [--node-condition] [--shutdown-inhibitor]
    godwit node-keeper --certificates-from DIR --certificates-of NAME --certificates-to DIR [--once]

It stands beside the fault agent, reads its journals and owns nothing: guests never notice whether
it runs. --node-condition keeps the condition GodwitRetainsImages of the Kubernetes node; it alone
of the node's pod has a token of the API server. --shutdown-inhibitor has systemd-logind hold off a
shutdown. --certificates-... copies this node's out of a Secret with all nodes'.

Exit status: 0 ended by a signal, or --once is done; 2 bad configuration; 1 a bug.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common import lifecycle
from services.common.errors import GodwitError
from services.common.lifecycle import ExitStatus
from services.fault_agent import processes
from services.node_keeper import dependence, inhibitor
from services.node_keeper.certificates import Copies
from services.node_keeper.condition import Condition, NodeStatus
from services.node_keeper.inhibitor import Inhibitor

log = logging.getLogger(__name__)

PROGRAM = "node_keeper"
LOOK_S = 1.0
HEARTBEAT_S = 60.0
COMPLAIN_S = 60.0
"""How often what does not work is said again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What it is told."""

    state_dir: Path | None
    node: str
    node_condition: bool
    shutdown_inhibitor: bool
    copies: Copies | None
    once: bool

    @classmethod
    def from_argv(cls, argv: Sequence[str] | None) -> Config:
        """Parse and check; exits with BAD_CONFIG on any error."""
        parser = argparse.ArgumentParser(
            prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--state-dir", type=Path, metavar="DIR")
        parser.add_argument("--node", default="", metavar="NAME")
        parser.add_argument("--node-condition", action="store_true")
        parser.add_argument("--shutdown-inhibitor", action="store_true")
        parser.add_argument("--certificates-from", type=Path, metavar="DIR")
        parser.add_argument("--certificates-of", default="", metavar="NODE")
        parser.add_argument("--certificates-to", type=Path, metavar="DIR")
        parser.add_argument("--once", action="store_true", help="copy certificates, then end")
        args = parser.parse_args(argv)
        given = (args.certificates_from, args.certificates_of, args.certificates_to)
        if any(given) and not all(given):
            parser.error("--certificates-from, -of and -to go together")
        if (args.node_condition or args.shutdown_inhibitor) and args.state_dir is None:
            parser.error("--state-dir is needed: what depends on the node is in its journals")
        if args.node_condition and not args.node:
            parser.error("--node is needed with --node-condition")
        if args.once and not all(given):
            parser.error("--once is for --certificates-from, -of and -to")
        copies = None
        if all(given):
            copies = Copies(
                source=args.certificates_from,
                node=args.certificates_of,
                target=args.certificates_to,
            )
        return cls(
            state_dir=args.state_dir,
            node=args.node,
            node_condition=args.node_condition,
            shutdown_inhibitor=args.shutdown_inhibitor,
            copies=copies,
            once=args.once,
        )


class Complaints:
    """Says what does not work, once a minute, and when it works again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: dict[str, float] = {}

    def attempt(self, what: str, act: Callable[[], object]) -> bool:
        """Do it; False: it failed. Nothing of it may end the keeper: other parts go on."""
        try:
            act()
        except (GodwitError, OSError) as error:
            if self._clock() - self._said.get(what, float("-inf")) >= COMPLAIN_S:
                self._said[what] = self._clock()
                log.warning("%s: %s", what, error)
            return False
        if self._said.pop(what, None) is not None:
            log.info("%s: works again", what)
        return True


class Keeper:
    """One look after the other. Blocks."""

    def __init__(
        self, config: Config, *, status: NodeStatus | None, lock: Inhibitor | None
    ) -> None:
        self._config = config
        self._status = status
        self._lock = lock
        self._boot_id = processes.boot_id()
        self._complaints = Complaints()
        self._told: Condition | None = None
        self._told_at = float("-inf")

    def look(self) -> None:
        """Tell what has changed since the last look."""
        if self._config.copies is not None:
            self._complaints.attempt("certificates", self._config.copies.copy)
        if self._config.state_dir is None:
            return
        condition = Condition.of(dependence.of_state(self._config.state_dir, self._boot_id))
        if self._lock is not None:
            lock, why = self._lock, condition.message if condition.holds else ""
            self._complaints.attempt("shutdown inhibitor", lambda: lock.set(why))
        if self._status is not None:
            self._tell(self._status, condition)

    def _tell(self, status: NodeStatus, condition: Condition) -> None:
        now = time.monotonic()
        if condition == self._told and now - self._told_at < HEARTBEAT_S:
            return
        if self._complaints.attempt(
            "node condition", lambda: status.tell(condition, dt.datetime.now(dt.UTC))
        ):
            self._told, self._told_at = condition, now


async def run(config: Config) -> ExitStatus:
    """Until a signal comes, or once."""
    if config.once and config.copies is not None:
        config.copies.copy()
        return ExitStatus.OK
    status = NodeStatus.in_cluster(config.node) if config.node_condition else None
    lock = None
    if config.shutdown_inhibitor:
        if why := inhibitor.why_not():
            log.warning("a shutdown of this machine is not held off: %s", why)
        else:
            lock = Inhibitor()
    keeper = Keeper(config, status=status, lock=lock)
    try:
        with lifecycle.stop_on_signal() as stop:
            while not stop.is_set():
                # In a thread: a signal must not wait for an API server that does not answer.
                await asyncio.to_thread(keeper.look)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await stop.wait()
    finally:
        if lock is not None:
            lock.release()
    return ExitStatus.OK


def main(argv: Sequence[str] | None = None) -> ExitStatus:
    """Run; returns the exit status."""
    config = Config.from_argv(argv)
    return lifecycle.run(PROGRAM, lambda: run(config))
