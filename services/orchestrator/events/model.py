# SPDX-License-Identifier: Apache-2.0
"""A change, as it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from google.protobuf.message import Message


class Kind(StrEnum):
    """What a change is about; its name in REST."""

    MIGRATION = "migration"
    OPERATION = "operation"
    NODE = "node"


Subject = tuple[Kind, str]
"""A migration, an operation or a node, by its id."""


@dataclass(slots=True, kw_only=True)
class Change:
    """A subject as it was once."""

    subject: Subject
    message: Message
    """Of godwit.fleet.v1: Migration, Operation or Node."""
    version: int
    """Rises with every write of the subject; 0 where it has none."""
    ended: bool = False
    """It is the last one."""
    moves: Subject | None = None
    """What has changed with it."""
    sequence: int = 0
    """Given by the ring."""
    rendered: dict[str, bytes] = field(default_factory=dict)
    """Its forms on the wire, each made once for all watchers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Began:
    """A stream has begun, and nothing was missed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """Changes were missed that are not kept any more."""

    reason: str = "EVENTS_GONE"
    message: str = "changes since then are not kept here any more"
    hint: str = "list again what you show, then go on with what comes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """Nothing has changed for a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a watcher is told, and where he is then."""

    what: Change | Began | Reset | Silence
    position: str
    """To go on after it."""
