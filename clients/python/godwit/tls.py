# SPDX-License-Identifier: Apache-2.0
"""Certificates for calls to an orchestrator that has some of its own authority."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path
from typing import Any

import httpx

from godwit.errors import GodwitClientError

SERVER_NAME = "orchestrator.godwit"
"""In an orchestrator's certificate, at whatever address it is reached."""


class GodwitTlsError(GodwitClientError):
    """The certificates of a directory cannot be used."""


class _Context(ssl.SSLContext):
    """Reads its files for each connection: a watch may outlive a certificate."""

    directory: Path

    def read(self) -> None:
        self.load_verify_locations(self.directory / "ca.crt")
        if (self.directory / "tls.crt").exists():
            self.load_cert_chain(self.directory / "tls.crt", self.directory / "tls.key")

    def _read_again(self) -> None:
        # Half of a change: with what is known the peer may be content.
        with contextlib.suppress(OSError, ValueError):
            self.read()

    def wrap_bio(self, *arguments: Any, **keywords: Any) -> ssl.SSLObject:
        self._read_again()
        return super().wrap_bio(*arguments, **keywords)

    def wrap_socket(self, *arguments: Any, **keywords: Any) -> ssl.SSLSocket:
        self._read_again()
        return super().wrap_socket(*arguments, **keywords)


def make_context(directory: Path) -> ssl.SSLContext:
    """TLS with `ca.crt` of a directory, and with `tls.crt` and `tls.key` where they are there.

    Raises:
        GodwitTlsError: they cannot be read.
    """
    context = _Context(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.directory = directory
    try:
        context.read()
    except (OSError, ValueError) as error:
        raise GodwitTlsError(f"certificates in {directory}: {error}") from error
    return context


def expect_orchestrator(request: httpx.Request) -> None:
    """An event hook: the server's certificate must have that name, whatever the URL says."""
    request.extensions["sni_hostname"] = SERVER_NAME


async def expect_orchestrator_async(request: httpx.Request) -> None:
    """The same for asyncio."""
    expect_orchestrator(request)
