# SPDX-License-Identifier: Apache-2.0
"""JWTs: which are good, what they are worth, and that an issuer that is away takes nothing away."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from services.common.auth.identity import Caller, How
from services.common.auth.oidc import (
    LEEWAY_S,
    RETRY_S,
    Oidc,
    OidcSettings,
    parse_keys,
    require_safe,
)
from services.common.errors import GodwitError, UnauthenticatedError

ISSUER = "https://id.example.org/realm"
AUDIENCE = "godwit"
KEYS_URL = "https://id.example.org/keys"


@functools.cache
def private_key(kind: str) -> Any:
    if kind == "RS256":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    if kind == "ES256":
        return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()


def jwk(kind: str, key_id: str, **more: str) -> dict[str, Any]:
    algorithms = {"RS256": "RSAAlgorithm", "ES256": "ECAlgorithm", "EdDSA": "OKPAlgorithm"}
    algorithm = getattr(jwt.algorithms, algorithms[kind])
    public = private_key(kind).public_key()
    return {**json.loads(algorithm.to_jwk(public)), "kid": key_id, "use": "sig", **more}


def token(kind: str = "ES256", key_id: str = "k1", **claims: Any) -> str:
    now = int(time.time())
    said = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "alice",
        "exp": now + 300,
        "nbf": now - 1,
        "roles": ["operator"],
    } | claims
    said = {name: value for name, value in said.items() if value is not None}
    return jwt.encode(said, private_key(kind), algorithm=kind, headers={"kid": key_id})


class Issuer:
    """Publishes keys; counts who asks; may be away."""

    def __init__(self) -> None:
        self.keys = [jwk("ES256", "k1")]
        self.asked: list[str] = []
        self.is_away = False
        self.now_s = 0.0

    async def fetch(self, url: str) -> bytes:
        self.asked.append(url)
        if self.is_away:
            raise OSError("away")
        if url == f"{ISSUER}/.well-known/openid-configuration":
            return json.dumps({"issuer": ISSUER, "jwks_uri": KEYS_URL}).encode()
        assert url == KEYS_URL
        return json.dumps({"keys": self.keys}).encode()

    def clock(self) -> float:
        return self.now_s

    def oidc(self, **settings: Any) -> Oidc:
        values: dict[str, Any] = {"issuer": ISSUER, "audience": AUDIENCE} | settings
        return Oidc(OidcSettings(**values), fetch=self.fetch, clock=self.clock)


async def test_a_good_token_is_its_owners() -> None:
    issuer = Issuer()
    identity = await issuer.oidc().recognise(token())
    assert identity is not None
    assert (identity.name, identity.caller, identity.how) == ("alice", Caller.OPERATOR, How.OIDC)
    assert issuer.asked == [f"{ISSUER}/.well-known/openid-configuration", KEYS_URL]


@pytest.mark.parametrize("kind", ["RS256", "ES256", "EdDSA"])
async def test_each_kind_of_key(kind: str) -> None:
    issuer = Issuer()
    issuer.keys = [jwk(kind, "k1")]
    assert await issuer.oidc().recognise(token(kind))


def _forged(header: dict[str, Any], claims: dict[str, Any], signature: bytes) -> str:
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def _wrong() -> list[tuple[str, str]]:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "eve", "exp": now + 300, "roles": ["admin"]}
    public_pem = (
        private_key("ES256")
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    import hashlib
    import hmac

    head = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"k1"}').rstrip(b"=").decode()
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    mac = hmac.new(public_pem, f"{head}.{body}".encode(), hashlib.sha256).digest()
    confused = f"{head}.{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    good = token()
    return [
        ("expired", token(exp=now - LEEWAY_S - 60)),
        ("not yet", token(nbf=now + 86_400)),
        ("another audience", token(aud="grafana")),
        ("another issuer", token(iss="https://evil.example.org")),
        ("issuer with a slash", token(iss=ISSUER + "/")),
        ("no expiry", token(exp=None)),
        ("no audience", token(aud=None)),
        ("no subject", token(sub=None)),
        ("subject is empty", token(sub="")),
        ("subject with a newline", token(sub="alice\n")),
        ("unknown key", token(key_id="k2")),
        ("no signature", _forged({"alg": "none", "kid": "k1"}, claims, b"")),
        ("None", _forged({"alg": "None", "kid": "k1"}, claims, b"")),
        ("public key as a secret", confused),
        ("algorithm of another kind", _forged({"alg": "RS256", "kid": "k1"}, claims, b"x" * 256)),
        ("no algorithm", _forged({"kid": "k1"}, claims, b"x")),
        ("key id is a list", _forged({"alg": "ES256", "kid": ["k1"]}, claims, b"x")),
        ("key brought along", _forged({"alg": "ES256", "jwk": jwk("ES256", "k1")}, claims, b"x")),
        ("signature of zeros", _forged({"alg": "ES256", "kid": "k1"}, claims, bytes(64))),
        ("changed", good[:40] + ("A" if good[40] != "A" else "B") + good[41:]),
        ("cut", good[:-4]),
        ("three dots", ".."),
    ]


@pytest.mark.parametrize("case", _wrong(), ids=lambda case: case[0])
async def test_a_wrong_token_is_refused(case: tuple[str, str]) -> None:
    _name, wrong = case
    with pytest.raises(UnauthenticatedError) as refused:
        await Issuer().oidc().recognise(wrong)
    assert refused.value.reason == "UNAUTHENTICATED"
    assert len(wrong) < 5 or wrong not in str(refused.value)


async def test_clocks_may_differ_a_little() -> None:
    now = int(time.time())
    oidc = Issuer().oidc()
    assert await oidc.recognise(token(exp=now - LEEWAY_S + 15))
    assert await oidc.recognise(token(nbf=now + LEEWAY_S - 15))


async def test_what_is_no_jwt_is_anothers() -> None:
    issuer = Issuer()
    assert await issuer.oidc().recognise("gdw_0123456789") is None
    assert not issuer.asked


async def test_keys_are_changed_without_a_restart() -> None:
    issuer = Issuer()
    oidc = issuer.oidc()
    assert await oidc.recognise(token())
    issuer.keys = [jwk("RS256", "k2")]
    issuer.now_s += RETRY_S
    assert await oidc.recognise(token("RS256", "k2"))
    with pytest.raises(UnauthenticatedError):
        await oidc.recognise(token())


async def test_an_issuer_that_is_away_takes_nothing_away() -> None:
    issuer = Issuer()
    oidc = issuer.oidc()
    assert await oidc.recognise(token())
    issuer.is_away = True
    issuer.now_s += 10 * RETRY_S
    with pytest.raises(UnauthenticatedError):
        await oidc.recognise(token(key_id="new"))
    assert await oidc.recognise(token())


async def test_without_any_key_it_says_so_and_looks_again() -> None:
    issuer = Issuer()
    issuer.is_away = True
    oidc = issuer.oidc()
    with pytest.raises(GodwitError) as refused:
        await oidc.recognise(token())
    assert refused.value.reason == "ISSUER_UNREACHABLE"
    issuer.is_away = False
    issuer.now_s += RETRY_S
    assert await oidc.recognise(token())


async def test_made_up_key_ids_are_no_load_on_the_issuer() -> None:
    issuer = Issuer()
    oidc = issuer.oidc()
    for number in range(50):
        with pytest.raises(UnauthenticatedError):
            await oidc.recognise(token(key_id=f"made-up-{number}"))
    assert len(issuer.asked) == 2


async def test_keys_of_a_file_are_read_again(tmp_path: Path) -> None:
    issuer, path = Issuer(), tmp_path / "jwks"
    path.write_text(json.dumps({"keys": [jwk("ES256", "k1")]}))
    oidc = issuer.oidc(jwks=str(path))
    await oidc.start()
    assert await oidc.recognise(token())
    path.write_text(json.dumps({"keys": [jwk("EdDSA", "k2")]}))
    issuer.now_s += RETRY_S
    assert await oidc.recognise(token("EdDSA", "k2"))
    with pytest.raises(GodwitError, match="KEYS_UNREADABLE"):
        await issuer.oidc(jwks=str(tmp_path / "none")).start()


@pytest.mark.parametrize(
    ("settings", "claims", "caller"),
    [
        ({}, {"roles": "admin"}, Caller.ADMIN),
        ({}, {"roles": ["viewer", "admin", "x", 7]}, Caller.ADMIN),
        ({}, {"roles": ["Admin", "orchestrator", "node"]}, None),
        ({}, {"roles": None}, None),
        ({}, {"roles": {"admin": True}}, None),
        ({"role_claim": "realm.roles"}, {"realm": {"roles": ["viewer"]}}, Caller.VIEWER),
        ({"role_claim": "realm.roles"}, {"realm": "admin"}, None),
        ({"roles": {"sre": Caller.ADMIN}}, {"roles": ["sre"]}, Caller.ADMIN),
        ({"roles": {"sre": Caller.ADMIN}}, {"roles": ["admin"]}, None),
    ],
)
async def test_roles(settings: dict[str, Any], claims: dict[str, Any], caller: Caller) -> None:
    identity = await Issuer().oidc(**settings).recognise(token(**claims))
    assert identity is not None
    assert identity.caller is caller


async def test_another_claim_may_be_the_name() -> None:
    oidc = Issuer().oidc(name_claim="email")
    identity = await oidc.recognise(token(email="a@example.org"))
    assert identity is not None
    assert identity.name == "a@example.org"


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://id.example.org/keys", True),
        ("http://127.0.0.1:8/keys", True),
        ("http://[::1]:8/keys", True),
        ("http://id.example.org/keys", False),
        ("http://127.0.0.1.example.org/", False),
        ("http://localhost@example.org/", False),
        ("ftp://127.0.0.1/", False),
        ("https://", False),
        ("", False),
    ],
)
def test_keys_come_where_nobody_can_change_them(url: str, safe: bool) -> None:
    if safe:
        assert require_safe(url) == url
    else:
        with pytest.raises(ValueError, match="not https"):
            require_safe(url)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["keys", "kty", "kid", "use", "crv", "x", "y", "n", "e", "alg"]), inner
        )
    ),
    max_leaves=20,
)


@given(st.binary(max_size=200) | _JSON.map(json.dumps).map(str.encode))
def test_any_key_set_is_keys_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert parse_keys(data)


@given(
    st.text(max_size=100)
    | st.tuples(_JSON, _JSON, st.binary(max_size=64)).map(lambda parts: _forged(*parts))
)
async def test_any_text_is_nobodys_token(text: str) -> None:
    try:
        identity = await Issuer().oidc().recognise(text)
    except UnauthenticatedError:
        return
    assert identity is None
    assert text.count(".") != 2
