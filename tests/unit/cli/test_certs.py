# SPDX-License-Identifier: Apache-2.0
"""Goal: three commands make a fleet's certificates, and none of them harms what is there."""

from __future__ import annotations

import ssl
from pathlib import Path

from services.cli.exit_status import ExitStatus
from services.common import certificates
from tests.unit.cli.conftest import Godwit


def test_from_nothing_to_a_fleet(godwit: Godwit, tmp_path: Path) -> None:
    """init, issue; what comes out loads, and says who it is."""
    authority = tmp_path / "authority"
    assert godwit("certs", "init", str(authority)).status == ExitStatus.OK
    assert (authority / certificates.AUTHORITY_KEY).stat().st_mode & 0o777 == 0o600
    for arguments, name in (
        (("node", "a", "--address", "10.0.0.1"), "a.node.godwit"),
        (("orchestrator",), "orchestrator.godwit"),
        (("operator", "eve"), "eve.operator.godwit"),
    ):
        to = tmp_path / name
        ended = godwit("certs", "issue", *arguments, "--to", str(to), "--authority", str(authority))
        assert ended.status == ExitStatus.OK
        assert name in ended.out
        pair = certificates.read_pair(to / certificates.CERTIFICATE, to / certificates.KEY)
        assert [each.dns_name for each in certificates.subjects(pair.certificate)] == [name]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(to / certificates.AUTHORITY)


def test_nothing_is_written_over(godwit: Godwit, tmp_path: Path) -> None:
    """A second init or issue is refused; --renew is how one means it."""
    authority, to = tmp_path / "authority", tmp_path / "a"
    issue = ("certs", "issue", "node", "a", "--to", str(to), "--authority", str(authority))
    assert godwit("certs", "init", str(authority)).status == ExitStatus.OK
    before = (authority / certificates.AUTHORITY_KEY).read_bytes()
    again = godwit("certs", "init", str(authority))
    assert again.status == ExitStatus.REFUSED
    assert "FILE_EXISTS" in again.err
    assert (authority / certificates.AUTHORITY_KEY).read_bytes() == before
    assert godwit(*issue).status == ExitStatus.OK
    key = (to / certificates.KEY).read_bytes()
    assert godwit(*issue).status == ExitStatus.REFUSED
    assert (to / certificates.KEY).read_bytes() == key
    assert godwit(*issue, "--renew").status == ExitStatus.OK
    assert (to / certificates.KEY).read_bytes() != key


def test_what_is_wrong_is_said(godwit: Godwit, tmp_path: Path) -> None:
    authority = str(tmp_path / "authority")
    missing = godwit("certs", "issue", "node", "a", "--authority", authority)
    assert "CERTIFICATE_UNREADABLE" in missing.err
    godwit("certs", "init", authority)
    kind = godwit("certs", "issue", "root", "a", "--authority", authority)
    assert "none of node, orchestrator" in kind.err
    name = godwit("certs", "issue", "node", "A.B", "--authority", authority)
    assert "DNS label" in name.err
    assert not list(tmp_path.glob("*.godwit"))
