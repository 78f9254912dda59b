# SPDX-License-Identifier: Apache-2.0
"""Where the API server calls us: HTTPS, with the certificate that its registration trusts."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI

from services.common.errors import UnavailableError
from services.common.lifecycle import background
from services.orchestrator.http_server import serving_http
from services.orchestrator.kubernetes.settings import Settings

RELOAD_S = 60.0


@contextlib.asynccontextmanager
async def serving_webhook(settings: Settings, app: FastAPI) -> AsyncIterator[None]:
    """Serve for the length of the block, if it is wanted. Its certificate may be rotated meanwhile.

    Raises:
        UnavailableError: LISTEN_FAILED, WEBHOOK_CERTIFICATE.
    """
    if settings.webhook is None or settings.webhook_tls_dir is None:
        yield
        return
    directory = settings.webhook_tls_dir
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, directory)

    async def follow() -> None:
        while True:
            await asyncio.sleep(RELOAD_S)
            with contextlib.suppress(UnavailableError):
                _load(context, directory)

    async with (
        serving_http(app, settings.webhook, context),
        background({"webhook certificate": follow}),
    ):
        yield


def _load(context: ssl.SSLContext, directory: Path) -> None:
    try:
        context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    except (OSError, ssl.SSLError) as error:
        raise UnavailableError(
            "WEBHOOK_CERTIFICATE",
            f"{directory} has no certificate for the webhook: {error}",
            hint="mount the Secret that the webhook's registration trusts",
        ) from error
