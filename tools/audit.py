# SPDX-License-Identifier: Apache-2.0
"""Say which pinned packages have a published vulnerability.

Usage: python -m tools.audit [--advisories FILE_OR_DIR] [--service URL] [--ignore ID ...]

Without --advisories the OSV service is asked, once, about requirements.lock; with it, advisories in
OSV's format (one or a list a file, as https://osv.dev offers for download) are matched here, for
machines that reach nothing. An advisory that was looked at and does not concern us is named by
--ignore, in the Makefile, with the reason beside it.

Exit status: 0 nothing is known; 1 something is, each on a line; 3 the service could not be asked:
nothing was checked, and a pipeline may let that pass (`make audit` does, and says so).

Source: https://google.github.io/osv.dev/post-v1-querybatch/, https://ossf.github.io/osv-schema/.
"""

from __future__ import annotations

import argparse
import enum
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from tools.sbom import normalised, pins

ROOT = Path(__file__).resolve().parent.parent
SERVICE = "https://api.osv.dev/v1/querybatch"
TIMEOUT_S = 20

Finding = tuple[str, str, str]
"""Package, version, advisory."""


class Exit(enum.IntEnum):
    """What a pipeline is told."""

    CLEAN = 0
    VULNERABLE = 1
    NOT_CHECKED = 3


class NotCheckedError(Exception):
    """Nobody could be asked."""


def ask(service: str, locked: Mapping[str, str]) -> list[Finding]:
    """What the service knows.

    Raises:
        NotCheckedError: it cannot be reached, or says something else.
    """
    wanted = sorted(locked.items())
    queries = [
        {"package": {"ecosystem": "PyPI", "name": name}, "version": version}
        for name, version in wanted
    ]
    request = urllib.request.Request(  # noqa: S310 - the scheme is the operator's
        service,
        data=json.dumps({"queries": queries}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            results = json.load(answer)["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotCheckedError(f"{service}: {error}") from error
    if not isinstance(results, list) or len(results) != len(wanted):
        raise NotCheckedError(f"{service}: it did not answer {len(wanted)} questions")
    return [
        (name, version, advisory["id"])
        for (name, version), result in zip(wanted, results, strict=True)
        for advisory in result.get("vulns") or ()
    ]


def advisories(path: Path) -> Iterator[dict[str, Any]]:
    """Those of a file, or of every .json in a directory.

    Raises:
        NotCheckedError: it cannot be read.
    """
    try:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            content = json.loads(file.read_text())
            yield from content if isinstance(content, list) else [content]
    except (OSError, ValueError) as error:
        raise NotCheckedError(f"{path}: {error}") from error


def match(known: Iterable[Mapping[str, Any]], locked: Mapping[str, str]) -> list[Finding]:
    """Which of them concern what is locked."""
    found = []
    for advisory in known:
        if advisory.get("withdrawn"):
            continue
        for affected in advisory.get("affected", ()):
            package = affected.get("package", {})
            name = normalised(package.get("name", ""))
            if package.get("ecosystem") != "PyPI" or name not in locked:
                continue
            if _is_affected(affected, locked[name]):
                found.append((name, locked[name], advisory["id"]))
    return sorted(set(found))


def _is_affected(affected: Mapping[str, Any], version: str) -> bool:
    if version in affected.get("versions", ()):
        return True
    return any(
        _is_in(item.get("events", ()), Version(version))
        for item in affected.get("ranges", ())
        if item.get("type") == "ECOSYSTEM"
    )


def _is_in(events: Iterable[Mapping[str, str]], version: Version) -> bool:
    """By the schema's algorithm: the last event at or below the version decides."""
    inside = False
    ordered = sorted(
        ((kind, _version(text)) for event in events for kind, text in event.items()),
        key=lambda item: (item[1], item[0] != "introduced"),
    )
    for kind, at in ordered:
        if kind == "introduced" and at <= version:
            inside = True
        elif (kind == "fixed" and at <= version) or (kind == "last_affected" and at < version):
            inside = False
    return inside


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        return Version("0")  # "introduced": "0", and what nobody can order: affected from the start


def main(argv: Sequence[str]) -> Exit:
    """Check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--advisories", type=Path)
    parser.add_argument("--service", default=SERVICE)
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements.lock")
    parser.add_argument("--ignore", action="append", default=[], metavar="ID")
    args = parser.parse_args(argv)
    locked = pins(args.lock.read_text())
    try:
        if args.advisories:
            found = match(advisories(args.advisories), locked)
        else:
            found = ask(args.service, locked)
    except NotCheckedError as error:
        print(f"audit: NOTHING WAS CHECKED: {error}", file=sys.stderr)
        return Exit.NOT_CHECKED
    found = [item for item in found if item[2] not in args.ignore]
    for name, version, advisory in found:
        print(f"audit: {name} {version}: {advisory}")
    print(f"audit: {len(locked)} packages, {len(found)} known vulnerabilities")
    return Exit.VULNERABLE if found else Exit.CLEAN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
