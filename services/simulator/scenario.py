# SPDX-License-Identifier: Apache-2.0
"""Scenario files: a fleet, its limits, and what is done to it when (docs/scale.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.common.errors import InvalidArgumentError

_COUNT_MAX = 200_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Node(_Strict):
    """What each node is."""

    memory_gib: int = Field(default=512, ge=1)
    bandwidth_gbit_s: float = Field(default=25, gt=0)
    """Of its network card, each way."""


class FleetShape(_Strict):
    """The fleet at the beginning: equal racks of equal nodes, VMs dealt out evenly."""

    racks: int = Field(default=1, ge=1, le=10_000)
    nodes_per_rack: int = Field(default=20, ge=1, le=10_000)
    vms_per_node: int = Field(default=10, ge=0, le=1000)
    vm_memory_gib: tuple[int, ...] = Field(default=(2, 4, 8), min_length=1)
    """Each VM has one of these, drawn by the seed."""
    node: Node = Node()
    uplink_gbit_s: float = Field(default=100, gt=0)
    """Of a rack, each way."""
    groups: int = Field(default=0, ge=0)
    """So many VMs of each two nodes share a group; 0: none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.racks * self.nodes_per_rack * max(self.vms_per_node, 1) > _COUNT_MAX:
            raise ValueError(f"a fleet has at most {_COUNT_MAX} VMs")
        return self


class Drain(_Strict):
    """Empty nodes, all at once; they stay empty."""

    kind: Literal["drain"]
    at_s: float = Field(default=0, ge=0)
    racks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
    """Named rN-nM."""
    order: Literal["smallest-first", "largest-first"] = "smallest-first"


class Rollout(_Strict):
    """Empty, reboot and give back every node, some at a time, as a kernel update does."""

    kind: Literal["rollout"]
    at_s: float = Field(default=0, ge=0)
    nodes_at_once: int = Field(default=4, ge=1)
    reboot_s: float = Field(default=300, ge=0)
    nodes: int = Field(default=0, ge=0)
    """Only the first so many; 0: all."""


class Cut(_Strict):
    """A rack's uplink is down for a while: moves through it wait, none is failed."""

    kind: Literal["cut"]
    at_s: float = Field(ge=0)
    rack: int = Field(ge=0)
    for_s: float = Field(gt=0)


class Storm(_Strict):
    """Single moves are asked for, of VMs drawn by the seed, evenly over a time."""

    kind: Literal["storm"]
    at_s: float = Field(default=0, ge=0)
    moves: int = Field(ge=1, le=_COUNT_MAX)
    over_s: float = Field(default=60, ge=0)
    priority: Literal["background", "maintenance", "user", "system"] = "user"


class SetLimits(_Strict):
    """Change limits live."""

    kind: Literal["limits"]
    at_s: float = Field(ge=0)
    values: dict[str, int]


class Freeze(_Strict):
    """The emergency stop, for a while."""

    kind: Literal["freeze"]
    at_s: float = Field(ge=0)
    for_s: float = Field(gt=0)


Happening = Drain | Rollout | Cut | Storm | SetLimits | Freeze


class Scenario(_Strict):
    """A file."""

    name: str
    seed: int = 1
    fleet: FleetShape = FleetShape()
    limits: dict[str, int] = {}
    """As `godwit limits set` takes them."""
    overhead_s: float = Field(default=0.6, ge=0)
    """Of a move, before its memory flows: checks, preparation, the pause."""
    fail_share: float = Field(default=0, ge=0, lt=1)
    """Of moves, drawn by the seed, that fail before their decision and are tried again."""
    happenings: tuple[Happening, ...] = Field(min_length=1)
    until_s: float = Field(default=1e6, gt=0)
    """When the simulation ends at the latest."""


def load(path: Path) -> Scenario:
    """Read a scenario.

    Raises:
        InvalidArgumentError: SCENARIO_INVALID, naming each field that is wrong and why.
    """
    try:
        return Scenario.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except pydantic.ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors()
        )
        raise InvalidArgumentError("SCENARIO_INVALID", f"{path}: {wrong}") from error
    except (OSError, yaml.YAMLError) as error:
        raise InvalidArgumentError("SCENARIO_INVALID", f"{path}: {error}") from error
