# SPDX-License-Identifier: Apache-2.0
"""Runs a scenario and judges it by its log."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass

from services.simulator.checker import Checker, Findings
from services.simulator.happenings import Course, Director
from services.simulator.scenario import Scenario
from services.simulator.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came out."""

    scenario: str
    findings: Findings
    courses: tuple[Course, ...]
    admissions_per_s: float
    """Of the schedule alone, in real time; what a store adds is measured elsewhere."""
    virtual_s: float
    wall_s: float
    peak_memory_mib: float
    """Of this process, with all that it did before."""

    @property
    def ok(self) -> bool:
        """No limit was exceeded and nobody starved."""
        return not self.findings.violations and not self.findings.starved

    def line(self) -> str:
        """The last line: one JSON object."""
        return json.dumps(
            {
                "scenario": self.scenario,
                "plan_seconds": round(max((c.plan_seconds for c in self.courses), default=0), 4),
                "admissions_per_s": round(self.admissions_per_s, 1),
                "limit_violations": len(self.findings.violations),
                "makespan_ratio": round(
                    max((c.makespan_ratio for c in self.courses), default=1), 4
                ),
                "starved": len(self.findings.starved),
                "peak_memory_mib": round(self.peak_memory_mib, 1),
                "moves": self.findings.moves,
                "moved": sum(course.moved for course in self.courses),
                "failures": self.findings.failures,
                "virtual_s": round(self.virtual_s, 3),
                "wall_s": round(self.wall_s, 3),
                "verdict": "ok" if self.ok else "failed",
            }
        )


def simulate(scenario: Scenario) -> Report:
    """Play it to its end."""
    began = time.perf_counter()
    world = World(scenario)
    director = Director(world)
    director.direct()
    world.run()
    findings = Checker().read(world.log.events)
    return Report(
        scenario=scenario.name,
        findings=findings,
        courses=tuple(director.courses),
        admissions_per_s=world.admissions / world.admitting_s if world.admitting_s else 0.0,
        virtual_s=world.now_s,
        wall_s=time.perf_counter() - began,
        peak_memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
