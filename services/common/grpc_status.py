# SPDX-License-Identifier: Apache-2.0
"""GodwitError ↔ google.rpc.Status, the form in which an error crosses a connection.

ErrorInfo carries reason, domain and metadata, with the hint under the key "hint"; RetryInfo is
there if trying again may help. Trailers of a gRPC message are limited to 8 KiB by default, so what
is too long is cut: an error that is dropped for its length says less than a shortened one.
Source: https://google.aip.dev/193.
"""

from __future__ import annotations

import contextlib

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from services.common.errors import (
    ERROR_DOMAIN,
    AlreadyExistsError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    GodwitError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)

DETAILS_KEY = "grpc-status-details-bin"
HINT_KEY = "hint"
RETRY_DELAY_S = 1
MESSAGE_LEN_MAX = 1500
VALUE_LEN_MAX = 500
METADATA_COUNT_MAX = 8

# Statuses of other people's servers and of gRPC itself are folded into the nearest of ours.
_CLASS_OF: dict[grpc.StatusCode, type[GodwitError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.UNIMPLEMENTED: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.ABORTED: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
}


def _cut(text: str, len_max: int) -> str:
    return text if len(text) <= len_max else text[: len_max - 1] + "…"


def to_status(error: GodwitError) -> status_pb2.Status:
    """What `error` is on the wire."""
    number, _name = error.grpc_status.value
    metadata = {
        key: _cut(value, VALUE_LEN_MAX)
        for key, value in list(error.metadata.items())[:METADATA_COUNT_MAX]
    }
    if error.hint:
        metadata[HINT_KEY] = _cut(error.hint, VALUE_LEN_MAX)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata)
    status = status_pb2.Status(code=number, message=_cut(error.message, MESSAGE_LEN_MAX))
    status.details.add().Pack(info)
    if error.retryable:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromSeconds(RETRY_DELAY_S)
        status.details.add().Pack(retry)
    return status


def _error_info(details: list[Any]) -> error_details_pb2.ErrorInfo | None:
    for detail in details:
        info = error_details_pb2.ErrorInfo()
        with contextlib.suppress(DecodeError):
            if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                return info
    return None


def from_status(code: grpc.StatusCode, message: str, details_bin: bytes | None) -> GodwitError:
    """The error that a peer's status stands for.

    A status without our ErrorInfo was not written by a Godwit service, but by gRPC or something in
    between: its reason is PEER_<STATUS>.
    """
    status = status_pb2.Status()
    if details_bin:
        with contextlib.suppress(DecodeError):  # nonsense of a peer's: it said nothing then
            status.ParseFromString(details_bin)
    cls = _CLASS_OF.get(code, InternalError)
    info = _error_info(list(status.details))
    if info is None:
        if cls is ResourceExhaustedError:
            cls = FailedPreconditionError  # gRPC's own: a message that is too long stays too long
        return cls(f"PEER_{code.name}", message or "no message")
    metadata = dict(info.metadata)
    hint = metadata.pop(HINT_KEY, "")
    return cls(info.reason, status.message or message, hint=hint, metadata=metadata)
