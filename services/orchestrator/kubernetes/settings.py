# SPDX-License-Identifier: Apache-2.0
"""How the controller is set up. Imports nothing of Kubernetes: most orchestrators need none."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from services.common.listen import Address

TTL_S = 86_400


class OnCordon(StrEnum):
    """What a cordon of a node does."""

    DRAIN = "drain"
    IGNORE = "ignore"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTimes:
    """Seconds. Others may hold it after `duration_s` without a renewal; we give up before."""

    duration_s: float = 15.0
    renew_s: float = 10.0
    """Without a renewal for so long it is not ours any more."""
    retry_s: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of the controller."""

    kubeconfig: Path | None = None
    """None: the service account of this pod."""
    namespace: str = ""
    """Where the VMs' pods and VMMigrations are. Empty: everywhere."""
    lease_namespace: str = "default"
    lease: LeaseTimes = field(default_factory=LeaseTimes)
    on_cordon: OnCordon = OnCordon.DRAIN
    when_uncordoned: str = "Open"
    """Open or Return, as NodeDrain.spec.whenDeleted."""
    ttl_s: int = TTL_S
    """How long a VMMigration stays after its end, where it does not say."""
    webhook: Address | None = None
    """Where the API server asks about evictions; None: nowhere."""
    webhook_tls_dir: Path | None = None
    """With tls.crt and tls.key, as a Secret of type kubernetes.io/tls has them."""
