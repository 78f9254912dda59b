# SPDX-License-Identifier: Apache-2.0
"""A test that lacks something must say so, and must not pass where the machine should have it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import require as harness
from tests.harness.require import REQUIRE_ENV, Thing, require, required_names


@pytest.fixture(autouse=True)
def _two_things(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that has legs and lacks wings; what was probed before is forgotten."""
    monkeypatch.setattr(
        harness,
        "THINGS",
        {
            "legs": Thing(probe=lambda: None, what_to_do="walk"),
            "wings": Thing(probe=lambda: "ENODEV: no such device", what_to_do="grow some"),
        },
    )
    monkeypatch.delenv(REQUIRE_ENV, raising=False)
    harness.missing.cache_clear()
    yield
    harness.missing.cache_clear()


def test_what_is_there_ends_nothing() -> None:
    require()
    require("legs")


def test_what_is_missing_skips_and_says_what_to_do() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"needs wings \(ENODEV.*\): grow some"):
        require("legs", "wings")


@pytest.mark.parametrize("value", ["wings", "legs,wings", " wings , legs,"])
def test_what_must_be_there_fails(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(REQUIRE_ENV, value)
    with pytest.raises(pytest.fail.Exception, match=r"needs wings.*GODWIT_REQUIRE"):
        require("wings")


@pytest.mark.parametrize("value", ["", "legs"])
def test_other_requirements_leave_a_skip_a_skip(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(REQUIRE_ENV, value)
    with pytest.raises(pytest.skip.Exception):
        require("wings")


def test_an_unknown_requirement_is_refused() -> None:
    """GODWIT_REQUIRE=ufd would otherwise require nothing, and nobody would notice."""
    with pytest.raises(pytest.UsageError, match="'wing'"):
        required_names({REQUIRE_ENV: "legs,wing"})


def test_an_unknown_thing_is_an_error_of_the_test() -> None:
    with pytest.raises(KeyError):
        require("wing")


def test_the_real_probes_answer() -> None:
    """Whatever this machine has, a probe returns an answer and raises nothing."""
    for name in ("uffd", "kvm", "qemu", "tap", "netns", "root"):
        answer = _REAL_THINGS[name].probe()
        assert answer is None or answer


_REAL_THINGS = dict(harness.THINGS)
