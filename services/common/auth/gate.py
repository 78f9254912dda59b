# SPDX-License-Identifier: Apache-2.0
"""Recognises callers by what they bring, and lets through whom the table allows.

A bearer token counts before the certificate of the connection that brings it: a proxy or a program
with a certificate of its own may act for people. One that is not good is refused, whatever the
certificate says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.common.auth.identity import LOCAL, Caller, How, Identity
from services.common.auth.rules import Rule
from services.common.errors import PermissionDeniedError, UnauthenticatedError

TOKEN_LEN_MAX = 8 << 10
"""Of a bearer token; a JWT with a long list of groups has some kilobytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a caller brings. Never printed: a token is in it."""

    authorization: str = field(default="", repr=False)
    """The header of that name."""
    dns_names: tuple[str, ...] = ()
    """Of the certificate that the TLS layer has verified; empty: there was none."""


class Bearer(Protocol):
    """Knows some tokens."""

    async def recognise(self, token: str) -> Identity | None:
        """Whose token it is; None: none that this one issues.

        Raises:
            UnauthenticatedError: it is one of this one's, and not good.
        """


def unauthenticated(message: str, hint: str) -> UnauthenticatedError:
    """The refusal of whoever is not known."""
    return UnauthenticatedError("UNAUTHENTICATED", message, hint=hint)


class Gate:
    """Whom one server lets in."""

    def __init__(
        self, bearers: Sequence[Bearer] = (), *, certificates: bool = False, node: str = ""
    ) -> None:
        """`certificates`: callers may have some. `node`: whose server this is, on a node."""
        self._bearers = tuple(bearers)
        self._certificates = certificates
        self._node = node

    @property
    def is_open(self) -> bool:
        """Nobody is asked: nothing is set up."""
        return not self._bearers and not self._certificates

    @property
    def takes_tokens(self) -> bool:
        """Bearer tokens are known here."""
        return bool(self._bearers)

    async def identify(self, credentials: Credentials) -> Identity | None:
        """Who it is; None: he does not say.

        Raises:
            UnauthenticatedError: UNAUTHENTICATED: what he says is not good.
        """
        if self.is_open:
            return LOCAL
        if credentials.authorization:
            return await self._by_token(credentials.authorization)
        if credentials.dns_names and self._certificates:
            return _by_certificate(credentials.dns_names)
        return None

    async def _by_token(self, authorization: str) -> Identity:
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token or len(token) > TOKEN_LEN_MAX:
            raise unauthenticated(
                "the authorization is no bearer token", "send `Authorization: Bearer TOKEN`"
            )
        for bearer in self._bearers:
            if identity := await bearer.recognise(token):
                return identity
        raise unauthenticated(
            "the token is unknown, or was revoked", "get a new one; see docs/api-access.md"
        )

    def allow(
        self, rule: Rule | None, method: str, identity: Identity | None, fields: Mapping[str, str]
    ) -> None:
        """Let through, or raise. `fields`: of the request, as far as `rule.own` needs them.

        Raises:
            UnauthenticatedError: UNAUTHENTICATED.
            PermissionDeniedError: PERMISSION_DENIED.
        """
        if self.is_open or (rule is not None and not rule.callers):
            return
        if identity is None:
            raise unauthenticated(f"{method} needs to know who asks", self._what_to_bring())
        if rule is None or identity.caller not in rule.callers:
            raise _denied(identity, method, rule)
        if identity.caller is Caller.NODE and rule.own:
            own = self._node if rule.own == "." else fields.get(rule.own, "")
            if own != identity.name:
                raise PermissionDeniedError(
                    "PERMISSION_DENIED",
                    f"node {identity.name} may not speak for node {own!r}: {method}",
                    hint="a node's certificate is for that node alone",
                    metadata={"caller": str(identity)},
                )

    def _what_to_bring(self) -> str:
        ways = ["a bearer token"] if self._bearers else []
        ways += ["a client certificate"] if self._certificates else []
        return f"bring {' or '.join(ways)}; see docs/api-access.md"


def _by_certificate(dns_names: Sequence[str]) -> Identity:
    # Late: only who speaks TLS needs a library for certificates.
    from services.common.certificates import Subject

    subjects = [subject for subject in map(Subject.of, dns_names) if subject]
    if len(subjects) != 1:
        raise unauthenticated(
            f"the certificate says who its owner is {len(subjects)} times:"
            f" {', '.join(dns_names[:4])}",
            "it must have one DNS name below .godwit; `godwit certs issue` makes such",
        )
    subject = subjects[0]
    return Identity(name=subject.name, caller=Caller(subject.kind.value), how=How.CERTIFICATE)


def _denied(identity: Identity, method: str, rule: Rule | None) -> PermissionDeniedError:
    needed = sorted(rule.callers, key=list(Caller).index) if rule else []
    return PermissionDeniedError(
        "PERMISSION_DENIED",
        f"{identity} may not call {method}",
        hint=f"it takes {' or '.join(needed)}" if needed else "nobody may",
        metadata={"caller": str(identity)},
    )
