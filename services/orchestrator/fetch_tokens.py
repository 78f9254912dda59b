# SPDX-License-Identifier: Apache-2.0
"""Signs the tokens by which a destination may read an image. ADR 11.

The key is made when the process starts and is nowhere but in its memory: there is nothing to steal
from a disk, nothing that replicas must share. That works since both halves of a token are given out
by one Prepare: its public key to the source, which keeps it in the image's record, and the token to
the destination. Whoever prepares a migration again gives both again. Source: RFC 8032.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from godwit.page.v1 import page_service_pb2

LIFETIME_S = 3600
"""For the first stream. It is opened within seconds of Prepare, by clocks that may differ."""
PREFIX = b"godwit fetch token v1\0"


class FetchTokens:
    """One orchestrator's key."""

    def __init__(self, now_s: Callable[[], float] = time.time) -> None:
        self._key = Ed25519PrivateKey.generate()
        self._now_s = now_s

    @property
    def public_key(self) -> bytes:
        """For the source. 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def issue(self, *, image_id: str, epoch: int, destination: str) -> bytes:
        """A serialized FetchToken; `destination` is the DNS name of its certificate."""
        claims = page_service_pb2.FetchClaims(
            image_id=image_id,
            epoch=epoch,
            destination=destination,
            expires_unix_s=int(self._now_s()) + LIFETIME_S,
        ).SerializeToString()
        token = page_service_pb2.FetchToken(
            claims=claims, signature=self._key.sign(PREFIX + claims)
        )
        return token.SerializeToString()
