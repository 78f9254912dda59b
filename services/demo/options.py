# SPDX-License-Identifier: Apache-2.0
"""What a demo is told, and whom it tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from godwit.models import Migration

from services.demo.sabotage import Harm

MIB = 1 << 20


class Narrator(Protocol):
    """Tells whoever watches."""

    def step(self, text: str) -> None:
        """Something begins or is done."""

    def note(self, text: str) -> None:
        """Something that weakens what the demo shows."""

    def migration(self, migration: Migration) -> None:
        """A migration has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to do.

    Attributes:
        memory_bytes: of the guest; a multiple of 2 MiB.
        workload_mib: of it, what the guest fills and checks.
        dirty_rate: pages that it rewrites a second; 0 = no limit.
        vcpus: of the guest.
        vmm: "qemu", "microvm", or "auto": QEMU where it can run and move, else a microvm.
        accel: of a microvm: "auto", "kvm" or "thread".
        fault_backend: of a microvm; docs/exit-channel.md.
        directory: for state and logs, must not exist; None = a new one that goes at the end.
        keep: it stays even so.
        harm: for tests.
        tls: every part has certificates, and speaks nothing else.
    """

    memory_bytes: int = 512 * MIB
    workload_mib: int = 256
    dirty_rate: int = 2000
    vcpus: int = 1
    vmm: str = "auto"
    accel: str = "auto"
    fault_backend: str = "auto"
    directory: Path | None = None
    keep: bool = False
    harm: Harm | None = None
    tls: bool = False
