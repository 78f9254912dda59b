# SPDX-License-Identifier: Apache-2.0
"""How a VM is moved, by the labels that it has: of two policies the more specific one counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum

from services.orchestrator.scheduling.model import Priority


class Mode(StrEnum):
    """How a guest's memory comes to its destination."""

    POST_COPY = "post-copy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a policy can say. None: nothing, a less specific one may."""

    priority: Priority | None = None
    bulk_bytes_per_s_max: int | None = None
    """Of the bulk lane; 0: no limit."""
    freeze_after_ms: int | None = None
    """On a lost link, freeze a guest that has been held so long; 0: never."""
    pause_ms_max: int | None = None
    """A guest whose state is not loaded at the destination by then runs on at its source."""
    prepare_s_per_gib: float | None = None
    """Beside the fixed budget of PREPARING."""
    retries: int | None = None
    """Further attempts after a failure, each after a longer back-off."""
    mode: Mode | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Settings for the VMs that a selector picks."""

    name: str
    match_labels: Mapping[str, str] = field(default_factory=dict)
    """A VM has all of them; empty: every VM."""
    settings: Settings = field(default_factory=Settings)

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether a VM is one of those."""
        return all(labels.get(key) == value for key, value in self.match_labels.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """What counts for one VM, and who said so."""

    settings: Settings
    policies: tuple[str, ...]
    """Names of those that matched, the most specific first."""


def effective(labels: Mapping[str, str], policies: Iterable[Policy]) -> Effective:
    """Each setting from the most specific policy that has it.

    More labels are more specific; of equally many the name that sorts first counts, so that the
    answer does not depend on the order in which policies were written.
    """
    matching = sorted(
        (each for each in policies if each.matches(labels)),
        key=lambda policy: (-len(policy.match_labels), policy.name),
    )
    values = {}
    for item in fields(Settings):
        said = (getattr(policy.settings, item.name) for policy in matching)
        values[item.name] = next((value for value in said if value is not None), None)
    return Effective(
        settings=Settings(**values), policies=tuple(policy.name for policy in matching)
    )
