# SPDX-License-Identifier: Apache-2.0
"""How a guest's memory arrives, as WatchProgress tells it: a whole bitmap, then what changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

from godwit.agent.v1 import fault_agent_service_pb2 as pb

from services.common.errors import FailedPreconditionError
from services.common.vm_spec import PAGE_BYTES
from services.fault_agent.drivers.api import VmmState
from services.fault_agent.evidence import counters_message
from services.fault_agent.journal import Role
from services.fault_agent.page_runs import set_runs
from services.fault_agent.vms import Vm
from services.pagecore.api import ArrivalPhase

INTERVAL_MS_DEFAULT = 250
INTERVAL_MS_MIN = 20
LOOK_S = 2.0
"""How often the VMM is asked whether its guest has ended: nobody fetches memory for a dead one."""
RUNS_PER_MESSAGE_MAX = 50_000
"""A run is 12 bytes or so on the wire; gRPC's usual limit of a message is 4 MiB."""
_OVER = (pb.ARRIVAL_PHASE_COMPLETE, pb.ARRIVAL_PHASE_ENDED)
_CHUNK_BYTES = 64 << 10
"""Chunks that are equal are skipped by one comparison, whatever the size of the guest."""

_PHASES = {
    ArrivalPhase.CONNECTING: pb.ARRIVAL_PHASE_ARMED,
    ArrivalPhase.ARMED: pb.ARRIVAL_PHASE_ARMED,
    ArrivalPhase.FETCHING: pb.ARRIVAL_PHASE_FETCHING,
    ArrivalPhase.LINK_LOST: pb.ARRIVAL_PHASE_LINK_LOST,
    # Told as COMPLETE only when that is durable.
    ArrivalPhase.COMPLETE: pb.ARRIVAL_PHASE_FETCHING,
    ArrivalPhase.ENDED: pb.ARRIVAL_PHASE_ENDED,
    # The guest waits, as on a lost link; `reason` and `violation_count` say why.
    ArrivalPhase.REFUSED: pb.ARRIVAL_PHASE_LINK_LOST,
    ArrivalPhase.VIOLATION: pb.ARRIVAL_PHASE_LINK_LOST,
    ArrivalPhase.NO_MEMORY: pb.ARRIVAL_PHASE_NO_MEMORY,
}


def changed_runs(before: bytes, after: bytes) -> Iterator[tuple[int, int]]:
    """Runs of bits set in `before` and clear in `after`. A page never becomes absent again.

    Two runs that meet at a chunk's edge are told as two.
    """
    for start in range(0, len(after), _CHUNK_BYTES):
        old, new = before[start : start + _CHUNK_BYTES], after[start : start + _CHUNK_BYTES]
        if old != new:
            gone = int.from_bytes(old, "little") & ~int.from_bytes(new, "little")
            yield from set_runs(gone.to_bytes(len(new), "little"), start * 8)


@dataclass(slots=True)
class Deltas:
    """Turns snapshots of one bitmap into deltas of bounded size."""

    page_count: int
    _seen: bytes | None = None
    _absent: list[tuple[int, int]] = field(default_factory=list)
    _resident: list[tuple[int, int]] = field(default_factory=list)

    def look(self, bitmap: bytes) -> None:
        """Take in a snapshot."""
        if self._seen is None:
            for start in range(0, len(bitmap), _CHUNK_BYTES):
                chunk = bitmap[start : start + _CHUNK_BYTES]
                self._absent += set_runs(chunk, start * 8)
        else:
            self._resident += changed_runs(self._seen, bitmap)
        self._seen = bitmap

    @property
    def pending(self) -> bool:
        """Something is still to be told."""
        return bool(self._absent or self._resident)

    def next(self, *, whole: bool) -> pb.BitmapDelta:
        """The next message's share. A page's absence is told before its coming."""
        absent, self._absent = _split(self._absent, RUNS_PER_MESSAGE_MAX)
        resident: list[tuple[int, int]] = []
        if not self._absent:
            room = RUNS_PER_MESSAGE_MAX - len(absent)
            resident, self._resident = _split(self._resident, room)
        return pb.BitmapDelta(
            whole=whole,
            page_count=self.page_count,
            absent_runs=[pb.PageRun(first_page=f, page_count=n) for f, n in absent],
            resident_runs=[pb.PageRun(first_page=f, page_count=n) for f, n in resident],
        )


