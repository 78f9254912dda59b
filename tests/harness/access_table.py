# SPDX-License-Identifier: Apache-2.0
"""What each kind of caller is answered where all speak TLS: the tables of docs/api-access.md.

They follow from the rules; `python -m tests.harness.access_table` writes them into the document.
tests/unit/test_rules.py holds the two against each other, tests/unit/auth/test_matrix.py asks
running servers for every cell, as it stands in the document.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from services.common.auth.identity import Caller
from services.common.auth.rules import RULES, Rule

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "api-access.md"

NO_CONNECTION = ("wrong authority", "expired")
"""Whoever shows such a certificate is hung up on in the handshake."""
REPLAYED = "replayed token"
"""On a connection whose certificate alone would do, where there must be one."""
CALLERS: Mapping[str, Caller | None] = {
    "nobody": None,
    "wrong authority": Caller.ADMIN,
    "expired": Caller.ADMIN,
    "viewer": Caller.VIEWER,
    "operator": Caller.OPERATOR,
    "admin": Caller.ADMIN,
    "node itself": Caller.NODE,
    "other node": Caller.NODE,
    "orchestrator": Caller.ORCHESTRATOR,
    REPLAYED: None,
}
FETCH = "godwit.page.v1.PageService/Fetch"
_WAYS = {"REST": "route", "gRPC": "rpc"}


def answer(rule: Rule, who: str, *, grpc: bool) -> str:
    """What it is: ok, 401, 403, or TLS where there is no connection."""
    if who in NO_CONNECTION or (grpc and who == "nobody"):
        return "TLS"
    if who == REPLAYED and rule.native:
        # Fetch tokens are looked at there, and only where pages are read.
        return "403" if rule.rpc == FETCH else "ok"
    if not rule.callers:
        return "ok"
    caller = CALLERS[who]
    if caller is None:
        return "401"
    if caller not in rule.callers or (who == "other node" and rule.own):
        return "403"
    return "ok"


def _header(way: str) -> str:
    return f"| {way} | {' | '.join(CALLERS)} |"


def _table(way: str) -> list[str]:
    grpc = way == "gRPC"
    return [
        _header(way),
        "|" + "---|" * (1 + len(CALLERS)),
        *(
            f"| `{name}` | {' | '.join(answer(rule, who, grpc=grpc) for who in CALLERS)} |"
            for rule in RULES
            if (name := getattr(rule, _WAYS[way]))
        ),
    ]


def _find(lines: list[str], way: str) -> slice:
    """Where that table stands."""
    start = next(at for at, line in enumerate(lines) if line.startswith(f"| {way} |"))
    end = next(at for at in range(start, len(lines)) if not lines[at].startswith("|"))
    return slice(start, end)


def expected() -> str:
    """The document, with the tables that follow from the rules."""
    lines = DOCUMENT.read_text().splitlines()
    for way in _WAYS:
        lines[_find(lines, way)] = _table(way)
    return "\n".join(lines) + "\n"


def documented(way: str) -> dict[tuple[str, str], str]:
    """(call, caller) → answer, as it stands in the document. `way`: REST or gRPC."""
    lines = DOCUMENT.read_text().splitlines()
    header, _, *rows = (
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in lines[_find(lines, way)]
    )
    return {
        (row[0], who): cell for row in rows for who, cell in zip(header[1:], row[1:], strict=True)
    }


if __name__ == "__main__":
    DOCUMENT.write_text(expected())
