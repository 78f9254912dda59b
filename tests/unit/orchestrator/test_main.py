# SPDX-License-Identifier: Apache-2.0
"""The process: its command line, its environment, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common.errors import GodwitError
from services.common.lifecycle import ExitStatus
from services.common.listen import Address
from services.orchestrator.main import Settings, main, orchestrating, parse


def test_defaults_are_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = parse([])
    assert settings.rest == Address(host="127.0.0.1", port=8080)
    assert settings.grpc == Address(host="127.0.0.1", port=8081)
    assert settings.nodes == ()
    monkeypatch.setenv("GODWIT_REST", "127.0.0.1:1234")
    monkeypatch.setenv("GODWIT_NODES", "a=127.0.0.1:1,b=127.0.0.1:2")
    monkeypatch.setenv("GODWIT_STORE", "/var/lib/godwit/store.db")
    from_env = parse([])
    assert from_env.rest.port == 1234
    assert from_env.nodes == (("a", "127.0.0.1:1"), ("b", "127.0.0.1:2"))
    assert from_env.store == Path("/var/lib/godwit/store.db")
    assert parse(["--node", "c=127.0.0.1:3"]).nodes == (("c", "127.0.0.1:3"),)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rest", "0.0.0.0:80"], "LISTEN_NOT_LOOPBACK"),
        (["--grpc", "[::]:80"], "LISTEN_NOT_LOOPBACK"),
        (["--rest", "example.org:80"], "ADDRESS_INVALID"),
        (["--node", "a"], "NODE_INVALID"),
        (["--node", "A B=127.0.0.1:1"], "FIELD_INVALID"),
        (["--node", "a=nowhere"], "FIELD_INVALID"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], reason: str) -> None:
    with pytest.raises(GodwitError) as refused:
        parse(arguments)
    assert refused.value.reason == reason


def test_plaintext_off_loopback_needs_the_word() -> None:
    settings = parse(["--rest", "0.0.0.0:80", "--insecure-plaintext"])
    assert settings.rest.host == "0.0.0.0"


def test_refusal_is_one_line_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rest", "0.0.0.0:80"]) == ExitStatus.BAD_CONFIG
    assert "LISTEN_NOT_LOOPBACK" in capsys.readouterr().err


def test_store_that_cannot_be_opened_is_one_line_and_a_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rest", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--store", str(tmp_path)]
    assert main(arguments) == ExitStatus.BAD_CONFIG
    assert "STORE_FAILED" in capsys.readouterr().err


async def test_taken_port_is_refused(tmp_path: Path) -> None:
    settings = Settings(
        store=tmp_path / "one.db",
        rest=Address(host="127.0.0.1", port=0),
        grpc=Address(host="127.0.0.1", port=0),
    )
    async with orchestrating(settings) as running:
        for field in ("rest", "grpc"):
            values = {"rest": settings.rest, "grpc": settings.grpc, field: getattr(running, field)}
            second = Settings(store=tmp_path / "two.db", **values)
            with pytest.raises(BaseExceptionGroup) as refused:
                async with orchestrating(second):
                    pass
            assert refused.group_contains(GodwitError, match="LISTEN_FAILED")
