# SPDX-License-Identifier: Apache-2.0
"""The live line in a terminal says what the plain lines say."""

from __future__ import annotations

import io

import pytest
from godwit.models import ArrivalCounters, Migration, MigrationPhase

from services.cli.watching import MigrationView, ending, live_line, plain_line


class Terminal(io.StringIO):
    """A stream that claims to be one."""

    def isatty(self) -> bool:
        return True


MOVING = Migration(
    vm_id="web",
    source_node="a",
    destination_node="b",
    phase="postcopy",
    progress=0.5,
    pause_ns=20_000_000,
    counters=ArrivalCounters(page_count=10, demand_page_count=3, bulk_page_count=2),
)


@pytest.mark.parametrize("phase", [*MigrationPhase, "teleporting"])
def test_every_phase_can_be_shown(phase: str) -> None:
    step = Migration(vm_id="web", source_node="a", destination_node="b", phase=phase)
    assert phase in plain_line(step)
    assert phase in live_line(step).plain
    assert phase in ending(step)


def test_live_line() -> None:
    line = live_line(MOVING).plain
    assert line.count("█") == line.count("░") == 12
    assert line.endswith("50.0 %, pages: 3 demand, 2 bulk, 0 zero, pause 20.0 ms")


def test_view_in_a_terminal_stays_on_its_line() -> None:
    stream = Terminal()
    with MigrationView(stream=stream) as view:
        for _ in range(5):
            view.show(MOVING)
    assert "web a → b" in stream.getvalue()
    assert stream.getvalue().count("\n") <= 2
