# SPDX-License-Identifier: Apache-2.0
"""`make bench`: measure, judge, tell. Exit 1 if a bar is missed.

    python -m tests.bench [SECTION...] [--quick] [--rounds N] [--collect]

Each section writes build/bench/SECTION.json; --collect measures nothing and takes what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import cast

from tests.bench import bars, lanes, memory, report, streams, threads
from tests.bench.bars import Bar
from tests.bench.processes import REPO
from tests.bench.section import Result, Scale, Section

OUT = REPO / "build/bench"
SECTIONS: dict[str, Section] = {
    module.name: cast(Section, module) for module in (lanes, streams, threads, memory)
}
QUICK = ("lanes", "streams", "threads", "memory")


def _measure(section: Section, scale: Scale, out: Path) -> Result:
    begin_s = time.monotonic()
    result = section.run(scale)
    print(f"{section.name}: {time.monotonic() - begin_s:.0f} s", file=sys.stderr, flush=True)
    about = {
        "section": section.name,
        "machine": report.machine(),
        "load": os.getloadavg()[0],
        "quick": scale.quick,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{section.name}.json").write_text(json.dumps({**about, "result": result}) + "\n")
    return result


def _collect(section: Section, out: Path) -> Result:
    result: Result = json.loads((out / f"{section.name}.json").read_text())["result"]
    return result


def main(argv: list[str] | None = None, out: Path = OUT) -> int:
    """Do it; the exit status."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="minutes, without the peers")
    parser.add_argument("--rounds", type=int, help="of each section")
    parser.add_argument("--collect", action="store_true", help="judge build/bench/*.json")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    names = args.sections or (QUICK if args.quick else list(SECTIONS))
    scale = Scale(quick=args.quick, rounds=args.rounds)
    results = []
    all_bars: list[Bar] = []
    for name in names:
        section = SECTIONS[name]
        result = _collect(section, out) if args.collect else _measure(section, scale, out)
        results.append((section, result))
        all_bars += section.bars(result)
    (out / "report.md").write_text(report.text(results, all_bars))
    bars.write(all_bars, out / "bars.json")
    for section, result in results:
        print("\n".join(["", section.title, *report.markdown(section.rows(result))]))
    print("\n".join(["", report.machine(), "", *bars.table(all_bars)]), flush=True)
    return bars.exit_status(all_bars)


if __name__ == "__main__":
    sys.exit(main())