def _split(
    runs: list[tuple[int, int]], count: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return runs[:count], runs[count:]


async def watch_progress(
    vm: Vm, epoch: int, interval_ms: int
) -> AsyncGenerator[pb.WatchProgressResponse, None]:
    """The answers of one WatchProgress call; ends after COMPLETE or ENDED.

    Raises:
        FailedPreconditionError: STALE_EPOCH; WRONG_STATE: nothing arrives or arrived here.
    """
    vm.require_known()
    if epoch != vm.record.epoch_prepared:
        raise FailedPreconditionError(
            "STALE_EPOCH",
            f"the arrival of {vm.vm_id} has epoch {vm.record.epoch_prepared}, not {epoch}",
        )
    interval_s = max(interval_ms or INTERVAL_MS_DEFAULT, INTERVAL_MS_MIN) / 1000
    deltas, sequence = Deltas(page_count=vm.spec.memory_bytes // PAGE_BYTES), 0
    look_at = time.monotonic() + LOOK_S
    while True:
        began = time.monotonic()
        # The phase first: a bitmap that is looked at after COMPLETE was durable is all clear.
        phase, reason = _phase(vm, epoch)
        if began >= look_at and vm.record.role is Role.ARRIVED:
            look_at = began + LOOK_S
            if phase not in _OVER and await vm.look() is VmmState.GUEST_ENDED:
                phase, reason = pb.ARRIVAL_PHASE_ENDED, "the guest has shut itself down"
        _take_bitmap(vm, deltas)
        while True:
            sequence += 1
            counters = vm.counters
            delta = deltas.next(whole=sequence == 1)
            yield pb.WatchProgressResponse(
                sequence=sequence,
                # The last phase ends the stream: only once everything was told.
                phase=pb.ARRIVAL_PHASE_FETCHING if deltas.pending else phase,
                counters=counters_message(counters) if counters else None,
                bitmap_delta=delta,
                reason=reason,
                frozen=vm.frozen_in is not None,
            )
            if not deltas.pending:
                break
        if phase in _OVER:
            return
        await _wait(vm, interval_s - (time.monotonic() - began))


def _phase(vm: Vm, epoch: int) -> tuple[pb.ArrivalPhase.ValueType, str]:
    record, watch = vm.record, vm.watch
    if record.epoch_memory_complete == epoch:
        return pb.ARRIVAL_PHASE_COMPLETE, ""
    if record.role not in (Role.ARRIVING, Role.ARRIVED):
        return pb.ARRIVAL_PHASE_ENDED, f"the VM is {record.role.value}"
    if watch is None or watch.closed:
        return pb.ARRIVAL_PHASE_LINK_LOST, "the agent has not taken up the arrival yet"
    status = watch.refresh()
    reason = status.reason
    if status.phase is ArrivalPhase.VIOLATION:
        reason = f"VIOLATION: {reason}"
    elif status.phase is ArrivalPhase.REFUSED:
        reason = f"REFUSED: {reason}"
    elif status.phase is ArrivalPhase.ENDED:
        reason = reason or "the VMM is gone"
    elif status.phase not in (ArrivalPhase.LINK_LOST, ArrivalPhase.NO_MEMORY):
        reason = ""
    return _PHASES[status.phase], reason


def _take_bitmap(vm: Vm, deltas: Deltas) -> None:
    watch = vm.watch
    if watch is not None and not watch.closed:
        deltas.look(watch.arrival.bitmap())
    elif vm.record.epoch_memory_complete == vm.record.epoch_prepared:
        deltas.look(bytes((deltas.page_count + 7) // 8))


async def _wait(vm: Vm, timeout_s: float) -> None:
    if vm.watch is not None and not vm.watch.closed:
        await vm.watch.wait_change(max(timeout_s, INTERVAL_MS_MIN / 1000))
    else:
        await asyncio.sleep(max(timeout_s, INTERVAL_MS_MIN / 1000))
