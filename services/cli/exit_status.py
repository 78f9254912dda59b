# SPDX-License-Identifier: Apache-2.0
"""What the command's exit status means; part of its contract with scripts."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit status of `godwit`; a service that it becomes has services.common.lifecycle's."""

    OK = 0
    BUG = 1
    """An error that nobody foresaw, here or in the orchestrator."""
    USAGE = 2
    """The command line, a file that it names or a value in it makes no sense."""
    REFUSED = 3
    """It makes sense, and the state of the system forbids it."""
    NOT_FOUND = 4
    UNREACHABLE = 5
    """The orchestrator, or the node that it needs, does not answer. What it did is not known."""
    MIGRATION_FAILED = 6
    """The migration or operation that was watched did not succeed; of the demo and the simulator:
    the verdict is not ok."""
    INTERRUPTED = 130
    """Ctrl-C. A migration that was watched goes on."""


_USAGE = frozenset({400, 405, 415, 422})
_UNREACHABLE = frozenset({502, 503, 504})
_NOT_FOUND = 404
_SERVER_ERROR = 500


def of_http(status: int) -> ExitStatus:
    """The exit status for a problem that the API answered with."""
    if status == _NOT_FOUND:
        return ExitStatus.NOT_FOUND
    if status in _USAGE:
        return ExitStatus.USAGE
    if status in _UNREACHABLE:
        return ExitStatus.UNREACHABLE
    return ExitStatus.BUG if status >= _SERVER_ERROR else ExitStatus.REFUSED
