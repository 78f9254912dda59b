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
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tests.bench import bars, counts, lanes, memory, report, sizes, streams, threads
from tests.bench.bars import Bar
from tests.bench.peers import section as peers
from tests.bench.processes import REPO
from tests.bench.section import Result, Scale, Section, joined

OUT = REPO / "build/bench"
DOCS = REPO / "docs/bench"
_MODULES = (lanes, streams, threads, memory, sizes, counts)
_PEERS = (peers.UNCAPPED, peers.FAST, peers.SLOW)
SECTIONS: dict[str, Section] = {found.name: cast(Section, found) for found in (*_MODULES, *_PEERS)}
QUICK = ("lanes", "streams", "threads", "memory", "counts")


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


def _measure(section: Section, scale: Scale, path: Path, *, more: bool) -> Result:
    begin_s = time.monotonic()
    result = section.run(scale)
    elapsed_s = time.monotonic() - begin_s
    print(f"{section.name}: {elapsed_s:.0f} s", file=sys.stderr, flush=True)
    if more and path.exists():
        result = joined(_collect(path), result)
    about: dict[str, Any] = {
        "section": section.name,
        "machine": report.machine(),
        "load": os.getloadavg()[0],
        "elapsed_s": elapsed_s,
        "quick": scale.quick,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "result": result}) + "\n")
    return result


def _collect(path: Path) -> Result:
    result: Result = json.loads(path.read_text())["result"]
    return result


def main(argv: Sequence[str] | None = None, out: Path = OUT, docs: Path = DOCS) -> int:
    """Do it; the exit status."""
    args = _arguments(argv)
    # Ended by whomever, what was started is taken down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scale = Scale(quick=args.quick, rounds=args.rounds, seconds=args.seconds)
    results: dict[str, Result] = {}
    all_bars: list[Bar] = []
    for name in args.sections:
        path = out / f"{name}.json"
        section = SECTIONS[name]
        results[name] = (
            _collect(path) if args.collect else _measure(section, scale, path, more=args.more)
        )
        if name == counts.name and args.reference:
            counts.write_reference(results[name])
        all_bars += section.bars(results[name])
    bars.write(all_bars, out / "bars.json")
    told = [(SECTIONS[name], result) for name, result in results.items()]
    report.write(told, all_bars, docs if args.docs else out)
    for section, result in told:
        print("\n".join(["", section.title, *report.markdown(section.rows(result))]))
    print("\n".join(["", report.machine(), "", *bars.table(all_bars)]), flush=True)
    return bars.exit_status(all_bars)


if __name__ == "__main__":
    sys.exit(main())
