# SPDX-License-Identifier: Apache-2.0
"""The keeper's process: certificates of one node out of all nodes', and what it refuses."""

from __future__ import annotations

import datetime as dt
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.common import certificates as files
from services.common.certificates import Kind, Subject
from services.common.cluster_certificates import Fleet, Wanted, renew
from services.common.errors import FailedPreconditionError
from services.common.lifecycle import ExitStatus
from services.node_keeper.certificates import Copies
from services.node_keeper.main import Complaints, Config

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
WANTED = Wanted(days=90, authority_days=3650, addresses=("o.ns.svc",))


def _later(days: int) -> dt.datetime:
    return NOW + dt.timedelta(days=days)


def test_certificates_are_renewed_after_two_thirds_of_their_life() -> None:
    fleet = Fleet()
    renew(fleet, WANTED, ["a"], NOW)
    first = dict(fleet.nodes)
    assert renew(fleet, WANTED, ["a"], _later(59)) == []
    assert fleet.nodes == first
    done = renew(fleet, WANTED, ["a"], _later(61))
    assert "a.node.godwit: renewed" in done
    assert fleet.nodes["a.key"] != first["a.key"]
    assert fleet.nodes["ca.crt"] == first["ca.crt"], "the authority is the same"


def test_what_somebody_else_signed_or_named_is_replaced() -> None:
    fleet, other = Fleet(), Fleet()
    renew(fleet, WANTED, ["a"], NOW)
    renew(other, WANTED, ["a"], NOW)
    fleet.nodes |= {key: other.nodes[key] for key in ("a.crt", "a.key")}
    more = Wanted(days=90, authority_days=3650, addresses=("o.ns.svc", "o.example"))
    done = renew(fleet, more, ["a"], NOW)
    assert done == ["orchestrator.godwit: renewed", "a.node.godwit: renewed"]


def test_a_node_that_is_gone_keeps_its_certificate_until_its_end() -> None:
    """Its guests' memory may still be there."""
    fleet = Fleet()
    renew(fleet, WANTED, ["a", "b"], NOW)
    renew(fleet, WANTED, ["a"], _later(89))
    assert "b.key" in fleet.nodes
    renew(fleet, WANTED, ["a"], _later(91))
    assert fleet.nodes.keys() == {"a.crt", "a.key", "ca.crt"}


def test_an_authority_that_is_no_good_is_not_replaced_in_silence() -> None:
    fleet = Fleet(authority={"tls.crt": b"?", "tls.key": b"?"})
    with pytest.raises(FailedPreconditionError, match="authority's Secret"):
        renew(fleet, WANTED, ["a"], NOW)


def _source(directory: Path, *nodes: str) -> Path:
    directory.mkdir(exist_ok=True)
    fleet = Fleet()
    renew(fleet, WANTED, nodes, dt.datetime.now(dt.UTC))
    for name, text in fleet.nodes.items():
        (directory / name).write_bytes(text)
    return directory


def test_a_node_that_has_no_certificate_is_told_what_to_do(tmp_path: Path) -> None:
    copies = Copies(source=_source(tmp_path / "all", "a"), node="b", target=tmp_path)
    with pytest.raises(FailedPreconditionError) as raised:
        copies.copy()
    assert "no certificate for node b" in raised.value.message
    assert "certManager" in (raised.value.hint or "")


def test_half_a_pair_is_not_copied(tmp_path: Path) -> None:
    source = _source(tmp_path / "all", "a", "b")
    (source / "a.key").write_bytes((source / "b.key").read_bytes())
    (tmp_path / "own").mkdir()
    with pytest.raises(FailedPreconditionError, match="P-256"):
        Copies(source=source, node="a", target=tmp_path / "own").copy()
    assert list((tmp_path / "own").iterdir()) == []


def test_the_process_copies_and_follows(tmp_path: Path) -> None:
    source = _source(tmp_path / "all", "a")
    own = tmp_path / "own"
    own.mkdir()
    command = [sys.executable, "-m", "services.node_keeper", f"--certificates-from={source}"]
    command += ["--certificates-of=a", f"--certificates-to={own}"]
    assert subprocess.run([*command, "--once"], check=False).returncode == ExitStatus.OK
    first = (own / files.CERTIFICATE).read_bytes()
    assert (own / files.KEY).stat().st_mode & 0o777 == 0o600
    _source(source, "a")
    with subprocess.Popen(command) as keeper:
        for _ in range(1000):
            if (own / files.CERTIFICATE).read_bytes() != first:
                break
            subprocess.run(["sleep", "0.02"], check=True)
        keeper.send_signal(signal.SIGTERM)
    assert keeper.returncode == ExitStatus.OK
    pair = files.read_pair(own / files.CERTIFICATE, own / files.KEY)
    assert files.subjects(pair.certificate) == [Subject(kind=Kind.NODE, name="a")]
    assert (own / files.CERTIFICATE).read_bytes() == (source / "a.crt").read_bytes()


def test_complaints_are_not_repeated_every_second(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    complaints = Complaints(clock=lambda: now[0])

    def fail() -> None:
        raise OSError("no")

    for second in range(90):
        now[0] = second
        assert complaints.attempt("part", fail) is False
    assert caplog.text.count("part: no") == 2
    assert complaints.attempt("part", lambda: None) is True


@pytest.mark.parametrize(
    "arguments",
    [
        ["--node-condition", "--node=a"],
        ["--node-condition", "--state-dir=/tmp"],
        ["--shutdown-inhibitor"],
        ["--certificates-from=/tmp"],
        ["--once", "--state-dir=/tmp"],
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        Config.from_argv(arguments)
    assert raised.value.code == ExitStatus.BAD_CONFIG
