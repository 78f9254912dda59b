# SPDX-License-Identifier: Apache-2.0
"""The certificates of a Kubernetes cluster's fleet, as Secrets: `godwit certs cluster`.

What the chart's Job runs with tls.mode selfSigned, again and again: it makes what is missing,
renews what has a third of its life left, and leaves alone what is good. The authority's key lives
in a Secret that its account alone may read; all nodes' keys are in one that all nodes' pods mount.
"""

from __future__ import annotations

import base64
import datetime as dt
import http
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography import x509

from services.common import certificates as files
from services.common.certificates import Kind, Pair, Subject
from services.common.errors import FailedPreconditionError, InvalidArgumentError

log = logging.getLogger(__name__)

VIEWER = "chart"
"""Name of the viewer that `helm test` and the look before an uninstall are."""
_CONFLICT_TRIES = 5


Names = dict[str, str]
"""Field of Fleet to the Secret's name, in the order in which they are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How certificates are made."""

    days: int
    authority_days: int
    addresses: tuple[str, ...]
    """Under which the orchestrator is called by who does not know its name."""


@dataclass(slots=True)
class Fleet:
    """The content of the four Secrets: file name to PEM."""

    authority: dict[str, bytes] = field(default_factory=dict)
    orchestrator: dict[str, bytes] = field(default_factory=dict)
    viewer: dict[str, bytes] = field(default_factory=dict)
    nodes: dict[str, bytes] = field(default_factory=dict)


def renew(fleet: Fleet, wanted: Wanted, nodes: Sequence[str], now: dt.datetime) -> list[str]:
    """Complete `fleet` for these nodes; what was done, a line each. Without I/O.

    Certificates of nodes that are gone stay until their end: a guest's memory may still be there.

    Raises:
        FailedPreconditionError: CERTIFICATE_UNREADABLE: the authority is there, and no good.
    """
    done: list[str] = []
    if not fleet.authority:
        pair = files.make_authority(days=wanted.authority_days, now=now)
        fleet.authority = {files.CERTIFICATE: pair.certificate_pem, files.KEY: pair.key_pem}
        done.append(f"authority made, good until {pair.certificate.not_valid_after_utc:%Y-%m-%d}")
    authority = _pair(fleet.authority, files.CERTIFICATE, files.KEY)
    if authority is None:
        raise FailedPreconditionError(
            "CERTIFICATE_UNREADABLE",
            "the authority's Secret has no certificate with its key",
            hint="restore it; removing it makes a new authority, which no process trusts until"
            " every certificate is replaced",
        )
    whole = (files.CERTIFICATE, files.KEY)
    orchestrator = Subject(kind=Kind.ORCHESTRATOR, name="")
    work: list[tuple[dict[str, bytes], Subject, tuple[str, str], tuple[str, ...]]] = [
        (fleet.orchestrator, orchestrator, whole, wanted.addresses),
        (fleet.viewer, Subject(kind=Kind.VIEWER, name=VIEWER), whole, ()),
    ]
    for node in nodes:
        try:
            subject = Subject(kind=Kind.NODE, name=node)
        except InvalidArgumentError as error:
            done.append(f"no certificate for node {node}: {error.message}")
            continue
        work.append((fleet.nodes, subject, (f"{node}.crt", f"{node}.key"), ()))
    _forget(fleet.nodes, set(nodes), now)
    for secret, subject, (certificate_name, key_name), addresses in work:
        secret[files.AUTHORITY] = authority.certificate_pem
        old = _pair(secret, certificate_name, key_name)
        if old is not None and _good(old, authority, subject, addresses, now):
            continue
        made = files.issue(authority, subject, addresses=addresses, days=wanted.days, now=now)
        secret[certificate_name] = made.certificate_pem
        secret[key_name] = made.key_pem
        done.append(f"{subject.dns_name}: {'made' if old is None else 'renewed'}")
    return done


def _pair(secret: dict[str, bytes], certificate_name: str, key_name: str) -> Pair | None:
    try:
        return files.parse_pair(secret[certificate_name], secret[key_name])
    except (KeyError, FailedPreconditionError):
        return None


