# SPDX-License-Identifier: Apache-2.0
"""How a Godwit process starts, learns that it should stop, and says how it ended.

SIGTERM and SIGINT mean "drain": they set an event and nothing else. What draining takes is the
business of the process, because a guest may depend on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from enum import IntEnum
from typing import Any

from services.common import telemetry
from services.common.errors import GodwitError
from services.common.privileges import capabilities

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ExitStatus(IntEnum):
    """What a process tells its supervisor. 1 is left to uncaught exceptions."""

    OK = 0
    """Stopped as asked; nothing depends on this process any more."""
    BUG = 1
    BAD_CONFIG = 2
    """It never served: starting it again with the same arguments does not help."""
    GUESTS_DEPEND = 3
    """The drain deadline passed while guests still needed this process; each is logged."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set, for the length of the block. Needs a running loop."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)


@contextlib.asynccontextmanager
async def background(
    tasks: Mapping[str, Callable[[], Coroutine[Any, Any, None]]],
) -> AsyncIterator[None]:
    """Run `tasks` (by name) for the length of the block, then cancel them.

    One that fails ends the block with its exception: a process that looks healthy and does half
    its work is worse than one that restarts.
    """
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(task(), name=name) for name, task in tasks.items()]
        try:
            yield
        finally:
            for task in running:
                task.cancel()


def spare_collector() -> None:
    """Keep the collector from looking through everything that was imported, again and again.

    A full collection of a started process takes some ten milliseconds here, and it comes when
    objects are made: in the middle of a pause, say. What is there now stays until the end.
    """
    gc.collect()
    gc.freeze()
    gc.enable()  # off since the first line of a process that is in a hurry


def run(service: str, main: Callable[[], Coroutine[Any, Any, ExitStatus]]) -> ExitStatus:
    """Run `main` as the process `service`, with telemetry.

    A GodwitError that leaves `main` is an operator's business: one line on stderr says what is
    wrong and what to do, and the status is BAD_CONFIG. Anything else is a bug and is raised.
    """
    with telemetry.configured(service):
        capabilities.log_held()
        try:
            return asyncio.run(main())
        except GodwitError as error:
            print(f"{service}: {error}", file=sys.stderr)  # noqa: T201 - also where logs go elsewhere
            return ExitStatus.BAD_CONFIG
