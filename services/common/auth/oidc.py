# SPDX-License-Identifier: Apache-2.0
"""Bearer tokens of an identity provider: JWTs, checked against its published keys.

The keys come from a file, or over HTTPS from the issuer. They are looked for again when a token
names one that is not known, and now and then; an issuer that cannot be reached takes nothing away:
the keys that are known go on counting. Only signatures by private keys are taken (ALGORITHMS): with
a shared secret, or with none, whoever can read our settings, or anybody, could make tokens.
Source: RFC 7519, RFC 8725, OpenID Connect Discovery 1.0.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.common.auth.gate import unauthenticated
from services.common.auth.identity import Caller, How, Identity
from services.common.errors import (
    FailedPreconditionError,
    GodwitError,
    UnauthenticatedError,
    UnavailableError,
)

log = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
LEEWAY_S = 30
"""How far the issuer's clock may be from ours."""
REFRESH_S = 300.0
"""How old the keys may get before they are looked for again."""
RETRY_S = 10.0
"""Shortest time between two looks: tokens with made-up key ids must not become a load on it."""
FETCH_S = 5.0
ANSWER_BYTES_MAX = 1 << 20
KEY_COUNT_MAX = 100
NAME_LEN_MAX = 200
_REQUIRED = ["exp", "iss", "aud", "sub"]
_HINT = "sign in again; the clocks of both hosts must agree to half a minute"

