# SPDX-License-Identifier: Apache-2.0
"""Freezes the VMM of a guest that is held for too long, and thaws it when pages come again.

Of an SMP guest that touches absent pages while none can be had, one vCPU after the other stands
still, and those that run see the others stuck: locks that are never released, watchdogs. With
`freeze_after_ms` all of them stand still together once the guest has been held that long
(docs/recovery.md: what held means, what the guest's clock sees).

Order: the faults that were outstanding are served first, then the VMM is thawed. A frozen VMM's
faults stay in the engine's table: to freeze a thread takes it off the userfaultfd, not its page off
our list.

Who thaws: this task, as soon as the outage is over or nothing is left to wait for; `ArrivalEngines.
stop`, before an arrival's end; `recover`, the next agent's first act, before it takes the faults
again: a VMM that brings its faults itself must run to do so. The guest is then held by its absent
pages, as it was before it was frozen, and may be frozen again.
"""

from __future__ import annotations

import asyncio
import logging

from services.fault_agent.arrival_watch import ArrivalWatch
from services.fault_agent.drivers.api import VmmState
from services.fault_agent.freezer import Freezer
from services.fault_agent.journal import Role
from services.fault_agent.vms import Vm
from services.pagecore.api import ArrivalPhase, ArrivalStatus, HoldCause

log = logging.getLogger(__name__)

POLL_S = 0.02
"""While frozen: every poll is a delay of the thaw."""
IDLE_S = 1.0
SERVED_S_MAX = 1.0
"""How long a thaw waits, after the outage, for faults that were outstanding."""

_NOTHING_TO_WAIT_FOR = frozenset(
    {ArrivalPhase.COMPLETE, ArrivalPhase.ENDED, ArrivalPhase.VIOLATION}
)


def may_freeze(status: ArrivalStatus, freeze_after_ms: int) -> bool:
    """True once the guest has been held long enough, by an outage that lasts."""
    return (
        status.phase not in _NOTHING_TO_WAIT_FOR
        and status.hold_now.cause is not HoldCause.NONE
        and status.hold_now.held_ns >= freeze_after_ms * 1_000_000
        and status.held_fault_count > 0
    )


def must_thaw(status: ArrivalStatus, over_for_s: float) -> bool:
    """`over_for_s`: how long the outage has been over."""
    if status.phase in _NOTHING_TO_WAIT_FOR:
        return True
    if status.hold_now.cause is not HoldCause.NONE:
        return False
    return status.held_fault_count == 0 or over_for_s >= SERVED_S_MAX


def freeze(freezer: Freezer, vm: Vm, state: VmmState) -> None:
    """Freeze a VMM that was last seen in `state`.

    Raises:
        OSError: it runs on.
    """
    process = vm.record.process
    if process is None or vm.frozen_in is not None:
        return
    # Before the act: a look that comes between must not wait for an answer.
    vm.frozen_in = state
    try:
        how = freezer.freeze(process)
    except OSError:
        vm.frozen_in = None
        raise
    if how is None:
        vm.frozen_in = None
    else:
        log.warning("%s is frozen (%s): it waits for pages for too long", vm.vm_id, how)


def thaw(freezer: Freezer, vm: Vm) -> None:
    """Thaw a VMM that this process or a former one froze. Idempotent.

    Raises:
        OSError: it stands still: call again.
    """
    process, arriving = vm.record.process, vm.record.arriving
    # Only where it may be ours: a VMM that a person has stopped stays so.
    ours = arriving is not None and arriving.freeze_after_ms > 0
    if process is not None and vm.same_boot and ours and freezer.is_frozen(process):
        freezer.thaw(process)
        log.warning("%s is thawed", vm.vm_id)
    vm.frozen_in = None


async def keep(freezer: Freezer, vm: Vm, watch: ArrivalWatch, freeze_after_ms: int) -> None:
    """Apply the policy to one arrival, until its engine is closed."""
    loop = asyncio.get_running_loop()
    over_since: float | None = None
    while not watch.closed:
        status, timeout_s = watch.refresh(), IDLE_S
        try:
            if vm.frozen_in is not None:
                timeout_s = POLL_S
                if status.hold_now.cause is HoldCause.NONE:
                    over_since = over_since or loop.time()
                else:
                    over_since = None
                if must_thaw(status, loop.time() - over_since if over_since else 0.0):
                    async with vm.lock:
                        thaw(freezer, vm)
                    over_since = None
            elif _arrived(vm) and may_freeze(status, freeze_after_ms):
                state = await vm.look()
                async with vm.lock:
                    # It was ordered nothing meanwhile, and pages have not come meanwhile.
                    if _arrived(vm) and may_freeze(watch.refresh(), freeze_after_ms):
                        freeze(freezer, vm, _going_on(state))
                timeout_s = POLL_S
            elif status.hold_now.cause is not HoldCause.NONE:
                left_ns = freeze_after_ms * 1_000_000 - status.hold_now.held_ns
                timeout_s = min(max(left_ns / 1e9, POLL_S), POLL_S * 5)
        except OSError as error:
            log.error("%s: %s: tried again", vm.vm_id, error)
            timeout_s = IDLE_S
        await watch.wait_change(timeout_s)


def _arrived(vm: Vm) -> bool:
    """The guest runs here, and its memory is not all here."""
    return vm.record.role is Role.ARRIVED


def _going_on(state: VmmState) -> VmmState:
    """What a VMM is said to do while it is frozen. One that waits for a page may not answer."""
    return VmmState.RUNNING if state is VmmState.UNRESPONSIVE else state
