# SPDX-License-Identifier: Apache-2.0
"""Console files become stamped lines and records, whatever way the bytes come in."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.demo.console import (
    Boot,
    ConsoleFollower,
    DiskReport,
    Heartbeat,
    LineSplitter,
    NetReport,
    Other,
    PageError,
    Panic,
    Record,
    Sweep,
    parse,
)


@pytest.mark.parametrize(
    ("text", "record"),
    [
        (
            "HB 7 ops=140 err=1 sweeps=2 verified=99",
            Heartbeat(number=7, ops=140, errors=1, sweeps=2, verified=99),
        ),
        (
            "SWEEP 3 end verified=65536 err=0",
            Sweep(number=3, state="end", verified=65536, errors=0),
        ),
        ("DISK n=5 bad=1 err=2", DiskReport(rounds=5, bad=1, errors=2)),
        ("NET sent=9 ok=8 lost=1", NetReport(sent=9, answered=8, lost=1)),
        (
            "WL ERR page=4 gen=3 found=2 kind=stale",
            PageError(page=4, generation=3, found=2, kind="stale"),
        ),
        ("BOOT ab-cd pages=65536 workers=2", Boot(boot_id="ab-cd", pages=65536, workers=2)),
        ("Kernel panic - not syncing: x", Panic(text="Kernel panic - not syncing: x")),
        (
            "HB 7 ops=1[ 3.2] BUG: unable to handle page fault",
            Panic(text="HB 7 ops=1[ 3.2] BUG: unable to handle page fault"),
        ),
        ("[    3.2] Oops: 0002 [#1]", Panic(text="[    3.2] Oops: 0002 [#1]")),
        ("HB 7 oops=140 err=1 sweeps=2 verified=99", None),
        ("7 ops=140 err=1 sweeps=2 verified=99", None),
        ("", None),
        ("DEBUG: fine", None),
    ],
)
def test_parse(text: str, record: Record | None) -> None:
    assert parse(text) == (record or Other(text=text))


@given(st.lists(st.text("abc\r", max_size=5)), st.text("abc", max_size=3), st.data())
def test_lines_do_not_depend_on_how_they_are_cut(
    texts: list[str], tail: str, data: st.DataObject
) -> None:
    stream = "".join(f"{text}\n" for text in texts).encode() + tail.encode()
    splitter = LineSplitter()
    lines = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        lines += splitter.feed(stream[:size], t_ns=2, since_ns=1)
        stream = stream[size:]

    assert [line.text for line in lines] == [text.rstrip("\r") for text in texts]
    assert splitter.tail == tail


def test_bytes_that_are_no_text_are_kept_as_such() -> None:
    (line,) = LineSplitter().feed(b"\xff\xfe\n", t_ns=0, since_ns=0)

    assert parse(line.text) == Other(text="\ufffd\ufffd")


async def test_follower_sees_lines_of_several_runs_as_they_come(tmp_path: Path) -> None:
    """Files may appear late and hold half a line; stamps lie around the time of writing."""
    first, second = tmp_path / "a-1", tmp_path / "b-2"
    async with asyncio.timeout(30), ConsoleFollower() as follower:
        console_a = follower.add(first, node="a", epoch=1)
        console_b = follower.add(second, node="b", epoch=2)
        first.write_text("HB 1 ops=1 err=0 sweeps=0 verified=1\nHB 2 ops")
        assert await follower.wait_for(console_a, lambda r: isinstance(r, Heartbeat)) == 0

        before_ns = time.monotonic_ns()
        second.write_text("=2 err=0 sweeps=0 verified=2\nDISK n=1 bad=0 err=0\n")
        after_ns = time.monotonic_ns()
        assert await follower.wait_for(console_b, lambda r: isinstance(r, DiskReport)) == 1
        assert console_b.lines[1].t_ns >= before_ns
        assert console_b.lines[1].since_ns <= after_ns

        async with asyncio.TaskGroup() as group:
            waits = [
                group.create_task(follower.wait_for(console, lambda r: isinstance(r, Sweep)))
                for console in (console_a, console_a, console_b)
            ]
            for path in (first, second):
                with path.open("a") as file:
                    file.write("\nSWEEP 1 begin verified=0 err=0\n")
        assert [wait.result() for wait in waits] == [2, 2, 3]

    assert follower.consoles == [console_a, console_b]
    assert [line.text for line in console_a.lines][1] == "HB 2 ops"
    assert console_a.tail == ""


async def test_follower_reads_what_is_left_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a-1"
    async with ConsoleFollower() as follower:
        console = follower.add(path, node="a", epoch=1)
        path.write_text("BOOT x pages=1 workers=1\nHB 1")

    assert [line.text for line in console.lines] == ["BOOT x pages=1 workers=1"]
    assert console.tail == "HB 1"