Fetch = Callable[[str], Awaitable[bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OidcSettings:
    """Whose tokens count, and what they are worth."""

    issuer: str
    """The `iss` of its tokens, letter by letter."""
    audience: str
    """One of the token's `aud`."""
    jwks: str = ""
    """https://, http:// to loopback, or a file; empty: the issuer's discovery document names it."""
    role_claim: str = "roles"
    """Where a token says what its owner is, dots between the names; a word or a list of them."""
    name_claim: str = "sub"
    """Where it says who he is."""
    roles: Mapping[str, Caller] = field(default_factory=dict)
    """Role by the claim's word; empty: the words are viewer, operator, admin."""


_WORDS: Mapping[str, Caller] = {
    each.value: each for each in (Caller.VIEWER, Caller.OPERATOR, Caller.ADMIN)
}


async def fetch_over_http(url: str) -> bytes:
    """GET, without redirects, without a proxy of the environment.

    Raises:
        OSError, ValueError: there is no such answer.
    """
    import httpx

    try:
        async with (
            httpx.AsyncClient(timeout=FETCH_S, trust_env=False) as http,
            http.stream("GET", url) as response,
        ):
            if response.status_code != 200:
                raise ValueError(f"HTTP status {response.status_code}")
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > ANSWER_BYTES_MAX:
                    raise ValueError("the answer is too long")
            return bytes(body)
    except httpx.HTTPError as error:
        raise OSError(str(error) or type(error).__name__) from error


class Oidc:
    """The tokens of one issuer."""

    def __init__(
        self,
        settings: OidcSettings,
        *,
        fetch: Fetch = fetch_over_http,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._fetch = fetch
        self._clock = clock
        self._keys: dict[str, Any] = {}
        self._looked_s: float | None = None
        self._looking = asyncio.Lock()

    async def start(self) -> None:
        """Read a file of keys. An issuer may be away just now: nobody waits for it here.

        Raises:
            FailedPreconditionError: KEYS_UNREADABLE.
        """
        if not _is_url(self._source()):
            await self._look()
            if not self._keys:
                raise FailedPreconditionError("KEYS_UNREADABLE", f"{self._source()}: see the log")

    async def keep(self) -> None:
        """Look for new keys now and then, until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(REFRESH_S if self._keys else RETRY_S)

    async def recognise(self, token: str) -> Identity | None:
        """Whose it is; None: it is no JWT.

        Raises:
            UnauthenticatedError: UNAUTHENTICATED: it is one, and not good.
            UnavailableError: ISSUER_UNREACHABLE: none of the issuer's keys is known yet.
        """
        import jwt

        if token.count(".") != 2:
            return None
        try:
            header = jwt.get_unverified_header(token)
            key = await self._key(header)
            claims = jwt.decode(
                token,
                key,
                algorithms=[header["alg"]],
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                leeway=LEEWAY_S,
                options={"require": _REQUIRED, "verify_signature": True, "strict_aud": False},
            )
        except GodwitError:
            raise
        except jwt.ExpiredSignatureError:
            raise unauthenticated("the token has expired", _HINT) from None
        except jwt.ImmatureSignatureError:
            raise unauthenticated("the token is not good yet", _HINT) from None
        except jwt.PyJWTError as error:
            # Its messages name claims and their kind, never the token.
            raise unauthenticated(f"the token is not good: {error}", _HINT) from None
        except (ValueError, TypeError, RecursionError, KeyError):
            raise unauthenticated("the token is no JWT", _HINT) from None
        return self._identity(claims)

    async def _key(self, header: Mapping[str, Any]) -> Any:
        algorithm, key_id = header.get("alg"), header.get("kid", "")
        if algorithm not in ALGORITHMS:
            raise unauthenticated(
                "the token's algorithm is not taken", f"one of {', '.join(ALGORITHMS)} is"
            )
        if not isinstance(key_id, str):
            raise unauthenticated("the token's key id is no text", _HINT)
        if key_id not in self._keys:
            await self._look()
        key = self._keys.get(key_id)
        if key is None and not self._keys:
            raise UnavailableError(
                "ISSUER_UNREACHABLE",
                f"no key of {self._settings.issuer} is known yet",
                hint="see the orchestrator's log; other ways to sign in work",
            )
        if key is None or not _fits(key, algorithm):
            raise _unknown_key()
        return key.key

    def _source(self) -> str:
        settings = self._settings
        return settings.jwks or f"{settings.issuer.rstrip('/')}/.well-known/openid-configuration"

    async def _look(self) -> None:
        """Read the keys, at most once in RETRY_S; what is known stays where it fails."""
        async with self._looking:
            now_s = self._clock()
            if self._looked_s is not None and now_s - self._looked_s < RETRY_S:
                return
            self._looked_s = now_s
            try:
                async with asyncio.timeout(2 * FETCH_S):
                    keys = parse_keys(await self._read())
            except (OSError, ValueError, TimeoutError, RecursionError) as error:
                log.warning(
                    "keys of %s cannot be read, %d known ones count: %s",
                    self._settings.issuer,
                    len(self._keys),
                    str(error) or type(error).__name__,
                )
            else:
                if keys.keys() != self._keys.keys():
                    log.info("keys of %s: %s", self._settings.issuer, ", ".join(keys) or "none")
                self._keys = keys

    async def _read(self) -> bytes:
        source = self._source()
        if not _is_url(source):
            return await asyncio.to_thread(Path(source).read_bytes)
        answer = await self._fetch(require_safe(source))
        if self._settings.jwks:
            return answer
        discovered = json.loads(answer)
        if not isinstance(discovered, dict) or discovered.get("issuer") != self._settings.issuer:
            raise ValueError("the discovery document is another issuer's")
        return await self._fetch(require_safe(str(discovered.get("jwks_uri", ""))))

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        name = claims.get(self._settings.name_claim)
        if not isinstance(name, str) or not 0 < len(name) <= NAME_LEN_MAX or not name.isprintable():
            raise unauthenticated("the token does not say whose it is", _HINT)
        return Identity(name=name, caller=self._caller(claims), how=How.OIDC)

    def _caller(self, claims: Mapping[str, Any]) -> Caller | None:
        said: Any = claims
        for part in self._settings.role_claim.split("."):
            said = said.get(part) if isinstance(said, Mapping) else None
        words = said if isinstance(said, list) else [said]
        known = self._settings.roles or _WORDS
        callers = [known[word] for word in words if isinstance(word, str) and word in known]
        return max(callers, key=list(Caller).index, default=None)


def _unknown_key() -> UnauthenticatedError:
    return unauthenticated("the token's key is none of its issuer's", _HINT)


def _fits(key: Any, algorithm: str) -> bool:
    """The algorithm is one for this kind of key, and the key's own if it names one."""
    named = key.key_id is not None and key._jwk_data.get("alg")  # noqa: SLF001 - has no accessor
    if named and named != algorithm:
        return False
    kinds = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
    return bool(key.key_type == kinds[algorithm[:2]])


def parse_keys(data: bytes) -> dict[str, Any]:
    """The signing keys of a JWKS, by key id ("" for one without). What is unknown is left out.

    Raises:
        ValueError: it is none.
    """
    import jwt

    decoded = json.loads(data)
    listed = decoded.get("keys") if isinstance(decoded, dict) else None
    if not isinstance(listed, list):
        raise ValueError("there is no list of keys")
    keys = {}
    for each in listed[:KEY_COUNT_MAX]:
        if not isinstance(each, dict) or each.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK.from_dict(each)
        except (jwt.PyJWTError, ValueError, TypeError, KeyError):
            continue  # of a kind that is newer than we are
        key_id = each.get("kid", "")
        if key.key_type in ("RSA", "EC", "OKP") and isinstance(key_id, str):
            keys[key_id] = key
    if not keys:
        raise ValueError("there is no key in it that signs")
    return keys


def _is_url(source: str) -> bool:
    return source.startswith(("https://", "http://"))


def require_safe(url: str) -> str:
    """The URL, if nobody on the way can put keys of his own there.

    Raises:
        ValueError: it is plain text, and not this machine.
    """
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return url
    if parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost"):
        return url
    raise ValueError(f"{url!r} is not https")
