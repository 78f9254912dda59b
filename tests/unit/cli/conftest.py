# SPDX-License-Identifier: Apache-2.0
"""The command run in this process against a fake orchestrator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from services.cli import main
from tests.harness.fake_api import FakeApi, serving_api


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run of the command ended."""

    status: int
    out: str
    err: str


Godwit = Callable[..., Ended]


@pytest.fixture
def api() -> Iterator[FakeApi]:
    """An orchestrator of canned answers."""
    with serving_api() as fake:
        yield fake


@pytest.fixture
def godwit(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Godwit:
    """Run `godwit ARGUMENTS`; GODWIT_ORCHESTRATOR names the fake."""
    monkeypatch.setenv("GODWIT_ORCHESTRATOR", api.url)

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["godwit", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as raised:
            main.main()
        captured = capsys.readouterr()
        return Ended(int(raised.value.code or 0), captured.out, captured.err)

    return run
