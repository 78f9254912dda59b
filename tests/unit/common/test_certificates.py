# SPDX-License-Identifier: Apache-2.0
"""Goal: the files of `godwit certs` make two processes believe each other, and nobody else."""

from __future__ import annotations

import datetime as dt
import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import certificates
from services.common.certificates import Kind, Pair, Subject
from services.common.errors import FailedPreconditionError, InvalidArgumentError

NOW = dt.datetime.now(dt.UTC)
NODE_A = Subject(kind=Kind.NODE, name="a")


def _authority() -> Pair:
    return certificates.make_authority(days=10, now=NOW)


def _write(directory: Path, pair: Pair, authority: Pair) -> Path:
    directory.mkdir()
    for name, data in (
        (certificates.CERTIFICATE, pair.certificate_pem),
        (certificates.KEY, pair.key_pem),
        (certificates.AUTHORITY, authority.certificate_pem),
    ):
        certificates.write_new(directory / name, data, secret=name == certificates.KEY)
    return directory


def _context(directory: Path, side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(directory / certificates.CERTIFICATE, directory / certificates.KEY)
    context.load_verify_locations(directory / certificates.AUTHORITY)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _shake(client: Path, server: Path, server_name: str) -> None:
    """A handshake in memory. Raises ssl.SSLError."""
    wires = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        _context(client, ssl.PROTOCOL_TLS_CLIENT).wrap_bio(
            wires[0], wires[1], server_hostname=server_name
        ),
        _context(server, ssl.PROTOCOL_TLS_SERVER).wrap_bio(wires[1], wires[0], server_side=True),
    )
    # The client is done before the server has looked at its certificate.
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_both_ends_believe_each_other(tmp_path: Path) -> None:
    """A node and an orchestrator of one authority; by identity and by address."""
    authority = _authority()
    node = certificates.issue(authority, NODE_A, addresses=["10.1.2.3", "Host1"], days=1, now=NOW)
    orchestrator = certificates.issue(
        authority, Subject(kind=Kind.ORCHESTRATOR, name=""), days=1, now=NOW
    )
    a = _write(tmp_path / "a", node, authority)
    o = _write(tmp_path / "o", orchestrator, authority)
    for name in ("a.node.godwit", "10.1.2.3", "host1"):
        _shake(o, a, name)
    _shake(a, o, "orchestrator.godwit")
    with pytest.raises(ssl.SSLError, match="mismatch"):
        _shake(o, a, "b.node.godwit")
    assert certificates.subjects(node.certificate) == [NODE_A]


def test_another_authority_is_not_believed(tmp_path: Path) -> None:
    """Neither as a client's nor as a server's."""
    ours, other = _authority(), _authority()
    a = _write(tmp_path / "a", certificates.issue(ours, NODE_A, days=1, now=NOW), ours)
    stranger = certificates.issue(other, Subject(kind=Kind.NODE, name="b"), days=1, now=NOW)
    b = _write(tmp_path / "b", stranger, ours)
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        _shake(b, a, "a.node.godwit")
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        _shake(a, b, "b.node.godwit")


def test_dates_count(tmp_path: Path) -> None:
    authority = certificates.make_authority(days=1000, now=NOW - dt.timedelta(days=500))
    late = certificates.issue(authority, NODE_A, days=1, now=NOW - dt.timedelta(days=3))
    early = certificates.issue(authority, NODE_A, days=9, now=NOW + dt.timedelta(days=3))
    good = certificates.issue(authority, NODE_A, days=9, now=NOW)
    o = _write(tmp_path / "o", good, authority)
    for name, pair in (("late", late), ("early", early)):
        with pytest.raises(ssl.SSLError, match=r"expired|not yet valid"):
            _shake(o, _write(tmp_path / name, pair, authority), "a.node.godwit")


def test_a_certificate_signs_nobody(tmp_path: Path) -> None:
    """A stolen node key makes no other node."""
    authority = _authority()
    node = certificates.issue(authority, NODE_A, days=1, now=NOW)
    forged = certificates.issue(node, Subject(kind=Kind.ADMIN, name="x"), days=1, now=NOW)
    a = _write(tmp_path / "a", node, authority)
    x = _write(tmp_path / "x", forged, authority)
    with (x / certificates.CERTIFICATE).open("ab") as file:
        file.write(node.certificate_pem)
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        _shake(x, a, "a.node.godwit")


@given(st.sampled_from(Kind), st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True))
def test_a_name_says_who_it_is(kind: Kind, name: str) -> None:
    """There and back."""
    subject = Subject(kind=kind, name="" if kind is Kind.ORCHESTRATOR else name)
    assert Subject.of(subject.dns_name) == subject


@given(st.text(alphabet="abcd.-*\0 ", max_size=30) | st.text(max_size=30))
def test_other_names_are_nobody(name: str) -> None:
    """Whatever a certificate says: nobody, or the one subject with that name."""
    found = Subject.of(name)
    assert found is None or found.dns_name == name


@pytest.mark.parametrize(
    "name", ["node.godwit", "*.node.godwit", "a.b.node.godwit", "a.root.godwit", "A.node.godwit"]
)
def test_near_misses_are_nobody(name: str) -> None:
    assert Subject.of(name) is None


@pytest.mark.parametrize("address", ["b.node.godwit", "", "a b", "-x", "a..b", "*.example.org"])
def test_an_address_is_no_identity(address: str) -> None:
    """Or a node's host name could make it another node."""
    with pytest.raises(InvalidArgumentError, match=r"identities|host name"):
        certificates.issue(_authority(), NODE_A, addresses=[address], days=1, now=NOW)


@pytest.mark.parametrize("name", ["", "A", "a.b", "-a", "a" * 64, "a/b"])
def test_a_name_is_one_label(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="DNS label"):
        Subject(kind=Kind.NODE, name=name)


def test_files_are_not_written_over(tmp_path: Path) -> None:
    """And a key is its owner's alone."""
    authority = _authority()
    a = _write(tmp_path / "a", certificates.issue(authority, NODE_A, days=1, now=NOW), authority)
    with pytest.raises(FailedPreconditionError, match="there already"):
        certificates.write_new(a / certificates.KEY, b"", secret=True)
    certificates.replace(a / certificates.KEY, b"new", secret=True)
    assert (a / certificates.KEY).read_bytes() == b"new"
    assert (a / certificates.KEY).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in a.iterdir()) == ["ca.crt", "tls.crt", "tls.key"]
    with pytest.raises(FailedPreconditionError, match=r"tls\.key"):
        certificates.read_pair(a / certificates.CERTIFICATE, a / certificates.KEY)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    authority = _authority()
    a = _write(tmp_path / "a", certificates.issue(authority, NODE_A, days=1, now=NOW), authority)
    with pytest.raises(FailedPreconditionError, match="is not the P-256 key of"):
        certificates.read_pair(a / certificates.AUTHORITY, a / certificates.KEY)
