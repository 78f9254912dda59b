# SPDX-License-Identifier: Apache-2.0
"""Handlers of gRPC calls, wrapped whatever their shape: what server interceptors share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


def wrapped(
    handler: Handler, *, streaming: Callable[[Any], Any], unary: Callable[[Any], Any]
) -> Handler:
    """The handler of the same shape whose behaviour is what one of the two makes of it.

    Args:
        handler: of any of the four shapes of call.
        streaming: makes it where responses stream.
        unary: makes it where there is one response.
    """
    make: Callable[..., Handler]
    if handler.response_streaming:
        behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        made = streaming(behavior)
    else:
        behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary
        make = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        made = unary(behavior)
    return make(
        made,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
