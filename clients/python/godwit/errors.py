# SPDX-License-Identifier: Apache-2.0
"""What a call can end in instead of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class GodwitClientError(Exception):
    """Either of the two below."""


class GodwitApiError(GodwitClientError):
    """The orchestrator answered with a problem (RFC 9457).

    Attributes:
        status: HTTP status.
        reason: stable and SCREAMING_SNAKE_CASE, e.g. "VM_UNKNOWN"; compare with this one.
        detail: what is wrong, in words, with the values that were wrong.
        hint: what to do about it; may be empty.
        metadata: what the error names, e.g. {"migration_id": "01K..."}.
    """

    def __init__(
        self,
        *,
        status: int,
        reason: str,
        detail: str,
        hint: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{reason}: {detail}" + (f" ({hint})" if hint else ""))
        self.status = status
        self.reason = reason
        self.detail = detail
        self.hint = hint
        self.metadata = dict(metadata or {})

    @classmethod
    def from_problem(cls, status: int, problem: Any, text: str = "") -> GodwitApiError:
        """Read a problem+json body, whatever of it is there.

        Args:
            status: of the response.
            problem: the decoded body; anything but an object is nobody's problem document.
            text: the body as it came, told where it is not one (a proxy's page).
        """
        if not isinstance(problem, Mapping):
            return cls(status=status, reason="NOT_A_PROBLEM", detail=text[:500] or "empty answer")
        kind = str(problem.get("type") or "").rstrip("/").rsplit("/", 1)[-1]
        reason = str(problem.get("reason") or kind).replace("-", "_").upper()
        metadata = problem.get("metadata")
        return cls(
            status=status,
            reason=reason or "UNKNOWN",
            detail=str(problem.get("detail") or problem.get("title") or f"HTTP status {status}"),
            hint=str(problem.get("hint") or ""),
            metadata={str(key): str(value) for key, value in metadata.items()}
            if isinstance(metadata, Mapping)
            else None,
        )


class GodwitConnectionError(GodwitClientError):
    """The orchestrator cannot be reached. Says nothing about what it has done.

    Attributes:
        url: of the orchestrator.
    """

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"no answer from {url}: {why}")
        self.url = url
