# SPDX-License-Identifier: Apache-2.0
"""Goal: scripts can rely on what `godwit` asks, prints and exits with."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli.exit_status import ExitStatus
from tests.harness.fake_api import FakeApi, event
from tests.unit.cli.conftest import Godwit

NODE = {
    "name": "a",
    "agent_address": "127.0.0.1:7000",
    "reachable": True,
    "message": "",
    "vm_ids": ["web"],
    "capabilities": {"vmm_versions": {"qemu": "7.2.22"}, "memory_available_bytes": 3 << 30},
    "a_field_of_the_future": {"deep": [1]},
}
VM = {
    "vm_id": "web",
    "node": "a",
    "epoch": 3,
    "memory_bytes": 512 << 20,
    "resident_share": 0.9996,
    "vmm_state": "running",
    "migration_id": "",
}


def migration(phase: str, version: int, **more: Any) -> dict[str, Any]:
    return {
        "migration_id": "01M",
        "vm_id": "web",
        "source_node": "a",
        "destination_node": "b",
        "phase": phase,
        "version": version,
        "progress": 0.0,
        **more,
    }


DONE = migration("succeeded", 9, progress=1.0, pause_ns=31_400_000, total_ns=1_230_000_000)


def test_nodes_table_holds_what_matters(godwit: Godwit, api: FakeApi) -> None:
    api.answers["GET", "/v1/nodes"] = (200, {"nodes": [NODE]})
    ended = godwit("nodes")
    assert ended.status == ExitStatus.OK
    header, row = ended.out.splitlines()
    assert header.split() == [
        "NODE",
        "REACHABLE",
        "AGENT",
        "VMS",
        "FREE",
        "MEMORY",
        "VMM",
        "MESSAGE",
    ]
    assert row.split() == ["a", "yes", "127.0.0.1:7000", "1", "3", "GiB", "qemu", "7.2.22", "-"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("-o", "json", "nodes"),
        ("nodes", "-o", "json"),
        ("-o", "yaml", "nodes", "--output", "json"),
    ],
)
def test_json_is_the_answer_as_it_came(
    godwit: Godwit, api: FakeApi, arguments: tuple[str, ...]
) -> None:
    """Before or after the subcommand, the innermost counts; no unknown field is lost."""
    api.answers["GET", "/v1/nodes"] = (200, {"nodes": [NODE], "more": None})
    assert json.loads(godwit(*arguments).out) == {"nodes": [NODE], "more": None}


def test_yaml_and_names(godwit: Godwit, api: FakeApi) -> None:
    api.answers["GET", "/v1/vms"] = (200, {"vms": [VM]})
    assert yaml.safe_load(godwit("vms", "-o", "yaml").out) == {"vms": [VM]}
    assert godwit("vms", "-o", "name").out == "web\n"


def test_orchestrator_option_beats_the_environment(
    godwit: Godwit, api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GODWIT_ORCHESTRATOR", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    api.answers["GET", "/v1/vms"] = (200, {"vms": []})
    assert godwit("vms", "--orchestrator", api.url).status == ExitStatus.OK
    assert godwit("--orchestrator", api.url, "vms").status == ExitStatus.OK
    assert godwit("vms").status == ExitStatus.UNREACHABLE


def test_start_sends_the_spec(godwit: Godwit, api: FakeApi, tmp_path: Path) -> None:
    spec = tmp_path / "web.json"
    spec.write_text('{"vm_id": "web"}')
    api.answers["POST", "/v1/vms"] = (201, VM)
    ended = godwit("vms", "start", str(spec), "--node", "a")
    assert ended.status == ExitStatus.OK
    assert api.requests[-1].body == {"node": "a", "spec": {"vm_id": "web"}}
    assert "resident: 99.9 %" in ended.out, "100 % is for the whole alone"


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_spec_that_is_none_is_wrong_usage(
    godwit: Godwit, api: FakeApi, tmp_path: Path, text: str
) -> None:
    spec = tmp_path / "web.json"
    spec.write_text(text)
    assert godwit("vms", "start", str(spec), "--node", "a").status == ExitStatus.USAGE
    assert godwit("vms", "start", str(tmp_path / "none"), "--node", "a").status == ExitStatus.USAGE
    assert api.requests == [], "nothing is asked on a wrong file"


def test_show_and_stop(godwit: Godwit, api: FakeApi) -> None:
    api.answers["GET", "/v1/vms/web"] = (200, VM)
    api.answers["DELETE", "/v1/vms/web"] = (204, None)
    assert "512 MiB" in godwit("vms", "show", "web").out
    assert godwit("vms", "stop", "web").out == "web is stopped\n"
    assert [request.method for request in api.requests] == ["GET", "DELETE"]


@pytest.mark.parametrize(
    ("http", "status"),
    [(404, 4), (409, 3), (422, 2), (400, 2), (503, 5), (504, 5), (500, 1)],
)
def test_problems_are_told_with_what_to_do(
    godwit: Godwit, api: FakeApi, http: int, status: int
) -> None:
    api.problem(
        "POST",
        "/v1/migrations",
        http,
        "MIGRATION_ACTIVE",
        "web is being moved",
        hint="wait for it",
        metadata={"migration_id": "01M"},
    )
    ended = godwit("migrate", "web", "--to", "b")
    assert ended.status == status
    assert ended.out == ""
    assert ended.err == (
        "godwit: MIGRATION_ACTIVE: web is being moved, migration_id 01M\n  wait for it\n"
    )


def test_nobody_there(godwit: Godwit) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused for sure
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        ended = godwit("nodes", "--orchestrator", url)
    assert ended.status == ExitStatus.UNREACHABLE
    assert url in ended.err
    assert "godwit orchestrator" in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("migrate",),
        ("migrate", "web", "--to", "b", "--bandwidth", "fast"),
        ("drain", "a", "--deadline", "soon"),
        ("limits", "set", "node-in"),
        ("nodes", "-o", "xml"),
        ("nodes", "--orchestrator", "ftp://x"),
        ("frobnicate",),
    ],
)
def test_wrong_usage(godwit: Godwit, api: FakeApi, arguments: tuple[str, ...]) -> None:
    assert godwit(*arguments).status == ExitStatus.USAGE
    assert api.requests == []


def test_migrate_returns_at_once(godwit: Godwit, api: FakeApi) -> None:
    api.answers["POST", "/v1/migrations"] = (202, migration("pending", 1))
    ended = godwit("migrate", "web", "--to", "b", "--bandwidth", "125M")
    assert ended.status == ExitStatus.OK
    assert ended.out.startswith("01M: web from a to b\n")
    assert api.requests[-1].body == {
        "vm": "web",
        "destination_node": "b",
        "bulk_bytes_per_s_max": 125_000_000,
    }


def test_watch_tells_phases_on_stderr_and_the_outcome_on_stdout(
    godwit: Godwit, api: FakeApi
) -> None:
    api.answers["POST", "/v1/migrations"] = (202, migration("pending", 1))
    counters = {"page_count": 100, "demand_page_count": 7, "bulk_page_count": 11}
    steps = [
        migration("pending", 1),
        migration("postcopy", 2, progress=0.30, counters=counters),
        migration("postcopy", 3, progress=0.31, counters=counters),
        DONE,
    ]
    api.streams["/v1/migrations/01M/events"] = [[event(step) for step in steps]]
    ended = godwit("migrate", "web", "--to", "b", "--watch")
    assert ended.status == ExitStatus.OK
    assert ended.out == "web a -> b: succeeded in 1.23 s, pause 31.4 ms\n"
    lines = ended.err.splitlines()
    assert lines[0] == "web a -> b: pending"
    assert lines[1] == "web a -> b: postcopy 30.0 %, pages: 7 demand, 11 bulk, 0 zero"
    assert lines[2].startswith("web a -> b: succeeded")
    assert len(lines) == 3, "a plain line is for news, not for each event"


def test_watch_as_json_lines(godwit: Godwit, api: FakeApi) -> None:
    api.answers["POST", "/v1/migrations"] = (202, migration("pending", 1))
    steps = [migration("pending", 1), {**DONE, "unknown": 1}]
    api.streams["/v1/migrations/01M/events"] = [[event(step) for step in steps]]
    ended = godwit("-o", "json", "migrate", "web", "--to", "b", "-w")
    assert [json.loads(line) for line in ended.out.splitlines()] == steps
    assert ended.err == ""


@pytest.mark.parametrize("phase", ["failed", "cancelled", "lost", "needs_attention"])
def test_watch_of_a_migration_that_does_not_succeed(
    godwit: Godwit, api: FakeApi, phase: str
) -> None:
    """NEEDS_ATTENTION is not an end, but nothing more comes by itself: the watcher is told."""
    last = migration(
        phase, 2, reason="PREFLIGHT_FAILED", message="no userfaultfd", hint="run as root"
    )
    api.streams["/v1/migrations/01M/events"] = [[event(last)]]
    ended = godwit("migrations", "show", "01M", "--watch")
    assert ended.status == ExitStatus.MIGRATION_FAILED
    assert ended.out == ""
    assert ended.err.endswith(
        f"web a -> b: {phase}\n  PREFLIGHT_FAILED: no userfaultfd\n  run as root\n"
    )


def test_list_show_and_cancel_migrations(godwit: Godwit, api: FakeApi) -> None:
    history = [{"phase": "pending", "at": "2026-11-22T19:00:00.123456Z", "message": "asked for"}]
    api.answers["GET", "/v1/migrations?vm=web"] = (200, {"migrations": [DONE]})
    api.answers["GET", "/v1/migrations/01M"] = (200, {**DONE, "transitions": history})
    api.problem("POST", "/v1/migrations/01M:cancel", 409, "PAST_COMMIT", "b owns web")
    assert "31.4 ms" in godwit("migrations", "--vm", "web").out
    assert "19:00:00.123  pending          asked for" in godwit("migrations", "show", "01M").out
    assert godwit("migrations", "cancel", "01M").status == ExitStatus.REFUSED


def test_a_name_cannot_reach_another_resource(godwit: Godwit, api: FakeApi) -> None:
    for name in ("..", "../nodes", "a/b"):
        assert godwit("vms", "show", name).status == ExitStatus.NOT_FOUND
    assert [request.path for request in api.requests] == [
        "/v1/vms/%2E%2E",
        "/v1/vms/..%2Fnodes",
        "/v1/vms/a%2Fb",
    ]


def test_recover_prints_what_is_missing(godwit: Godwit, api: FakeApi) -> None:
    stuck = migration("needs_attention", 8, reason="GUEST_GONE", message="it is gone")
    found = {"migration": stuck, "findings": ["source a: sealed", "destination b does not answer"]}
    api.answers["POST", "/v1/migrations/01M:recover"] = (200, found)
    ended = godwit("recover", "01M")
    assert ended.status == ExitStatus.OK
    assert "GUEST_GONE" in ended.out
    assert "  - destination b does not answer" in ended.out.splitlines()


def test_giving_up_takes_an_epoch_and_a_word(godwit: Godwit, api: FakeApi) -> None:
    api.answers["POST", "/v1/migrations/01M:abandon"] = (200, migration("lost", 9))
    assert godwit("abandon", "01M").status == ExitStatus.USAGE
    assert godwit("abandon", "01M", "--epoch", "4", "--confirm").status == ExitStatus.OK
    assert api.requests[-1].body == {"epoch": 4, "confirm": True}
    api.problem("POST", "/v1/migrations/01M:break-glass", 409, "GUEST_RAN", "it ran on b")
    line = ["break-glass", "01M", "--epoch", "4", "--destination-is-fenced", "web"]
    assert godwit(*line).status == ExitStatus.USAGE
    ended = godwit(*line, "--because", "pdu 4 is off", "--operator", "ada")
    assert ended.status == ExitStatus.REFUSED
    assert "GUEST_RAN" in ended.err
    assert api.requests[-1].body == {
        "epoch": 4,
        "fenced_vm_id": "web",
        "operator": "ada",
        "because": "pdu 4 is off",
    }
