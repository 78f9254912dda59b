# SPDX-License-Identifier: Apache-2.0
"""A clock that only moves when everybody waits, and processes that die in the middle of anything.

Everything runs in one thread of one process. A simulated process is a set of tasks that know by a
context variable whose they are. What lasts longer than a process (a write to a disk, a message, a
command to a VMM) is an *effect*: `SimProcess.effect` is called before and after each one and is
where a death can strike. Once dead, a process has no effects any more: each attempt raises Killed,
so that no `finally` and no `except` of the code under test can do what kill -9 would have
prevented.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

CURRENT: contextvars.ContextVar[SimProcess | None] = contextvars.ContextVar("CURRENT", default=None)


class Killed(BaseException):
    """The process is dead."""


class HungError(Exception):
    """Everybody waits for ever."""


class _Selector(selectors.BaseSelector):
    """Waits by moving the clock."""

    def __init__(self) -> None:
        self.loop: VirtualLoop | None = None

    def select(self, timeout: float | None = None) -> list[Any]:
        assert self.loop is not None
        if timeout is None:
            raise HungError("no task can go on and no timer is set")
        self.loop.now += max(timeout, 0.0)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        raise NotImplementedError

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        raise NotImplementedError

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a fake clock; threads are calls, descriptors are numbers."""

    def __init__(self, chance: random.Random) -> None:
        self.now = 0.0
        selector = _Selector()
        super().__init__(selector)
        selector.loop = self
        self._clock_resolution = 1e-6
        self.chance = chance
        self.readers: dict[int, Callable[[], None]] = {}
        self.set_task_factory(_make_task)  # type: ignore[arg-type]
        self.set_exception_handler(lambda _loop, _context: None)

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        """As time.monotonic."""
        return self.now

    def _make_self_pipe(self) -> None:
        pass

    def _close_self_pipe(self) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def run_in_executor(  # type: ignore[override]
        self, _executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        """Run it now; the caller hears of it later, if he lives."""
        process = CURRENT.get()
        if process:
            process.effect()
        done = self.create_future()
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001 - handed on
            done.set_exception(error)
            done.exception()
        else:
            # Most disks are quick, and some writes are not.
            delay_s = 0.0005 if self.chance.random() < 0.9 else self.chance.uniform(0, 0.05)
            self.call_later(delay_s, _answer, done, result)
        if process:
            process.effect()
        return done

    def add_reader(  # type: ignore[override]
        self, fd: Any, callback: Any, *args: Any
    ) -> None:
        self.readers[fd] = lambda: callback(*args)

    def remove_reader(self, fd: Any) -> bool:
        return self.readers.pop(fd, None) is not None

    def readable(self, fd: int) -> None:
        """Call whoever watches this descriptor."""
        if fd in self.readers:
            self.call_soon(self._notify, fd)

    def _notify(self, fd: int) -> None:
        if callback := self.readers.get(fd):
            callback()


def _make_task(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    context = options.get("context") or contextvars.copy_context()
    options["context"] = context
    task = asyncio.Task(work, loop=loop, **options)
    process = context.get(CURRENT)
    if process:
        process.tasks[task] = None
        task.add_done_callback(lambda done: process.tasks.pop(done, None))
    return task


def _answer(done: asyncio.Future[Any], result: Any) -> None:
    if not done.done():
        done.set_result(result)


class SimProcess:
    """A process, until it dies. Its successor is another one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.tasks: dict[asyncio.Task[Any], None] = {}
        """In the order of their making: equal examples must play alike."""
        self.die_in: int | None = None
        """Effects until it is killed; None: it is not."""
        self.on_death: Callable[[], None] = lambda: None

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something as this process."""
        context = contextvars.copy_context()
        context.run(CURRENT.set, self)
        return asyncio.get_running_loop().create_task(work, context=context)

    def effect(self) -> None:
        """About to do something, or just done, that outlives the process.

        Raises:
            Killed: it is dead, perhaps since now.
        """
        if self.die_in is not None:
            self.die_in -= 1
            if self.die_in < 0:
                self.die()
        if not self.alive:
            raise Killed

    def die(self) -> None:
        """Kill -9."""
        if not self.alive:
            return
        self.alive, self.die_in = False, None
        self.on_death()
        loop = asyncio.get_running_loop()
        for task in tuple(self.tasks):
            loop.call_soon(task.cancel)


def effect() -> None:
    """Of whichever process runs now."""
    if process := CURRENT.get():
        process.effect()
