# SPDX-License-Identifier: Apache-2.0
"""The bearer token that a client brings."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Generator
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from godwit.errors import GodwitClientError

Token = str | Callable[[], str]
"""A token, or what gives it: a token that is renewed is asked for again with each request."""


class TokenRefusedError(GodwitClientError):
    """There is a token, and it was not sent."""


def token_of_file(path: Path) -> Callable[[], str]:
    """The token that stands in a file at the time, as Kubernetes renews them.

    Raises:
        TokenRefusedError: when asked: there is none in it.
    """

    def read() -> str:
        try:
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise TokenRefusedError(f"{path}: {error}") from error
        if not token:
            raise TokenRefusedError(f"{path}: there is no token in it")
        return token

    return read


class _Bearer(httpx.Auth):
    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {_checked(self._token())}"
        yield request


def _checked(token: str) -> str:
    # Not repeated: error messages end up in logs.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise TokenRefusedError("the token has characters in it that no token has")
    return token


def bearer(token: Token, url: str) -> httpx.Auth | None:
    """How requests to `url` say who asks; None: they do not.

    Raises:
        TokenRefusedError: others could read it on the way: `url` is neither https nor this machine.
    """
    if not token:
        return None
    if not _is_safe(url):
        raise TokenRefusedError(f"a token goes over https only, or to this machine: not to {url}")
    if isinstance(token, str):
        _checked(token)
        return _Bearer(lambda: token)
    return _Bearer(token)


def _is_safe(url: str) -> bool:
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False
