# SPDX-License-Identifier: Apache-2.0
"""`make bench`: measure, judge, tell. Exit 1 if a bar is missed.

    make bench ARGS="[SECTION...] [--rounds N] [--more] [--collect] [--docs]"

Each section writes build/bench/SECTION.json; the report is there too, or in docs/bench (--docs, for
all sections).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench import bars, child, counts, report
from tests.bench.bars import Bar
from tests.bench.processes import REPO
from tests.bench.section import Result, Scale, Section, failed, joined, why_failed
from tests.bench.sections import LIMITS_S, MOVES_SHARE, QUICK, SECTIONS, WHOLE_S

OUT = REPO / "build/bench"
DOCS = REPO / "docs/bench"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="some minutes, without the peers")
    parser.add_argument("--rounds", type=int, help="of each section")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of a section of moves")
    parser.add_argument("--more", action="store_true", help="add to build/bench/SECTION.json")
    parser.add_argument("--collect", action="store_true", help="measure nothing: judge build/bench")
    parser.add_argument("--docs", action="store_true", help="write docs/bench/page-path.md")
    parser.add_argument(
        "--reference", action="store_true", help="what is counted now is what it shall cost"
    )
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    args.sections = args.sections or list(QUICK if args.quick else SECTIONS)
    if args.docs and set(args.sections) != SECTIONS.keys():
        parser.error("--docs is for all sections")
    return args


def _measure(section: Section, scale: Scale, path: Path, limit_s: float, *, more: bool) -> Result:
    """Measure in a process of its own; what it found is in `path`, too."""
    before = _collect(path) if more and path.exists() else {}
    begin_s = time.monotonic()
    scale = replace(scale, seconds=min(scale.seconds, MOVES_SHARE * limit_s))
    print(f"{section.name} ...", file=sys.stderr, flush=True)
    result = child.measure(section.name, scale, path, limit_s)
    elapsed_s = time.monotonic() - begin_s
    how = why_failed(result) or "measured"
    print(f"{section.name}: {elapsed_s:.0f} s, {how}", file=sys.stderr, flush=True)
    if before and not why_failed(before):
        # Rounds that failed take none away.
        result = before if why_failed(result) else joined(before, result)
    about: dict[str, Any] = {
        "section": section.name,
        "machine": report.machine(),
        "load": os.getloadavg()[0],
        "elapsed_s": elapsed_s,
        "quick": scale.quick,
    }
    path.write_text(json.dumps({**about, "result": result}) + "\n")
    return result


def _collect(path: Path) -> Result:
    result: Result = json.loads(path.read_text())["result"]
    return result


def _judge(results: dict[str, Result], names: Sequence[str], path: Path) -> list[Bar]:
    """Every bar of `names`; those that are not measured yet are missed, until they are."""
    found: list[Bar] = []
    for name in names:
        section, result = SECTIONS[name], results.get(name, failed("not reached"))
        try:
            found += section.bars(result)
        except (KeyError, ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            found += section.bars(failed(f"the result is not whole: {error!r}"))
    bars.write(found, path)
    return found


def main(argv: Sequence[str] | None = None, out: Path = OUT, docs: Path = DOCS) -> int:
    """Do it; the exit status."""
    args = _arguments(argv)
    scale = Scale(quick=args.quick, rounds=args.rounds, seconds=args.seconds)
    # Somebody who says how many rounds knows how long they take.
    is_bounded = args.rounds is None
    end_s = time.monotonic() + WHOLE_S
    results: dict[str, Result] = {}
    out.mkdir(parents=True, exist_ok=True)
    for name in args.sections:
        path = out / f"{name}.json"
        _judge(results, args.sections, out / "bars.json")
        if args.collect:
            results[name] = _collect(path)
        elif is_bounded and end_s - time.monotonic() < 1:
            results[name] = failed(f"{WHOLE_S / 60:.0f} minutes were over before")
        else:
            limit_s = min(LIMITS_S[name], end_s - time.monotonic()) if is_bounded else math.inf
            results[name] = _measure(SECTIONS[name], scale, path, limit_s, more=args.more)
        if name == counts.name and args.reference and not why_failed(results[name]):
            counts.write_reference(results[name])
    all_bars = _judge(results, args.sections, out / "bars.json")
    told = [(SECTIONS[name], result) for name, result in results.items()]
    for section, result in told:
        print("\n".join(["", section.title, *report.table_of(section, result)]))
    try:
        report.write(told, all_bars, docs if args.docs else out)
    except Exception:  # noqa: BLE001 - a plot that cannot be drawn changes no verdict
        traceback.print_exc()
    print("\n".join(["", report.machine(), "", *bars.table(all_bars)]), flush=True)
    return bars.exit_status(all_bars)


if __name__ == "__main__":
    sys.exit(main())
