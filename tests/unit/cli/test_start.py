# SPDX-License-Identifier: Apache-2.0
"""The command starts without what it does not need, and becomes a service as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_help_imports_no_http_stack() -> None:
    """What takes long to import is imported by the commands that need it."""
    code = (
        "import sys; import services.cli.main; "
        "print(sorted({'httpx', 'rich', 'yaml', 'grpc', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("module", ["page_server", "fault_agent", "orchestrator"])
def test_services_get_every_argument(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from services.cli import main

    executed: list[list[str]] = []

    def execv(_: str, arguments: list[str]) -> None:
        executed.append(arguments)

    monkeypatch.setattr("os.execv", execv)
    command = module.replace("_", "-")
    arguments = ["--help", "-o", "x", "--listen", "127.0.0.1:0", "--", "y"]
    monkeypatch.setattr(sys, "argv", ["godwit", command, *arguments])
    with pytest.raises(SystemExit) as raised:
        main.main()
    assert not raised.value.code
    assert executed == [[sys.executable, "-m", f"services.{module}", *arguments]]
