# SPDX-License-Identifier: Apache-2.0
"""Capabilities by name, and given up in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.common.errors import InvalidArgumentError
from services.common.privileges.capabilities import WHY, Capability, held, parse_capability

GIVE_UP = """
import os, sys
from services.common.privileges import capabilities as c
if sys.argv[1:]:
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
c.keep_only([c.Capability.NET_ADMIN])
c.keep_only([c.Capability.NET_ADMIN])  # as the child of a parent that did it
print(sorted(c.held().permitted), sorted(c.held().bounding), c.held().no_new_privs, sep=";")
print(c.held())
"""


def give_up(*argv: str) -> tuple[str, str, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", GIVE_UP, *argv], capture_output=True, text=True, check=True
    )
    facts, said = done.stdout.splitlines()
    permitted, bounding, new = facts.split(";")
    return permitted, bounding, new, said


@pytest.mark.parametrize("text", ["sys_admin", "CAP_SYS_ADMIN", "Cap_Sys_Admin"])
def test_names_as_people_write_them(text: str) -> None:
    assert parse_capability(text) is Capability.SYS_ADMIN


@pytest.mark.parametrize("text", ["", "cap_", "sys_module", "21"])
def test_what_nobody_has_a_use_for_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_capability(text)


def test_each_that_can_be_kept_has_a_reason() -> None:
    assert WHY.keys() == set(Capability)


@pytest.mark.requires("root")
def test_root_keeps_what_it_names() -> None:
    kept = str(sorted({12} & held().permitted))
    permitted, bounding, new, said = give_up()
    assert (permitted, bounding, new) == (kept, kept, "True")
    assert "CAP_NET_ADMIN (tap devices of virtual machines); no new privileges" in said


@pytest.mark.requires("root")
def test_an_ordinary_user_has_nothing_to_give_up() -> None:
    """It cannot shrink the bounding set, and has no way to gain what is in it."""
    permitted, _, new, said = give_up("ordinary")
    assert (permitted, new) == ("[]", "True")
    assert said.startswith("user 65534, keeps no capability")