def _good(
    pair: Pair, authority: Pair, subject: Subject, addresses: Sequence[str], now: dt.datetime
) -> bool:
    certificate = pair.certificate
    try:
        certificate.verify_directly_issued_by(authority.certificate)
    except Exception:  # noqa: BLE001 - several libraries' errors, and all mean no
        return False
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if not {subject.dns_name, *addresses} <= set(names.get_values_for_type(x509.DNSName)):
        return False
    end, begin = certificate.not_valid_after_utc, certificate.not_valid_before_utc
    return end - now > (end - begin) / 3


def _forget(nodes: dict[str, bytes], known: set[str], now: dt.datetime) -> None:
    for name in [each for each in nodes if each.endswith(".crt") and each != files.AUTHORITY]:
        node = name.removesuffix(".crt")
        if node in known:
            continue
        pair = _pair(nodes, name, f"{node}.key")
        if pair is None or pair.certificate.not_valid_after_utc <= now:
            nodes.pop(name)
            nodes.pop(f"{node}.key", None)


# --- Secrets


class Secrets:
    """The Secrets of one namespace."""

    def __init__(self, core: Any, namespace: str) -> None:
        """`core`: kubernetes.client.CoreV1Api."""
        self._core = core
        self._namespace = namespace
        self._versions: dict[str, str] = {}

    def read(self, name: str) -> dict[str, bytes]:
        """Its content; empty if there is none."""
        from kubernetes.client import ApiException

        try:
            secret = self._core.read_namespaced_secret(name, self._namespace)
        except ApiException as error:
            if error.status != http.HTTPStatus.NOT_FOUND:
                raise
            self._versions.pop(name, None)
            return {}
        self._versions[name] = secret.metadata.resource_version
        return {key: base64.b64decode(text) for key, text in (secret.data or {}).items()}

    def write(self, name: str, content: dict[str, bytes]) -> None:
        """Write what `read` has read, changed.

        Raises:
            kubernetes.client.ApiException: 409: somebody else has written it since.
        """
        data = {key: base64.b64encode(value).decode() for key, value in content.items()}
        metadata: dict[str, Any] = {
            "name": name,
            "labels": {"app.kubernetes.io/part-of": "godwit"},
        }
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}
        if version := self._versions.get(name):
            metadata["resourceVersion"] = version
            self._core.replace_namespaced_secret(name, self._namespace, body)
        else:
            self._core.create_namespaced_secret(self._namespace, body)


def bring_about(secrets: Secrets, names: Names, make: Callable[[Fleet], list[str]]) -> list[str]:
    """Read the four Secrets, let `make` complete them, write those that it changed.

    Raises:
        kubernetes.client.ApiException: refused, or changed by somebody else again and again.
    """
    from kubernetes.client import ApiException

    for attempt in range(_CONFLICT_TRIES):
        fleet = Fleet(**{part: secrets.read(name) for part, name in names.items()})
        before = {part: dict(getattr(fleet, part)) for part in names}
        done = make(fleet)
        try:
            for part, name in names.items():
                # The authority first: what it signed is worth nothing without it.
                if getattr(fleet, part) != before[part]:
                    secrets.write(name, getattr(fleet, part))
        except ApiException as error:
            if error.status != http.HTTPStatus.CONFLICT or attempt == _CONFLICT_TRIES - 1:
                raise
            log.info("somebody else writes the Secrets too: read again")
            continue
        return done
    raise AssertionError("unreachable")


def trust(admission: Any, name: str, orchestrator: dict[str, bytes]) -> bool:
    """Have the API server trust the orchestrator's webhook; False: it did already."""
    bundle = base64.b64encode(orchestrator[files.AUTHORITY]).decode()
    found = admission.read_validating_webhook_configuration(name)
    patch = [
        {"op": "add", "path": f"/webhooks/{index}/clientConfig/caBundle", "value": bundle}
        for index, each in enumerate(found.webhooks or [])
        if each.client_config.ca_bundle != bundle
    ]
    if patch:
        admission.patch_validating_webhook_configuration(name, patch)
    return bool(patch)
