# SPDX-License-Identifier: Apache-2.0
"""Static tokens: what counts, what is revoked at once, and that nobody reads one in a message."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.auth.identity import Caller, How
from services.common.auth.tokens import CHECK_S, Line, TokensFile, new_token, parse_file, parse_line
from services.common.errors import GodwitError, InvalidArgumentError


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def later(self) -> None:
        """As late as it takes for the file to be looked at."""
        self.now_s += CHECK_S


async def test_a_token_is_its_owners_and_is_revoked_with_its_line(tmp_path: Path) -> None:
    path, clock = tmp_path / "tokens", Clock()
    alice, alice_line = new_token("alice", "admin")
    bob, bob_line = new_token("bob@example.org", "viewer")
    path.write_text(f"# people\n{alice_line}\n\n{bob_line}  # on trial\n")
    tokens = TokensFile(path, clock=clock)
    identity = await tokens.recognise(alice)
    assert identity is not None
    assert (identity.name, identity.caller, identity.how) == ("alice", Caller.ADMIN, How.TOKEN)
    for wrong in ("", alice[:-1], alice + "x", alice_line.sha256, "gdw_", alice.upper()):
        assert await tokens.recognise(wrong) is None

    scratch = tmp_path / "scratch"
    scratch.write_text(str(alice_line))
    scratch.replace(path)
    clock.later()
    assert await tokens.recognise(bob) is None
    assert await tokens.recognise(alice) == identity


async def test_a_line_that_is_wrong_later_revokes_and_harms_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "tokens", Clock()
    alice, alice_line = new_token("alice", "admin")
    bob, bob_line = new_token("bob", "viewer")
    path.write_text(f"{alice_line}\n{bob_line}\n")
    tokens = TokensFile(path, clock=clock)
    # Somebody pastes the token itself in place of its hash.
    path.write_text(f"{alice_line}\nbob viewer {bob}\n")
    clock.later()
    with caplog.at_level(logging.INFO):
        assert await tokens.recognise(bob) is None
        assert await tokens.recognise(alice) is not None
    assert "line 2: bob: the hash" in caplog.text
    assert bob not in caplog.text
    assert alice not in caplog.text


async def test_a_file_that_is_gone_takes_nothing_away(tmp_path: Path) -> None:
    path, clock = tmp_path / "tokens", Clock()
    alice, line = new_token("alice", "operator")
    path.write_text(str(line))
    tokens = TokensFile(path, clock=clock)
    path.unlink()
    clock.later()
    assert await tokens.recognise(alice) is not None
    path.write_text("# nobody\n")
    clock.later()
    assert await tokens.recognise(alice) is None


def test_a_wrong_file_at_the_start_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    with pytest.raises(GodwitError, match="TOKENS_UNREADABLE"):
        TokensFile(path)
    token, _ = new_token("alice", "viewer")
    path.write_text(f"alice root {token}\n")
    with pytest.raises(GodwitError) as refused:
        TokensFile(path)
    assert refused.value.reason == "TOKENS_UNREADABLE"
    assert token not in str(refused.value)


@pytest.mark.parametrize("role", ["root", "", "orchestrator", "Admin", "viewer admin"])
def test_a_role_that_is_none_is_refused(role: str) -> None:
    with pytest.raises(InvalidArgumentError):
        new_token("alice", role)


def test_two_tokens_differ_and_are_long() -> None:
    tokens = {new_token("alice", "viewer")[0] for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == 47 and token.startswith("gdw_") for token in tokens)


@given(st.binary(max_size=400) | st.text(max_size=400).map(str.encode))
def test_any_bytes_are_lines_or_complaints(data: bytes) -> None:
    lines, wrong = parse_file(data)
    for line in lines:
        assert parse_line(str(line)) == line
    assert all(each.startswith("line ") for each in wrong)


_NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._@-]{0,20}[A-Za-z0-9])?", fullmatch=True)
_LINES = st.builds(
    lambda name, caller, digest: Line(name=name, caller=caller, sha256=digest.hex()),
    _NAMES,
    st.sampled_from([Caller.VIEWER, Caller.OPERATOR, Caller.ADMIN, Caller.NODE]),
    st.binary(min_size=32, max_size=32),
)


@given(st.lists(_LINES), st.sampled_from(["\n", "\r\n", "\n\n# x\n", "  # a comment\n"]))
def test_what_is_written_is_read(lines: list[Line], separator: str) -> None:
    text = separator.join(map(str, lines)) + os.linesep
    assert parse_file(text.encode()) == (lines, [])
