# SPDX-License-Identifier: Apache-2.0
"""`godwit tokens`, and the token that every command brings."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.exit_status import ExitStatus
from services.common.auth.tokens import parse_file
from tests.harness.fake_api import FakeApi
from tests.unit.cli.conftest import Godwit


def test_a_new_token_is_shown_once_and_its_line_is_added(godwit: Godwit, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# people, no newline at the end")
    first = godwit("tokens", "new", "alice", "admin", "--file", str(path))
    second = godwit("tokens", "new", "bob", "viewer", "--tokens-file", str(path))
    assert (first.status, second.status) == (ExitStatus.OK, ExitStatus.OK)
    lines, wrong = parse_file(path.read_bytes())
    assert not wrong
    assert [(line.name, line.caller) for line in lines] == [("alice", "admin"), ("bob", "viewer")]
    for ended in (first, second):
        assert ended.out.startswith("gdw_")
        assert ended.out.strip() not in path.read_text() + ended.err


def test_without_a_file_the_line_is_printed_beside_it(godwit: Godwit) -> None:
    ended = godwit("tokens", "new", "alice", "operator")
    assert ended.out.startswith("gdw_")
    assert "alice operator " in ended.err


def test_a_role_that_is_none_is_wrong_usage(godwit: Godwit) -> None:
    ended = godwit("tokens", "new", "alice", "root")
    assert ended.status == ExitStatus.USAGE
    assert "viewer" in ended.err


@pytest.mark.parametrize(
    ("arguments", "environment", "brought"),
    [
        ([], {}, None),
        (["--token", "given"], {"GODWIT_TOKEN": "env"}, "Bearer given"),
        (["--token-file", "FILE"], {"GODWIT_TOKEN": "env"}, "Bearer of-file"),
        ([], {"GODWIT_TOKEN": "env"}, "Bearer env"),
        ([], {"GODWIT_TOKEN_FILE": "FILE"}, "Bearer of-file"),
    ],
)
def test_which_token_is_brought(
    godwit: Godwit,
    api: FakeApi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    brought: str | None,
) -> None:
    path = tmp_path / "token"
    path.write_text("of-file\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("FILE", str(path)))
    api.answers["GET", "/v1/nodes"] = (200, {"nodes": []})
    ended = godwit(*(str(path) if each == "FILE" else each for each in arguments), "nodes")
    assert ended.status == ExitStatus.OK
    assert api.requests[0].headers.get("authorization") == brought


@pytest.mark.parametrize(
    "arguments",
    [
        ["--token", "se\ncret"],
        ["--token", "secret", "--orchestrator", "http://fleet.example.org:8080"],
        ["--token-file", "/nowhere/secret"],
    ],
)
def test_a_token_that_is_not_sent_is_not_told_either(
    godwit: Godwit, api: FakeApi, arguments: list[str]
) -> None:
    ended = godwit(*arguments, "nodes")
    assert ended.status == ExitStatus.USAGE
    assert "token" in ended.err or "nowhere" in ended.err
    assert arguments[1] not in ended.err or arguments[1].startswith("/")
    assert not api.requests


def test_a_refusal_is_told_with_its_hint(godwit: Godwit, api: FakeApi) -> None:
    api.problem("GET", "/v1/nodes", 403, "PERMISSION_DENIED", "viewer x may not", hint="it takes y")
    ended = godwit("nodes")
    assert ended.status == ExitStatus.REFUSED
    assert "PERMISSION_DENIED" in ended.err
    assert "it takes y" in ended.err
