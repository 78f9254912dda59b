# SPDX-License-Identifier: Apache-2.0
"""The verdict is "ok" only when everything was seen and all of it was right.

Promise: whatever is missing or wrong makes it red and is named in words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.demo.console import Console, Line
from services.demo.verdict import MigrationReport, Setup, evidence_missing, judge

PAGES = 1024
MS = 1_000_000
SETUP = Setup(vmm="QEMU", guest="Linux", memory_bytes=512 << 20, page_count=PAGES)
NODES = ("a", "b", "a")


def line(t_ms: float, text: str) -> Line:
    return Line(t_ns=int(t_ms * MS), since_ns=int((t_ms - 1) * MS), text=text)


def beat(number: int, *, errors: int = 0, ops: int | None = None) -> str:
    ops = number * 20 if ops is None else ops
    return f"HB {number} ops={ops} err={errors} sweeps=0 verified={number}"


@dataclass
class Scene:
    """A demo run that tests spoil; built healthy, to b and back to a."""

    consoles: list[Console] = field(default_factory=list)
    reports: list[MigrationReport] = field(default_factory=list)
    setup: Setup = SETUP

    def judge(self) -> dict[str, object]:
        return judge(self.setup, self.consoles, self.reports)

    def edit(self, run: int, change: Callable[[str], str | None]) -> None:
        """Change or drop (None) the lines of a run."""
        lines = []
        for old in self.consoles[run].lines:
            text = change(old.text)
            if text is not None:
                lines.append(replace(old, text=text))
        self.consoles[run].lines = lines

    def drop(self, run: int, prefix: str) -> None:
        self.edit(run, lambda text: None if text.startswith(prefix) else text)

    def say(self, run: int, text: str, t_ms: float | None = None) -> None:
        lines = self.consoles[run].lines
        lines.append(line(lines[-1].t_ns / MS if t_ms is None else t_ms, text))


def report(source: str, destination: str) -> MigrationReport:
    return MigrationReport(
        source=source,
        destination=destination,
        pause_ms=20.0,
        total_s=1.5,
        pages_demand=700,
        pages_bulk=5000,
        pages_zero=100,
        fault_p50_us=90.0,
        fault_p99_us=400.0,
    )


def healthy(beats: int = 10) -> Scene:
    scene = Scene(reports=[report("a", "b"), report("b", "a")])
    number = 0
    for run, node in enumerate(NODES):
        start_ms = 1000.0 * (run + 1)
        texts = [] if run else [f"BOOT 0c-{node} pages={PAGES} workers=1"]
        texts.append(f"SWEEP {run * 2} end verified={PAGES} err=0")
        texts.append(f"SWEEP {run * 2 + 1} begin verified=0 err=0")
        texts.append(f"DISK n={run * 100 + 1} bad=0 err=0")
        texts.append(f"NET sent={run * 10 + 1} ok={run * 10 + 1} lost=0")
        for _ in range(beats):
            number += 1
            texts.append(beat(number))
        texts.append(f"SWEEP {run * 2 + 1} end verified={PAGES} err=0")
        texts.append(f"SWEEP {run * 2 + 2} begin verified=0 err=0")
        texts.append(f"DISK n={run * 100 + 50} bad=0 err=0")
        texts.append(f"NET sent={run * 10 + 6} ok={run * 10 + 6} lost=0")
        console = Console(node=node, epoch=run + 1)
        console.lines = [line(start_ms + i * 5, text) for i, text in enumerate(texts)]
        scene.consoles.append(console)
    return scene


def test_a_healthy_run_is_ok_and_has_every_key() -> None:
    result = healthy().judge()

    assert result["reasons"] == []
    assert result["verdict"] == "ok"
    assert result["pages_verified"] == PAGES
    assert result["corrupt_pages"] == result["doubled_beats"] == 0
    first, second = json.loads(json.dumps(result))["migrations"]
    assert (first["from"], first["to"], second["from"], second["to"]) == ("a", "b", "b", "a")
    # Last beat at a: 1000 + 14 * 5; first at b: 2000 + 4 * 5.
    assert first["guest_gap_ms"] == pytest.approx(950.0)
    wanted = "pause_ms total_s pages_demand pages_bulk pages_zero fault_p50_us fault_p99_us"
    assert set(wanted.split()) < first.keys()
    assert {"vmm", "guest", "memory_bytes"} < result.keys()


def _second_boot(scene: Scene) -> None:
    scene.say(2, f"BOOT other pages={PAGES} workers=1")


def _sweep_of_the_source(scene: Scene) -> None:
    """Began at a, ended at b: it says nothing about the pages that moved after it passed them."""
    scene.drop(1, "SWEEP 3")


def _no_demand(scene: Scene) -> None:
    scene.reports[1] = replace(scene.reports[1], pages_demand=0)


def _never_moved(scene: Scene) -> None:
    scene.consoles, scene.reports = scene.consoles[:1], []


def _never_arrived(scene: Scene) -> None:
    scene.consoles.pop()


def _other_node(scene: Scene) -> None:
    scene.reports[0] = replace(scene.reports[0], destination="c")


def _frozen_disk(scene: Scene) -> None:
    scene.edit(1, lambda text: "DISK n=60 bad=0 err=0" if text.startswith("DISK") else text)


def _unanswered(scene: Scene) -> None:
    def change(text: str) -> str:
        return text.replace("ok=16", "ok=11").replace("lost=0", "lost=5")

    scene.edit(1, change)


def _corrupt_by_sweep(scene: Scene) -> None:
    scene.edit(1, lambda t: t.replace(f"end verified={PAGES} err=0", f"end verified={PAGES} err=2"))


def _idle_worker(scene: Scene) -> None:
    def change(text: str) -> str:
        return beat(int(text.split()[1]), ops=200) if text.startswith("HB") else text

    scene.edit(1, change)


SPOILED: dict[str, tuple[Callable[[Scene], None], str]] = {
    "no boot": (lambda s: s.drop(0, "BOOT"), "never started"),
    "reboot": (_second_boot, "booted again on a (epoch 3)"),
    "panic": (lambda s: s.say(1, "Kernel panic - not syncing: x"), "Kernel panic"),
    "oops": (lambda s: s.say(2, "[  1.2] Oops: 0000 [#1] SMP"), "Oops"),
    "bug": (lambda s: s.say(2, "[  1.2] watchdog: BUG: soft lockup"), "soft lockup"),
    "beat lost in the move": (lambda s: s.drop(1, "HB 11 "), "heartbeat 12 after 10 (hole)"),
    "beat lost within a run": (lambda s: s.drop(1, "HB 15 "), "heartbeat 16 after 14 (hole)"),
    "beat garbled": (
        lambda s: s.edit(0, lambda t: t.replace("HB 5 ops", "HB 5 oops")),
        "heartbeat 6 after 4 (hole)",
    ),
    "beat repeated": (lambda s: s.say(1, beat(20)), "heartbeat 20 after 20 (repeat)"),
    "source goes on": (lambda s: s.say(0, beat(11), 2500), "1 heartbeats at the source after"),
    "source silent": (lambda s: s.drop(0, "HB"), "no heartbeat before the move"),
    "destination silent": (lambda s: s.drop(2, "HB"), "no heartbeat after the move"),
    "sweep cut short": (
        lambda s: s.edit(1, lambda t: t.replace("end verified=1024", "end verified=1023")),
        "1023 of 1024 pages verified",
    ),
    "sweep from before": (_sweep_of_the_source, "0 of 1024 pages verified"),
    "sweep abandoned": (
        lambda s: s.edit(2, lambda t: t.replace(" end ", " cut ")),
        "0 of 1024 pages verified",
    ),
    "another guest": (
        lambda s: s.edit(1, lambda t: t.replace("end verified=1024", "end verified=2048")),
        "2048 of 1024 pages verified",
    ),
    "corrupt, by line": (
        lambda s: s.say(1, "WL ERR page=7 gen=2 found=0 kind=zero"),
        "1 corrupt pages, first page 7 (zero)",
    ),
    "corrupt, by total": (lambda s: s.say(2, beat(31, errors=3)), "3 corrupt pages"),
    "corrupt, by sweep": (_corrupt_by_sweep, "2 corrupt pages"),
    "disk bad": (lambda s: s.say(1, "DISK n=200 bad=2 err=0"), "2 wrong blocks"),
    "disk error": (lambda s: s.say(1, "DISK n=200 bad=0 err=4"), "4 failed calls"),
    "disk stands still": (_frozen_disk, "the disk made no progress"),
    "no disk": (lambda s: s.drop(2, "DISK"), "the disk made no progress"),
    "pings unanswered": (_unanswered, "no ping was answered"),
    "no network": (lambda s: s.drop(1, "NET"), "no ping was answered"),
    "worker idle": (_idle_worker, "wrote no page"),
    "no demand": (_no_demand, "move 2 (b to a): no page came on demand"),
    "never moved": (_never_moved, "no migration took place"),
    "never arrived": (_never_arrived, "never ran at the destination"),
    "other node": (_other_node, "the guest went a to b"),
    "epoch reused": (lambda s: setattr(s.consoles[2], "epoch", 2), "epoch 2 after epoch 2"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_each_thing_that_can_go_wrong_makes_it_red(name: str) -> None:
    spoil, reason = SPOILED[name]
    scene = healthy()
    spoil(scene)

    result = scene.judge()

    assert result["verdict"] == "failed"
    reasons = result["reasons"]
    assert isinstance(reasons, list)
    assert any(reason in found for found in reasons), reasons
    json.dumps(result)


def test_what_the_guest_was_not_given_is_not_missed() -> None:
    scene = healthy()
    scene.setup = replace(SETUP, disk=False, net=False)
    for run in range(3):
        scene.drop(run, "DISK")
        scene.drop(run, "NET")

    assert scene.judge()["reasons"] == []
    assert scene.judge()["net"] is False


def test_a_late_source_beat_is_doubled_by_number_though_time_cannot_tell() -> None:
    scene = healthy()
    first_at_b = next(x for x in scene.consoles[1].lines if x.text.startswith("HB"))
    scene.consoles[0].lines.append(replace(first_at_b, text=beat(11)))

    assert scene.judge()["doubled_beats"] == 1


def test_a_late_reading_of_an_early_beat_is_not_doubled() -> None:
    """The reader was held up: it read the source's last beat after the destination's first."""
    scene = healthy()
    last = scene.consoles[0].lines[-5]
    assert last.text.startswith("HB 10 ")
    scene.consoles[0].lines[-5] = replace(last, t_ns=last.t_ns + 1200 * MS)

    assert scene.judge()["doubled_beats"] == 0


def test_evidence_is_awaited_until_it_is_complete() -> None:
    console = healthy().consoles[1]
    lines = console.lines
    console.lines = []
    missing = [evidence_missing(SETUP, console)]
    for next_line in lines:
        console.lines.append(next_line)
        missing.append(evidence_missing(SETUP, console))

    assert [len(reasons) for reasons in missing[:2]] == [4, 4]
    assert missing[-1] == []


@given(st.integers(0, 1), st.data())
def test_a_line_cut_in_two_by_the_stop_is_whole_again(move: int, data: st.DataObject) -> None:
    """A guest is stopped wherever it is, also half way through a line."""
    scene = healthy()
    source, destination = scene.consoles[move], scene.consoles[move + 1]
    # The destination's first beat began at the source.
    index = next(i for i, x in enumerate(destination.lines) if x.text.startswith("HB"))
    destination.lines.insert(0, destination.lines.pop(index))
    text = destination.lines[0].text
    cut = data.draw(st.integers(0, len(text)))
    source.tail = text[:cut]
    destination.lines[0] = replace(destination.lines[0], text=text[cut:])

    assert scene.judge()["reasons"] == []


@given(st.integers(0, 2), st.integers(1, 30), st.data())
def test_any_beat_lost_or_repeated_is_red(run: int, beats: int, data: st.DataObject) -> None:
    scene = healthy(beats + 1)
    lines = scene.consoles[run].lines
    positions = [i for i, x in enumerate(lines) if x.text.startswith("HB")]
    chosen = data.draw(st.sampled_from(positions))
    # The first and the last of all are no hole: nothing says that there was one.
    ends = (run == 0 and chosen == positions[0]) or (run == 2 and chosen == positions[-1])
    if data.draw(st.booleans()) or ends:
        lines.insert(chosen, lines[chosen])
    else:
        del lines[chosen]

    assert scene.judge()["verdict"] == "failed"


@given(st.integers(0, 1), st.integers(1, 20), st.integers(0, 3000))
def test_any_source_that_goes_on_is_counted(move: int, extra: int, delay_ms: int) -> None:
    scene = healthy()
    start_ms = scene.consoles[move + 1].lines[0].t_ns / MS + delay_ms
    for i in range(extra):
        scene.say(move, beat((move + 1) * 10 + 1 + i), start_ms + i)

    result = scene.judge()

    assert result["doubled_beats"] == extra
    assert result["verdict"] == "failed"
