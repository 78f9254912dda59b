# SPDX-License-Identifier: Apache-2.0
"""Promise: a node registers with an orchestrator that asks for tokens, and never tells its token.

The orchestrator is a real one; it is told nothing but who may.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.common.auth.tokens import new_token
from services.common.errors import FailedPreconditionError
from services.common.listen import Address
from services.fault_agent import main as fault_agent
from services.fault_agent.registration import keep_registered, read_token
from services.orchestrator.agents import Deadlines
from services.orchestrator.auth.settings import AuthSettings
from services.orchestrator.main import Running, Settings, orchestrating

WAIT_S = 30.0
AGENT = Address(host="127.0.0.1", port=1)
LOOPBACK = Address(host="127.0.0.1", port=0)


@contextlib.asynccontextmanager
async def asking(directory: Path, *lines: object) -> AsyncIterator[Running]:
    """An orchestrator that lets in whom these lines name."""
    tokens = directory / "tokens"
    tokens.write_text("".join(f"{line}\n" for line in lines))
    settings = Settings(
        store=directory / "godwit.db",
        rest=LOOPBACK,
        grpc=LOOPBACK,
        deadlines=Deadlines(connect_s=0.2, hello_s=0.5),
        auth=AuthSettings(tokens_file=tokens),
    )
    async with orchestrating(settings) as running:
        yield running


@contextlib.asynccontextmanager
async def registering(running: Running, node: str, token_file: Path | None) -> AsyncIterator[None]:
    task = asyncio.create_task(
        keep_registered(str(running.grpc), node, AGENT, token_file=token_file)
    )
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def is_known(running: Running, node: str) -> bool:
    return any(each.name == node for each in await running.core.context.store.fleet.nodes())


async def until_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while text not in caplog.text:  # noqa: ASYNC110 - a log has no event
            await asyncio.sleep(0.02)


async def test_a_node_registers_with_its_token_and_takes_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A token that is wrong is refused; the right one counts without a restart."""
    caplog.set_level(logging.INFO)
    good, line = new_token("a", "node")
    wrong, _ = new_token("a", "node")
    path = tmp_path / "token"
    path.write_text(f"{wrong}\n")
    async with asking(tmp_path, line) as running, registering(running, "a", path):
        await until_logged(caplog, "not registered")
        assert not await is_known(running, "a")
        await asyncio.to_thread(path.write_text, f"{good}\n")
        await until_logged(caplog, "registered at")
        async with asyncio.timeout(WAIT_S):
            while not await is_known(running, "a"):  # noqa: ASYNC110 - the store has no event
                await asyncio.sleep(0.02)
    assert "UNAUTHENTICATED" in caplog.text
    assert good not in caplog.text
    assert wrong not in caplog.text


async def test_another_nodes_token_is_no_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token, line = new_token("b", "node")
    path = tmp_path / "token"
    path.write_text(token)
    async with asking(tmp_path, line) as running, registering(running, "a", path):
        await until_logged(caplog, "PERMISSION_DENIED")
        assert not await is_known(running, "a")


async def test_without_a_token_it_says_what_to_bring(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, line = new_token("a", "node")
    async with asking(tmp_path, line) as running, registering(running, "a", None):
        await until_logged(caplog, "bring a bearer token")
        assert not await is_known(running, "a")


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"\xff\xfe", "schlüssel".encode()])
def test_a_file_without_a_token_is_refused_and_not_repeated(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(FailedPreconditionError) as refused:
        read_token(path)
    assert refused.value.reason == "TOKEN_UNREADABLE"
    assert "words" not in str(refused.value)
    with pytest.raises(FailedPreconditionError):
        read_token(tmp_path / "nothing")


ARGV = [
    *("--node", "a", "--listen", "127.0.0.1:0", "--page-server-control", "127.0.0.1:1"),
    *("--state-dir", "/s", "--ram-dir", "/r"),
]


@pytest.mark.parametrize(
    ("more", "taken"),
    [
        (["--orchestrator", "127.0.0.1:8081"], True),
        (["--orchestrator", "[::1]:8081"], True),
        (["--orchestrator", "10.0.0.1:8081", "--tls-dir", "/t"], True),
        (["--orchestrator", "10.0.0.1:8081"], False),
        (["--orchestrator", "orchestrator:8081"], False),
        ([], False),
    ],
)
def test_a_token_goes_over_tls_or_to_this_machine(
    more: list[str], taken: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*ARGV, "--orchestrator-token-file", "/token", *more]
    if taken:
        config = fault_agent.Config.from_argv(argv)
        assert config.orchestrator_token_file == Path("/token")
        return
    with pytest.raises(SystemExit):
        fault_agent.Config.from_argv(argv)
    assert "--orchestrator-token-file" in capsys.readouterr().err
