# SPDX-License-Identifier: Apache-2.0
"""Arming a VMM that knows nothing of Godwit: a userfaultfd is made inside it, by ptrace."""

from __future__ import annotations

import asyncio
import os

from services.fault_agent.drivers.api import ArmTarget, Faults
from services.pagecore.api import Injection, PageCore


class Injected:
    """A VMM with our userfaultfd in it. There is nothing in it that could let go by itself."""

    def __init__(self, injection: Injection) -> None:
        self._open = True
        self.faults = Faults(
            backend="uffd",
            backend_reason="",
            regions=injection.regions,
            uffds=(injection.uffd,),
            remote_fd=injection.remote_fd,
        )

    @classmethod
    async def arm(cls, core: PageCore, target: ArmTarget) -> Injected:
        """Inject.

        Raises:
            OSError: of ptrace or userfaultfd.
        """
        pid = target.process.pid
        return cls(await asyncio.to_thread(core.inject_uffd, pid=pid, ram_fd=target.ram_fd))

    @classmethod
    async def take(cls, core: PageCore, target: ArmTarget) -> Injected:
        """Take the one that a former agent injected.

        Raises:
            OSError: it is not there any more, say.
        """
        return cls(
            await asyncio.to_thread(
                core.take_uffd,
                pid=target.process.pid,
                remote_fd=target.remote_fd,
                ram_fd=target.ram_fd,
            )
        )

    def close_fds(self) -> None:
        """Close ours; the VMM has its own."""
        if self._open:
            self._open = False
            os.close(self.faults.uffds[0])

    async def let_go(self) -> None:
        """Nothing: unregistering from our side is all."""

    def close(self) -> None:
        """As close_fds."""
        self.close_fds()
