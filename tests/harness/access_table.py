# SPDX-License-Identifier: Apache-2.0
"""What each kind of caller is answered, as docs/api-access.md has it."""

from __future__ import annotations

from pathlib import Path

from services.common.auth.identity import Caller
from services.common.auth.rules import RULES, Rule

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "api-access.md"
CALLERS: dict[str, Caller | None] = {
    "nobody": None,
    "viewer": Caller.VIEWER,
    "operator": Caller.OPERATOR,
    "admin": Caller.ADMIN,
    "node itself": Caller.NODE,
    "other node": Caller.NODE,
    "orchestrator": Caller.ORCHESTRATOR,
}
HEADER = f"| call | {' | '.join(CALLERS)} |"
RULER = "|" + "---|" * (1 + len(CALLERS))


def answer(rule: Rule, who: str) -> str:
    """What it is: ok, 401 or 403."""
    caller = CALLERS[who]
    if not rule.callers:
        return "ok"
    if caller is None:
        return "401"
    if caller not in rule.callers or (who == "other node" and rule.own):
        return "403"
    return "ok"


def row(rule: Rule) -> str:
    """The rule's line."""
    name = ", ".join(f"`{each}`" for each in (rule.route, rule.rpc) if each)
    return f"| {name} | {' | '.join(answer(rule, who) for who in CALLERS)} |"


def rows() -> list[str]:
    """The lines of the table."""
    return [HEADER, RULER, *map(row, RULES)]


def documented() -> list[str]:
    """The lines as they stand in the document."""
    lines = DOCUMENT.read_text().splitlines()
    start = lines.index(HEADER)
    return [line for line in lines[start : start + 200] if line.startswith("|")]
