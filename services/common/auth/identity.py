# SPDX-License-Identifier: Apache-2.0
"""Who calls: a person with a role, a node, an orchestrator."""

from __future__ import annotations

import contextlib
import contextvars
import enum
from collections.abc import Iterator
from dataclasses import dataclass


class Caller(enum.StrEnum):
    """What somebody is. The values are those of certificates (services.common.certificates)."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"
    NODE = "node"
    ORCHESTRATOR = "orchestrator"


ROLES = (Caller.VIEWER, Caller.OPERATOR, Caller.ADMIN)
"""Of people and of their programs, the least first: each may what those before it may."""


def at_least(role: Caller) -> frozenset[Caller]:
    """Everybody whose role is `role` or more."""
    return frozenset(ROLES[ROLES.index(role) :])


class How(enum.StrEnum):
    """By what somebody was recognised."""

    NOTHING = "nothing"
    """Nobody is asked: no authentication is set up, and only this machine can call."""
    TOKEN = "token"  # noqa: S105 - a word
    OIDC = "oidc"
    CERTIFICATE = "certificate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Somebody who was recognised."""

    name: str
    """Of the person, the program, the node. Empty for an orchestrator."""
    caller: Caller | None
    """None: recognised, and nobody here has given him a role."""
    how: How

    def __str__(self) -> str:
        return f"{self.caller or 'nobody'} {self.name}".rstrip()


LOCAL = Identity(name="local", caller=Caller.ADMIN, how=How.NOTHING)
"""Whoever calls where nobody is asked."""

_current: contextvars.ContextVar[Identity] = contextvars.ContextVar("identity", default=LOCAL)


def current() -> Identity:
    """On whose behalf this task works; LOCAL outside a call."""
    return _current.get()


@contextlib.contextmanager
def acting(identity: Identity) -> Iterator[None]:
    """Work on behalf of `identity` for the length of the block."""
    token = _current.set(identity)
    try:
        yield
    finally:
        _current.reset(token)


def become(identity: Identity) -> None:
    """Work on behalf of `identity` until this task ends."""
    _current.set(identity)


def signature(said: str) -> str:
    """Who did something, for the history: as recognised, and as he called himself."""
    known = current()
    if known.how is How.NOTHING or known.name == said:
        return said
    return f"{known.name} ({said})" if said else known.name
