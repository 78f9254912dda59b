# SPDX-License-Identifier: Apache-2.0
"""Errors as RFC 9457 problems: `type` is stable, https://godwit.io/errors/<reason-in-kebab-case>."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from services.common.errors import (
    ERROR_DOMAIN,
    GodwitError,
    InvalidArgumentError,
    UnauthenticatedError,
)

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = "1"


class Problem(BaseModel):
    """What went wrong."""

    type: str = Field(description="https://godwit.io/errors/<reason-in-kebab-case>")
    title: str = Field(description="The HTTP status in words")
    status: int
    detail: str = Field(description="What was wrong, with the values")
    reason: str = Field(description="Stable code, SCREAMING_SNAKE_CASE; gRPC's ErrorInfo.reason")
    hint: str = Field(description="What to do about it; may be empty")
    metadata: dict[str, str] = Field(description="Names, e.g. migration_id of what is in the way")


class MalformedRequestError(InvalidArgumentError):
    """Not even JSON, or not the JSON of this call's shape."""

    http_status = 400


def problem(
    *,
    status: int,
    reason: str,
    detail: str,
    hint: str = "",
    metadata: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """The answer that says so."""
    body = Problem(
        type=f"https://{ERROR_DOMAIN}/errors/{reason.lower().replace('_', '-')}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        reason=reason,
        hint=hint,
        metadata=metadata or {},
    )
    return JSONResponse(
        body.model_dump(), status_code=status, media_type=MEDIA_TYPE, headers=headers
    )


OUTCOME = "godwit.outcome"
"""Key of the scope under which a request's Outcome is, where somebody wants to know it."""


@dataclass(slots=True)
class Outcome:
    """Why a request was refused, for whoever stands around the application."""

    reason: str = ""


def _note(request: Request, reason: str) -> None:
    outcome = request.scope.get(OUTCOME)
    if isinstance(outcome, Outcome):
        outcome.reason = reason


def of(error: GodwitError) -> JSONResponse:
    """The answer to what raises `error`."""
    headers = {"Retry-After": RETRY_AFTER_S} if error.retryable else {}
    if isinstance(error, UnauthenticatedError):
        headers["WWW-Authenticate"] = f'Bearer realm="{ERROR_DOMAIN}"'
    return problem(
        status=error.http_status,
        reason=error.reason,
        detail=error.message,
        hint=error.hint,
        metadata=error.metadata,
        headers=headers,
    )


async def _godwit_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GodwitError)
    _note(request, error.reason)
    return of(error)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    malformed = any(item["type"] == "json_invalid" for item in error.errors())
    _note(request, "BODY_MALFORMED" if malformed else "FIELD_INVALID")
    if malformed:
        return problem(
            status=400,
            reason="BODY_MALFORMED",
            detail="the body is not JSON",
            hint="send one JSON object as application/json",
        )
    wrong = {
        ".".join(str(part) for part in item["loc"]): str(item["msg"]) for item in error.errors()
    }
    return problem(
        status=422,
        reason="FIELD_INVALID",
        detail="; ".join(f"{where}: {what}" for where, what in wrong.items()),
        hint="see /openapi.json for every field",
        metadata={"field": next(iter(wrong))},
    )


_BY_STATUS = {
    404: ("ROUTE_UNKNOWN", "see /docs for what there is"),
    405: ("METHOD_NOT_ALLOWED", "the Allow header says which methods there are"),
}


def of_status(status: int, request: str, headers: Mapping[str, str]) -> JSONResponse:
    """The answer where HTTP itself says what is wrong. `request`: method and path, or more."""
    reason, hint = _BY_STATUS.get(status, (HTTPStatus(status).name, ""))
    return problem(
        status=status,
        reason=reason,
        detail=f"{request}: {HTTPStatus(status).phrase}",
        hint=hint,
        headers=dict(headers),
    )


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    answer = of_status(
        error.status_code, f"{request.method} {request.url.path}", error.headers or {}
    )
    _note(request, HTTPStatus(error.status_code).name)
    return answer


async def _bug(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return problem(
        status=500,
        reason="BUG",
        detail=f"{type(error).__name__}: {error}",
        hint="the orchestrator's log has the stack; report it",
    )


def install(app: FastAPI) -> None:
    """Answer every failure of `app` as a problem."""
    app.add_exception_handler(GodwitError, _godwit_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)


RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "A problem (RFC 9457)",
        "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
    }
}
"""Documents every failure of a route in the OpenAPI."""
