# SPDX-License-Identifier: Apache-2.0
"""A Linux guest under QEMU among the guests that are moved: judged by what it says on its consoles.

Each of its runs has a console of its own. Together they must tell of one guest: heartbeats by one,
no run that speaks after its successor, one boot, no wrong page.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from godwit.client import AsyncClient

from services.demo.cluster import Cluster
from services.demo.console import Console, ConsoleFollower, Heartbeat, PageError, Panic, parse
from services.demo.console import Sweep as ConsoleSweep
from services.demo.guest_image import GuestImage, Workload
from services.demo.live_guest import make_spec
from tests.chaos.beats import Beat, Beats
from tests.chaos.guests import Guest, Sweep

MIB = 1 << 20
MEMORY_MIB = 128
WORKLOAD_MIB = 32
SWEEP_MS = 500
BOOT_S_MAX = 240.0
_EPOCH = re.compile(r"console-(\d+)\.log")


@dataclass(slots=True)
class _Run:
    node: str
    epoch: int
    console: Console
    done: int = 0


class ConsoleLog(Beats):
    """The beats of all consoles of a guest, in the order in which they were heard."""

    def __init__(self, directories: dict[str, Path], follower: ConsoleFollower) -> None:
        super().__init__(vcpu_count=1)
        self._directories = directories
        self._follower = follower
        self._runs: dict[tuple[str, int], _Run] = {}
        self._tail = ""
        self.errors = 0
        """Pages that the guest has found wrong, ever."""

    @property
    def consoles(self) -> list[Console]:
        """Of all runs, by epoch."""
        return [
            run.console for _, run in sorted(self._runs.items(), key=lambda item: item[1].epoch)
        ]

    def poll(self) -> list[Beat]:
        """Read what is new on all consoles, and judge it."""
        self._find()
        news = []
        for run in self._runs.values():
            lines = run.console.lines
            while run.done < len(lines):
                news.append((lines[run.done], run, run.done == 0))
                run.done += 1
        beats = []
        for line, run, first in sorted(news, key=lambda item: item[0].t_ns):
            text = self._tail_of_others(run) + line.text if first else line.text
            record = parse(text)
            if isinstance(record, PageError | Panic):
                self.errors += isinstance(record, PageError)
                self.tell(f"{run.node}: {text}")
            if isinstance(record, Heartbeat):
                beats.append(Beat(number=record.number, t_ns=line.t_ns, pid=run.epoch, vcpu=0))
        for beat in beats:
            self.judge(beat)
        return beats

    def close(self) -> None:
        """Nothing: the follower reads on until it is closed itself."""

    def _find(self) -> None:
        for node, directory in self._directories.items():
            for path in directory.glob("console-*.log"):
                match = _EPOCH.fullmatch(path.name)
                key = (node, int(match[1])) if match else None
                if key is not None and key not in self._runs:
                    console = self._follower.add(path, node=node, epoch=key[1])
                    self._runs[key] = _Run(node, key[1], console)

    def _tail_of_others(self, run: _Run) -> str:
        """What a stop cut off: the run before ends in half a line, this one says the rest."""
        before = [
            each for each in self._runs.values() if each.epoch < run.epoch and each.console.tail
        ]
        return max(before, key=lambda each: each.epoch).console.tail.rstrip("\r") if before else ""


@dataclass(slots=True, kw_only=True)
class QemuGuest(Guest):
    """A guest of QEMU under TCG. Without disk and network: they are the business of the demo."""

    log: ConsoleLog
    is_heard_on_disk: ClassVar[bool] = True
    is_swept_beside: ClassVar[bool] = False
    tells_restarts: ClassVar[bool] = False

    @classmethod
    async def boot(
        cls,
        node: str,
        image: GuestImage,
        follower: ConsoleFollower,
        *,
        cluster: Cluster,
        client: AsyncClient,
        number: int,
    ) -> QemuGuest:
        """Start one and wait until it has filled its memory and checks it."""
        spec = make_spec(
            f"qemu-{number}",
            image=image,
            workload=Workload(mib=WORKLOAD_MIB, dirty_rate=200, sweep_ms=SWEEP_MS),
            memory_bytes=MEMORY_MIB * MIB,
        )
        await client.start_vm(node, spec.model_dump(mode="json"))
        directories = {name: parts.vm_dir(spec.vm_id) for name, parts in cluster.nodes.items()}
        log = ConsoleLog(directories, follower)
        guest = cls(cluster=cluster, client=client, spec=spec, node=node, log=log)
        async with asyncio.timeout(BOOT_S_MAX):
            await guest.sweep()
        return guest

    @property
    def kind(self) -> str:
        """As of a microvm: accelerator and fault backend."""
        return "qemu/uffd"

    @property
    def page_count(self) -> int:
        """Pages that a sweep verifies."""
        return WORKLOAD_MIB * 256

    async def sweep(self) -> Sweep:
        """Wait until it has begun and ended a pass over all its pages."""
        since_ns = time.monotonic_ns()
        while True:
            self.log.poll()
            begun = set()
            for console in self.log.consoles:
                for line in console.lines[-200:]:
                    record = parse(line.text)
                    if not isinstance(record, ConsoleSweep) or line.since_ns < since_ns:
                        continue
                    if record.state == "begin":
                        begun.add(record.number)
                    elif record.state == "end" and record.number in begun:
                        return Sweep(pages=record.verified, errors=record.errors)
            await asyncio.sleep(0.02)
