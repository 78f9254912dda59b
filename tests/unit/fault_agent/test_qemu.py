# SPDX-License-Identifier: Apache-2.0
"""Promise: a QEMU that has ended a save but not finalized it is waited for, and not for ever."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, cast

import pytest

from services.fault_agent import processes
from services.fault_agent.drivers import qemu
from services.fault_agent.drivers.api import VmmRefusedError
from services.fault_agent.drivers.qemu import QemuVmm
from services.fault_agent.drivers.qmp import QmpClient, QmpError

NOT_FINALIZED = "Migration is not finalized yet"
LOCKED = 'Failed to get "write" lock'


class Monitor:
    """Refuses `cont` for each of `refusals`; is in `finish-migrate` for the first looks."""

    def __init__(self, *, refusals: Iterable[str] = (), unfinished_looks: int = 0) -> None:
        self._refusals = list(refusals)
        self._unfinished_looks = unfinished_looks
        self._run_state = "postmigrate"
        self.conts = 0

    async def execute(self, command: str, *_: object, **__: object) -> Any:
        if command == "query-migrate":
            return {"status": "completed", "ram": {"total": 0}}
        if command == "query-status":
            if self._unfinished_looks:
                self._unfinished_looks -= 1
                return {"status": "finish-migrate"}
            return {"status": self._run_state}
        assert command == "cont"
        self.conts += 1
        if self._refusals:
            raise QmpError(command, "GenericError", self._refusals.pop(0))
        self._run_state = "running"
        return {}


def vmm_of(monitor: Monitor) -> QemuVmm:
    process = processes.identify(os.getpid())
    assert process is not None
    return QemuVmm(process, cast("QmpClient", monitor))


async def test_a_save_that_is_not_finalized_yet_is_waited_for() -> None:
    monitor = Monitor(refusals=[NOT_FINALIZED] * 3)
    await vmm_of(monitor).resume()
    assert monitor.conts == 4


@pytest.mark.parametrize("before", [0, 1])
async def test_another_refusal_is_final(before: int) -> None:
    monitor = Monitor(refusals=[NOT_FINALIZED] * before + [LOCKED])
    with pytest.raises(VmmRefusedError, match="write"):
        await vmm_of(monitor).resume()
    assert monitor.conts == before + 1


async def test_a_save_that_is_never_finalized_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "FINALIZE_TIMEOUT_S", 0.02)
    with pytest.raises(VmmRefusedError, match=NOT_FINALIZED):
        await vmm_of(Monitor(refusals=[NOT_FINALIZED] * 1000)).resume()
    with pytest.raises(VmmRefusedError, match="finish-migrate"):
        await vmm_of(Monitor(unfinished_looks=1000))._check_saved("completed")


async def test_a_save_is_whole_once_it_is_finalized() -> None:
    await vmm_of(Monitor(unfinished_looks=3))._check_saved("completed")
