# SPDX-License-Identifier: Apache-2.0
"""How an orchestrator is told whom to let in, and what it says where nobody is asked."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common import lifecycle
from services.common.auth.access import Access
from services.common.auth.audit import AuditLog
from services.common.auth.gate import Bearer, Gate
from services.common.auth.identity import ROLES, Caller
from services.common.auth.oidc import Oidc, OidcSettings, require_safe
from services.common.auth.tokens import TokensFile
from services.common.errors import InvalidArgumentError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthSettings:
    """Who is let in. Nothing is set: nobody is asked."""

    tokens_file: Path | None = None
    oidc: OidcSettings | None = None
    audit_log: Path | None = None
    """None: into the ordinary log."""


@contextlib.asynccontextmanager
async def admitting(settings: AuthSettings, *, certificates: bool) -> AsyncIterator[Access]:
    """The doors, for the length of the block. `certificates`: the listeners speak TLS.

    Raises:
        FailedPreconditionError: TOKENS_UNREADABLE, KEYS_UNREADABLE, AUDIT_UNWRITABLE.
    """
    bearers: list[Bearer] = []
    tasks = {}
    if settings.tokens_file:
        bearers.append(TokensFile(settings.tokens_file))
    if settings.oidc:
        oidc = Oidc(settings.oidc)
        await oidc.start()
        bearers.append(oidc)
        tasks["oidc"] = oidc.keep
    gate = Gate(bearers, certificates=certificates)
    if gate.is_open:
        log.warning(
            "NO AUTHENTICATION: whoever reaches the listeners is an admin; see --tokens-file,"
            " --oidc-issuer"
        )
    with contextlib.closing(AuditLog(settings.audit_log)) as audit:
        async with lifecycle.background(tasks):
            yield Access(gate, audit)


def add_auth_options(parser: argparse.ArgumentParser, env: Mapping[str, str]) -> None:
    """The options of the command line; GODWIT_* stand in for what it leaves out."""
    group = parser.add_argument_group("who may call (docs/api-access.md)")
    group.add_argument(
        "--tokens-file",
        default=env.get("GODWIT_TOKENS_FILE", ""),
        metavar="PATH",
        help="bearer tokens, a line each: `godwit tokens new` (GODWIT_TOKENS_FILE)",
    )
    group.add_argument(
        "--oidc-issuer",
        default=env.get("GODWIT_OIDC_ISSUER", ""),
        metavar="URL",
        help="take the JWTs of this issuer (GODWIT_OIDC_ISSUER)",
    )
    group.add_argument(
        "--oidc-audience",
        default=env.get("GODWIT_OIDC_AUDIENCE", ""),
        metavar="WORD",
        help="that are meant for this audience (GODWIT_OIDC_AUDIENCE)",
    )
    group.add_argument(
        "--oidc-jwks",
        default=env.get("GODWIT_OIDC_JWKS", ""),
        metavar="URL|PATH",
        help="where its keys are, if not where its discovery document says (GODWIT_OIDC_JWKS)",
    )
    group.add_argument(
        "--oidc-role-claim",
        default=env.get("GODWIT_OIDC_ROLE_CLAIM", "roles"),
        metavar="CLAIM",
        help="where a token says its owner's roles (GODWIT_OIDC_ROLE_CLAIM, %(default)s)",
    )
    group.add_argument(
        "--oidc-name-claim",
        default=env.get("GODWIT_OIDC_NAME_CLAIM", "sub"),
        metavar="CLAIM",
        help="where it says who he is (GODWIT_OIDC_NAME_CLAIM, %(default)s)",
    )
    group.add_argument(
        "--oidc-role",
        action="append",
        default=None,
        metavar="WORD=ROLE",
        help="what a word there is worth: viewer, operator or admin; repeat it"
        " (GODWIT_OIDC_ROLES, by commas)",
    )
    group.set_defaults(oidc_roles_env=env.get("GODWIT_OIDC_ROLES", ""))
    group.add_argument(
        "--audit-log",
        default=env.get("GODWIT_AUDIT_LOG", ""),
        metavar="PATH",
        help="a JSON line for each call that changes something (GODWIT_AUDIT_LOG)",
    )


def read_auth(parsed: argparse.Namespace) -> AuthSettings:
    """What `add_auth_options` has found.

    Raises:
        InvalidArgumentError: OPTION_INVALID.
    """
    return AuthSettings(
        tokens_file=Path(parsed.tokens_file) if parsed.tokens_file else None,
        oidc=_read_oidc(parsed) if parsed.oidc_issuer else None,
        audit_log=Path(parsed.audit_log) if parsed.audit_log else None,
    )


def _read_oidc(parsed: argparse.Namespace) -> OidcSettings:
    if not parsed.oidc_audience:
        raise InvalidArgumentError(
            "OPTION_INVALID",
            "--oidc-issuer needs --oidc-audience",
            hint="without it a token for any other service of that issuer would do",
        )
    for url in (parsed.oidc_issuer, parsed.oidc_jwks):
        if url.startswith("http"):
            try:
                require_safe(url)
            except ValueError as error:
                raise InvalidArgumentError("OPTION_INVALID", str(error)) from None
    given = parsed.oidc_role
    if given is None:
        given = [each for each in parsed.oidc_roles_env.split(",") if each]
    return OidcSettings(
        issuer=parsed.oidc_issuer,
        audience=parsed.oidc_audience,
        jwks=parsed.oidc_jwks,
        role_claim=parsed.oidc_role_claim,
        name_claim=parsed.oidc_name_claim,
        roles=dict(read_role(each) for each in given),
    )


def read_role(text: str) -> tuple[str, Caller]:
    """WORD=ROLE.

    Raises:
        InvalidArgumentError: OPTION_INVALID.
    """
    word, _, role = text.rpartition("=")
    if not word or role not in set(ROLES):
        raise InvalidArgumentError(
            "OPTION_INVALID", f"{text!r} is not WORD=ROLE", hint=f"a role is {', '.join(ROLES)}"
        )
    return word, Caller(role)
