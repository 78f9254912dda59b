# SPDX-License-Identifier: Apache-2.0
"""The part of requirements.lock that an image needs: print it, with its hashes.

    python -m tools.runtime_lock orchestrator|page-server|fault-agent

What the project depends on, less what only other images' services import, and all that those need,
by the metadata of what is installed here. Nothing is resolved: every line is the lock's.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
_ORCHESTRATOR_ONLY = frozenset(
    {"fastapi", "uvicorn", "sse-starlette", "sqlalchemy", "asyncpg", "alembic", "greenlet"}
    | {"kubernetes", "httpx-sse"}
)
LEFT_OUT: Mapping[str, frozenset[str]] = {
    "orchestrator": frozenset(),
    "page-server": _ORCHESTRATOR_ONLY,
    "fault-agent": _ORCHESTRATOR_ONLY,
}
"""Direct dependencies that no service of the image imports; the smoke test would see a mistake."""


def lock_entries(text: str) -> dict[str, str]:
    """Each pin of a lock with its hashes, by name."""
    entries = re.split(r"(?m)^(?=[A-Za-z0-9])", text)
    return {
        canonicalize_name(re.split(r"[=\[]", entry, maxsplit=1)[0]): entry.rstrip() + "\n"
        for entry in entries
        if entry.strip() and not entry.startswith("#")
    }


def closure(roots: Iterable[Requirement]) -> set[str]:
    """Names of all that `roots` need, with the extras that are asked for."""
    waiting = list(roots)
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        each = waiting.pop()
        key = (canonicalize_name(each.name), frozenset(each.extras))
        if key in seen:
            continue
        seen.add(key)
        for text in metadata.requires(each.name) or ():
            needed = Requirement(text)
            extras = each.extras or {""}
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in {"", *extras}
            ):
                waiting.append(needed)
    return {name for name, _ in seen}


def runtime_lock(image: str) -> str:
    """The lines for one image.

    Raises:
        KeyError: there is no such image, or the lock lacks something that is needed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    roots = [Requirement(text) for text in project["dependencies"]]
    left_out = LEFT_OUT[image]
    wanted = closure(each for each in roots if canonicalize_name(each.name) not in left_out)
    pins = lock_entries((ROOT / "requirements.lock").read_text())
    return "".join(pins[name] for name in sorted(wanted))


def main() -> int:
    """Print it."""
    if len(sys.argv) != 2 or sys.argv[1] not in LEFT_OUT:
        print(f"usage: runtime_lock {'|'.join(LEFT_OUT)}", file=sys.stderr)
        return 2
    sys.stdout.write(runtime_lock(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
