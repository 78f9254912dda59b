# SPDX-License-Identifier: Apache-2.0
"""The demo's guest on a cluster: start it through the API, move it, wait until it proves itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from godwit.client import AsyncClient
from godwit.models import Migration, MigrationPhase

from services.common.errors import DeadlineExceededError
from services.common.vm_spec import Disk, Nic, Tap, VmSpec
from services.demo import moves
from services.demo.cluster import Cluster
from services.demo.console import Console, ConsoleFollower, Panic, Record, Sweep, parse
from services.demo.guest_image import GuestImage, Workload
from services.demo.moves import OnStep
from services.demo.network import Network
from services.demo.verdict import Setup, evidence_missing

BOOT_S_MAX = 240.0
PROOF_S_MAX = 240.0
SILENCE_S_MAX = 15.0
"""A guest that beats each 10 ms and says nothing for so long is dead."""
MAC = "52:54:00:67:77:01"
_LINES_SHOWN = 5
_LATEST_LINES = 100

_NEVER_RAN = frozenset({MigrationPhase.FAILED, MigrationPhase.CANCELLED})
"""Ends of a migration after which the guest is where it was."""


def make_spec(
    vm_id: str,
    *,
    image: GuestImage,
    workload: Workload,
    memory_bytes: int,
    vcpus: int = 1,
    disk: Path | None = None,
    network: Network | None = None,
) -> VmSpec:
    """The spec of a guest that runs `workload`.

    Under TCG: KVM of a nested host need not be able to run Linux, TCG always is.
    """
    tap = Tap(bridge=network.bridge, netns=network.netns) if network else None
    return VmSpec(
        vm_id=vm_id,
        memory_bytes=memory_bytes,
        vcpus=vcpus,
        kernel=str(image.kernel),
        initrd=str(image.initrd),
        cmdline=workload.command_line(),
        disks=(Disk(path=str(disk)),) if disk else (),
        nics=(Nic(mac=MAC, tap=tap),) if tap else (),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveGuest:
    """A guest that was started, wherever it is now.

    Attributes:
        setup: what it must prove.
        consoles: its runs, in order; grows with each move.
    """

    cluster: Cluster
    client: AsyncClient
    follower: ConsoleFollower
    vm_id: str
    setup: Setup
    consoles: list[Console]

    @classmethod
    async def start(
        cls,
        spec: VmSpec,
        node: str,
        *,
        setup: Setup,
        cluster: Cluster,
        client: AsyncClient,
        follower: ConsoleFollower,
    ) -> LiveGuest:
        """Start it on a node, through the API.

        Raises:
            GodwitClientError: the orchestrator refused or did not answer.
        """
        vm = await client.start_vm(node, spec.model_dump(mode="json"))
        guest = cls(
            cluster=cluster,
            client=client,
            follower=follower,
            vm_id=spec.vm_id,
            setup=setup,
            consoles=[],
        )
        guest.follow(node, vm.epoch)
        return guest

    @property
    def console(self) -> Console:
        """Of the run that was begun last."""
        return self.consoles[-1]

    def follow(self, node: str, epoch: int) -> Console:
        """A new run begins, or may."""
        path = self.cluster.nodes[node].console(self.vm_id, epoch)
        console = self.follower.add(path, node=node, epoch=epoch)
        self.consoles.append(console)
        return console

    async def wait_filled(self) -> None:
        """Return once the workload has filled its memory and begun to check it.

        Raises:
            DeadlineExceededError: GUEST_NOT_UP, with the end of its console.
        """
        try:
            async with asyncio.timeout(BOOT_S_MAX):
                at = await self.follower.wait_for(self.console, _begins_or_ends)
        except TimeoutError:
            raise self._not_up(f"not up after {BOOT_S_MAX:g} s") from None
        if isinstance(parse(self.console.lines[at].text), Panic):
            raise self._not_up("its kernel gave up")

    async def move(
        self, destination: str, *, on_step: OnStep, bulk_bytes_per_s_max: int = 0
    ) -> Migration:
        """Ask for a move and follow it; the last that was seen of it, whether it succeeded or not.

        Raises:
            DeadlineExceededError: MOVE_STALLED.
            GodwitClientError: the orchestrator refused or cannot be reached any more.
        """
        followed = False

        async def step(migration: Migration) -> bool:
            nonlocal followed
            if migration.epoch and not followed:
                followed = True  # from before its first line on, for the time stamps' sake
                self.follow(destination, migration.epoch)
            return await on_step(migration)

        last = await moves.move(
            self.client,
            self.vm_id,
            destination,
            on_step=step,
            bulk_bytes_per_s_max=bulk_bytes_per_s_max,
        )
        if followed and last.phase in _NEVER_RAN:
            self.consoles.pop()
        return last

    async def prove(self) -> list[str]:
        """Wait for all evidence of the run begun last: every page verified since, disk, network.

        Returns:
            What is missing when the guest is dead or the time is up; empty: nothing.
        """
        missing = ["nothing was looked at"]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROOF_S_MAX):
                while missing := evidence_missing(self.setup, self.console):
                    if self._is_dead():
                        break
                    await asyncio.sleep(0.05)
        return missing

    @property
    def is_silent(self) -> bool:
        """It spoke in the run begun last, and has not for longer than a living guest would."""
        lines = self.console.lines
        return bool(lines) and time.monotonic_ns() - lines[-1].t_ns > SILENCE_S_MAX * 1e9

    def _is_dead(self) -> bool:
        latest = self.console.lines[-_LATEST_LINES:]
        return self.is_silent or any(isinstance(parse(line.text), Panic) for line in latest)

    def _not_up(self, why: str) -> DeadlineExceededError:
        said = "; ".join(line.text for line in self.console.lines[-_LINES_SHOWN:])
        return DeadlineExceededError("GUEST_NOT_UP", f"{self.vm_id}: {why}: {said or 'silence'}")


def _begins_or_ends(record: Record) -> bool:
    return isinstance(record, Panic) or (isinstance(record, Sweep) and record.state == "begin")
