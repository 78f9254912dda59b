# SPDX-License-Identifier: Apache-2.0
"""The one error hierarchy of the services.

Each class says which gRPC status and which HTTP status it is, and whether trying again may help. An
instance carries a stable `reason` (SCREAMING_SNAKE_CASE, the ErrorInfo.reason and the last part of
the problem+json type), a message with the values that were wrong, and a hint that says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import grpc

ERROR_DOMAIN = "godwit.io"
"""ErrorInfo.domain of every error, and the host of problem types: https://godwit.io/errors/<reason>."""


class GodwitError(Exception):
    """Anything that a caller may want to tell apart. Raise a subclass."""

    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        hint: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class InvalidArgumentError(GodwitError):
    """The request is malformed, whatever the state of the system."""

    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 422


class UnauthenticatedError(GodwitError):
    """Nobody known asks: there is no credential, or none that is good (now)."""

    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401


class PermissionDeniedError(GodwitError):
    """Who asks is known, and may not."""

    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403


class NotFoundError(GodwitError):
    """What the request names does not exist."""

    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404


class AlreadyExistsError(GodwitError):
    """Something is in the way; `metadata` names it."""

    grpc_status = grpc.StatusCode.ALREADY_EXISTS
    http_status = 409


class FailedPreconditionError(GodwitError):
    """The state of the system forbids it; repeating does not help until the state changes."""

    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409


class AbortedError(GodwitError):
    """It was changed since the caller read it: read it again, and then decide."""

    grpc_status = grpc.StatusCode.ABORTED
    http_status = 412


class ResourceExhaustedError(GodwitError):
    """A limit of docs/limits.md holds; later there may be room."""

    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    retryable = True


class UnavailableError(GodwitError):
    """Somebody who is needed cannot be reached. Says nothing about what he has done."""

    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retryable = True


class DeadlineExceededError(GodwitError):
    """No answer in time. Not evidence that nothing was done (I8)."""

    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504
    retryable = True


class DataLossError(GodwitError):
    """Bytes are gone or are not the ones that were sent."""

    grpc_status = grpc.StatusCode.DATA_LOSS
    http_status = 500


class UnimplementedError(GodwitError):
    """What was asked for is understood, and not there yet."""

    grpc_status = grpc.StatusCode.UNIMPLEMENTED
    http_status = 422


class InternalError(GodwitError):
    """A broken invariant or a bug; says which."""
