# SPDX-License-Identifier: Apache-2.0
"""The audit log: whole lines, whatever happens to the process or the disk."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.auth import audit
from services.common.auth.audit import AuditLog, Entry
from services.common.auth.identity import Caller, How, Identity
from services.common.errors import GodwitError
from tests.harness.small_disk import fill, mounted

ALICE = Identity(name="alice", caller=Caller.ADMIN, how=How.TOKEN)
NOW = dt.datetime(2026, 11, 28, tzinfo=dt.UTC)


def entry(number: int = 0, **more: Any) -> Entry:
    values: dict[str, Any] = {
        "method": "POST /v1/vms",
        "request_id": str(number),
        "identity": ALICE,
        "peer": "127.0.0.1:1",
        "resource": {"node": "a"},
        "outcome": audit.OK,
    }
    return Entry(**(values | more))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_a_line_says_everything_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    log = AuditLog(path, now=lambda: NOW)
    await log.record(entry(outcome=audit.REFUSED, reason="VM_EXISTS"))
    await log.record(entry(identity=None, outcome=audit.REFUSED, reason="UNAUTHENTICATED"))
    log.close()
    known, unknown = lines(path)
    assert known == {
        "time": "2026-11-28T00:00:00.000+00:00",
        "request_id": "0",
        "identity": "alice",
        "role": "admin",
        "authenticated_by": "token",
        "peer": "127.0.0.1:1",
        "method": "POST /v1/vms",
        "resource": {"node": "a"},
        "outcome": "refused",
        "reason": "VM_EXISTS",
    }
    assert (unknown["identity"], unknown["role"], unknown["authenticated_by"]) == ("", "", "")
    assert path.stat().st_mode & 0o777 == 0o600


async def test_it_is_synced_before_anybody_has_his_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    log = AuditLog(tmp_path / "audit")
    await log.record(entry())
    assert synced[-1] == (tmp_path / "audit").stat().st_size > 0
    log.close()


async def test_half_a_line_of_a_predecessor_spoils_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    path.write_text('{"time": "2026')
    log = AuditLog(path)
    await log.record(entry(7))
    log.close()
    torn, ours = path.read_text().splitlines()
    assert torn == '{"time": "2026'
    assert json.loads(ours)["request_id"] == "7"


async def test_it_turns_over_and_keeps_the_last_ones(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    log = AuditLog(path, file_bytes_max=500)
    for number in range(60):
        await log.record(entry(number))
    log.close()
    names = os.listdir(tmp_path)  # noqa: PTH208 - pathlib's blocks no less
    assert len(names) == audit.FILE_COUNT_MAX
    assert all((tmp_path / name).stat().st_size < 1000 for name in names)
    numbers = [
        int(line["request_id"])
        for index in range(audit.FILE_COUNT_MAX - 1, -1, -1)
        for line in lines(path.with_name(f"audit.{index}") if index else path)
    ]
    assert numbers == list(range(numbers[0], 60)), "in order, none missing"


async def test_many_at_once_are_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    log = AuditLog(path)
    await asyncio.gather(*(log.record(entry(number)) for number in range(50)))
    log.close()
    assert sorted(int(line["request_id"]) for line in lines(path)) == list(range(50))


async def test_what_machines_repeat_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    log = AuditLog(path)
    for address in ("1", "1", "1", "2", "1"):
        await log.record(entry(resource={"agent_address": address}), repeats=True)
    await log.record(entry(resource={"agent_address": "1"}, outcome=audit.REFUSED), repeats=True)
    log.close()
    assert [line["resource"]["agent_address"] for line in lines(path)] == ["1", "2", "1", "1"]


@pytest.mark.requires("root")
async def test_a_full_disk_refuses_changes_and_loses_no_line(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "1M") as disk:
        path = disk / "audit"
        log = AuditLog(path)
        await log.record(entry(0))
        ballast = fill(disk)
        # What is left of the last page still takes a line or two.
        number = 0
        while await _writable(log):
            number += 1
            await log.record(entry(number))
        await log.record(entry(number + 1))
        assert all(line["request_id"] for line in lines(path)), "no half line"
        ballast.unlink()
        await log.require_writable()
        log.close()
        assert [int(line["request_id"]) for line in lines(path)] == list(range(number + 2))


async def _writable(log: AuditLog) -> bool:
    try:
        await log.require_writable()
    except GodwitError as error:
        return error.reason != "AUDIT_UNWRITABLE"
    return True


def test_a_place_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(GodwitError, match="AUDIT_UNWRITABLE"):
        AuditLog(tmp_path / "nowhere" / "audit")


@given(st.text(max_size=50), st.dictionaries(st.text(max_size=9), st.text(max_size=2000)))
def test_whatever_a_caller_says_stays_one_line(text: str, resource: dict[str, str]) -> None:
    who = Identity(name=text, caller=None, how=How.OIDC)
    line = entry(method=text, peer=text, identity=who, resource=resource).line(NOW)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["method"] == text
