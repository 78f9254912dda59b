# SPDX-License-Identifier: Apache-2.0
"""The units of deploy/systemd are ones, keep guests alive and are as closed as they can be.

By systemd's own judgement where it is installed; systemd itself does not run here.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from services.fault_agent import main as fault_agent
from services.page_server import main as page_server

UNITS = Path(__file__).resolve().parent.parent.parent / "deploy" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
EXPOSURE_MAX = {"page-server": 25, "orchestrator": 25, "fault-agent": 55}
"""Tenths of systemd's ten; the agent starts VMMs, what is open for it is open for them."""


def need_systemd() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze: apt-get install --no-install-recommends systemd")


def values(unit: Path, name: str) -> list[str]:
    text = unit.read_text().replace("\\\n", " ")
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


def name_of(unit: Path) -> str:
    return unit.stem.removeprefix("godwit-")


@pytest.mark.parametrize("unit", SERVICES, ids=name_of)
def test_what_fails_is_started_again_without_end(unit: Path) -> None:
    assert values(unit, "Restart") == ["always"]
    assert values(unit, "StartLimitIntervalSec") == ["0"]
    assert values(unit, "NoNewPrivileges") == ["yes"]
    assert values(unit, "SystemCallErrorNumber"), "without it systemd kills"


def test_no_unit_ends_a_guest() -> None:
    """VMMs are in the agent's control group: only the agent itself is stopped, by whatever."""
    unit = UNITS / "godwit-fault-agent.service"
    assert values(unit, "KillMode") == ["process"]
    assert values(unit, "OOMPolicy") == ["continue"]
    assert values(unit, "Delegate") == ["yes"]
    assert "--respawn" in values(unit, "ExecStart")[0].split()
    for forbidden in ("PrivateTmp", "PrivateDevices", "MemoryDenyWriteExecute", "RuntimeMaxSec"):
        assert values(unit, forbidden) == [], forbidden


def test_the_command_lines_are_understood() -> None:
    """With what README.md says goes into the environment."""
    text = (UNITS / "README.md").read_text()
    variables = dict(re.findall(r"^(GODWIT_\w+)=(.*)$", text, re.MULTILINE))
    for name, parse in (
        ("page-server", page_server.Config.from_argv),
        ("fault-agent", fault_agent.Config.from_argv),
    ):
        line = values(UNITS / f"godwit-{name}.service", "ExecStart")[0]
        for variable, value in variables.items():
            line = re.sub(rf"\$(\{{{variable}\}}|{variable}\b)", value, line)
        line = line.replace("/var/lib/godwit/ram", "/dev/shm").replace("10.0.0.", "127.0.0.")
        program, command, *argv = shlex.split(line)
        assert program.endswith("/godwit")
        assert command == name
        parse(argv)


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    need_systemd()
    copies = []
    for unit in [*SERVICES, *UNITS.glob("*.mount")]:
        copy = tmp_path / unit.name
        # What is not installed here.
        copy.write_text(unit.read_text().replace("/opt/godwit/bin/godwit", "/bin/true"))
        copies.append(copy)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, copies)],
        capture_output=True,
        text=True,
        check=False,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
    )
    wrong = [line for line in done.stderr.splitlines() if "godwit" in line]
    assert not wrong, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("unit", SERVICES, ids=name_of)
def test_systemd_calls_it_closed(unit: Path) -> None:
    need_systemd()
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--json=short", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    checks = json.loads(done.stdout)
    open_ = {check["name"] for check in checks if check["set"] is False}
    exposure = sum(float(check["exposure"] or 0) for check in checks)
    assert exposure * 10 <= EXPOSURE_MAX[name_of(unit)], sorted(open_)
