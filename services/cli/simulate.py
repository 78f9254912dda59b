# SPDX-License-Identifier: Apache-2.0
"""`godwit simulate`: what the scheduling does to a large fleet, on a virtual clock."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.exit_status import ExitStatus
from services.cli.output import columns

if TYPE_CHECKING:
    from services.simulator.run import Report

_SHOWN_MAX = 10


def simulate(
    scenario: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A scenario (docs/scale.md), or the name of one that comes along."
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Nothing but the last line, which is JSON.")
    ] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Instead of the file's.")] = None,
) -> None:
    """Play a scenario through the orchestrator's scheduling, and judge it by its log.

    The last line is JSON. Exit status 6 if a limit was exceeded or a move starved.
    """
    from services.simulator.run import simulate as play
    from services.simulator.scenario import load

    read = load(_find(scenario))
    report = play(read if seed is None else read.model_copy(update={"seed": seed}))
    if not as_json:
        _explain(report)
    print(report.line(), flush=True)
    raise typer.Exit(ExitStatus.OK if report.ok else ExitStatus.MIGRATION_FAILED)


def _find(name: str) -> Path:
    """A file, or one that comes along."""
    import services.simulator

    path = Path(name)
    along = Path(services.simulator.__file__).parent / "scenarios" / f"{name}.yaml"
    return along if not path.exists() and along.exists() else path


def _explain(report: Report) -> None:
    rows = [
        [
            course.what,
            f"{course.moved}/{course.asked}",
            f"{course.ended_s - course.began_s:.1f} s",
            f"{course.planned_s:.1f} s" if course.planned_s else "",
            f"{course.lower_bound_s:.1f} s",
            f"{course.makespan_ratio:.2f}",
        ]
        for course in report.courses
    ]
    header = ["WHAT", "MOVED", "TOOK", "PLANNED", "AT LEAST", "RATIO"]
    print(columns(header, rows, empty="nothing was moved"))
    for what, found in (
        ("limit exceeded", report.findings.violations),
        ("starved", report.findings.starved),
    ):
        for each in found[:_SHOWN_MAX]:
            print(f"{what}: {each}")
        if len(found) > _SHOWN_MAX:
            print(f"{what}: and {len(found) - _SHOWN_MAX} more")
