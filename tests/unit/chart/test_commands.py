# SPDX-License-Identifier: Apache-2.0
"""Every command of a rendered pod is one that this release understands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.cli.main import app
from services.device_plugin import main as device_plugin
from services.fault_agent import main as fault_agent
from services.node_keeper import main as node_keeper
from services.orchestrator import main as orchestrator
from services.page_server import main as page_server
from tests.harness import helm
from tests.harness.chart_values import MATRIX
from tests.harness.helm import Object, containers, pods

_VARIABLES = {"POD_IP": "10.1.2.3", "NODE_NAME": "node-a"}


def _commands(objects: list[Object], ip: str) -> Iterator[list[str]]:
    """As the kubelet would start them."""
    for _, pod in pods(objects):
        for container in containers(pod):
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            own = [*container["command"], *container["args"]]
            for command in filter(None, (own, hook)):
                known = {**_VARIABLES, "POD_IP": ip}
                yield [
                    re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], word)  # noqa: B023
                    for word in command
                ]


@pytest.mark.parametrize("name", MATRIX)
def test_commands_are_understood(name: str, tmp_path: Path) -> None:
    ipv6 = MATRIX[name].get("node", {}).get("ipFamily") == "IPv6"
    seen = set()
    for words in _commands(helm.render(MATRIX[name]), "fd00::1" if ipv6 else "10.1.2.3"):
        command = words[2:] if words[:2] == ["tini", "--"] else words
        program, what, *arguments = command
        assert program == "godwit"
        seen.add(what.partition("=")[0])
        if what == "orchestrator":
            settings = orchestrator.parse(arguments)
            assert settings.rest.port == 8080
        elif what == "fault-agent":
            assert fault_agent.Config.from_argv(arguments).node.name == "node-a"
        elif what == "page-server":
            there = [f"--ram-dir={tmp_path}" if "--ram-dir" in e else e for e in arguments]
            assert page_server.Config.from_argv(there).listen.port == 7443
        elif what == "node-keeper":
            node_keeper.Config.from_argv(arguments)
        elif what == "device-plugin":
            here = [f"--kubelet-dir={tmp_path}" if "--kubelet-dir" in e else e for e in arguments]
            assert len(device_plugin.Config.from_argv(here).resources) >= 2
        elif what == "node-wait":
            assert len(arguments) == 1
        else:
            _parse(command[1:])
    assert {"orchestrator", "fault-agent", "page-server", "node-keeper", "node-wait"} <= seen


def _parse(arguments: list[str]) -> None:
    """Down to the command that takes them; nothing is run: an unknown option comes before help."""
    done = CliRunner().invoke(app, [*arguments, "--help"])
    assert done.exit_code == 0, done.output


def test_an_unknown_option_would_be_seen() -> None:
    assert CliRunner().invoke(app, ["nodes", "--no-such-option", "--help"]).exit_code != 0
