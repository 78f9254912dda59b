# SPDX-License-Identifier: Apache-2.0
"""Arms VMs: has their faults come to an engine, and takes both up again after our death."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

from services.common.errors import FailedPreconditionError, GodwitError, UnavailableError
from services.common.listen import Address, parse_address
from services.common.vm_spec import PAGE_BYTES
from services.fault_agent import first_touch, hold_policy, processes
from services.fault_agent.arrival_watch import ArrivalWatch
from services.fault_agent.bandwidth import Bandwidth
from services.fault_agent.collapse import Collapsed, collapse, why_refused
from services.fault_agent.drivers.api import (
    Armed,
    ArmTarget,
    Driver,
    VmmUnreachableError,
    covers,
)
from services.fault_agent.journal import Arriving, Role
from services.fault_agent.node import Node
from services.fault_agent.processes import Process
from services.fault_agent.vms import Vm
from services.pagecore.api import ArrivalConfig, ArrivalPhase, ArrivalStatus

log = logging.getLogger(__name__)

LET_GO_RETRY_S = 1.0
REFUSED_RETRY_S = 1.0
"""A page server that refuses may be one that was restarted and does not know its images yet."""


class ArmError(FailedPreconditionError):
    """The memory of a VMM cannot be put under our control."""

    def __init__(self, step: str, error: OSError | str) -> None:
        detail = error if isinstance(error, str) else error.strerror or str(error)
        super().__init__(
            "ARM_FAILED",
            f"{step}: {detail}",
            hint="QEMU needs CAP_SYS_PTRACE and userfaultfd; preflight says what is missing",
        )


class PageMapNewerError(FailedPreconditionError):
    """A newer agent made the page map. The guest is kept, and held on its absent pages."""

    def __init__(self, path: str) -> None:
        super().__init__(
            "PAGE_MAP_NEWER",
            f"{path} was made by a newer release",
            hint="start the newer agent again: until then the guest waits on what it touches",
        )


class ArrivalEngines:
    """The engines of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._bandwidth = Bandwidth(node.pagecore, node.config.peer_bytes_per_s_max)
        self._armed: dict[str, Armed] = {}
        """By VM, from arming to `stop`."""

    def close(self) -> None:
        """At the end of this process: what the VMMs gave us is let go, the guests stay blocked."""
        while self._armed:
            self._armed.popitem()[1].close()
        self._bandwidth.close()

    def require(self, vm: Vm) -> ArrivalWatch:
        """The engine of an arriving VM.

        Raises:
            UnavailableError: ARRIVAL_NOT_SERVED: nobody would answer its faults.
        """
        if vm.watch is None or vm.watch.closed:
            raise UnavailableError(
                "ARRIVAL_NOT_SERVED", f"the page faults of {vm.vm_id} are not answered yet"
            )
        return vm.watch

    async def arm(self, vm: Vm, epoch: int) -> None:
        """Have the faults of a new VMM come to an engine, its gate closed.

        Raises:
            ArmError: it failed, or memory was there before it.
            HandoffRefusedError: the VMM hands off what it may not.
        """
        driver, process = _shell(vm)
        with _open_ram(vm.record.ram_path) as ram_fd:
            with _step(f"faults of process {process.pid}"):
                armed = await driver.arm(self._node.pagecore, _target(vm, process, ram_fd))
            await self._start(vm, epoch, armed, ram_fd, adopt=False)

    async def take_up(self, vm: Vm) -> None:
        """Go on with an arrival that a former agent began.

        Raises:
            ArmError: the faults or the page map cannot be taken over.
            VmmUnreachableError: the VMM is gone.
        """
        record = vm.record
        driver, process = _shell(vm)
        if not processes.is_alive(process):
            raise VmmUnreachableError(f"{vm.vm_id} has no shell")
        with _open_ram(record.ram_path) as ram_fd:
            with _step(f"faults of process {process.pid} again"):
                armed = await driver.take(self._node.pagecore, _target(vm, process, ram_fd))
            if armed is None:
                await self._was_let_go(vm)
                return
            await self._start(vm, record.epoch_prepared, armed, ram_fd, adopt=True)
        watch = self.require(vm)
        if record.role is Role.ARRIVED and watch.arrival.generation():
            watch.arrival.start_bulk()
        self.check_complete(vm)

    async def _was_let_go(self, vm: Vm) -> None:
        """The VMM needs nobody any more: our predecessor died between hearing and writing it."""
        record = vm.record
        arriving = record.arriving
        assert arriving is not None, "an arriving VM has an arrival"
        if record.epoch_memory_complete != record.epoch_prepared:
            self._node.violations.labels(invariant="I4").inc()
            raise ArmError("hand-off", "the VMM has let go of memory that is not complete")
        await vm.write(replace(record, arriving=replace(arriving, unregistered=True)))

    async def redirect(self, vm: Vm) -> None:
        """Fetch from the page server that the record names from now on."""
        arriving = vm.record.arriving
        if arriving is None or vm.watch is None or vm.watch.closed:
            return
        address = await numeric(arriving.page_address)
        vm.watch.arrival.set_token(bytes.fromhex(arriving.token))
        vm.watch.arrival.set_page_server(address.host, address.port)

    def with_server_key(self, vm: Vm) -> Arriving:
        """The arrival, with the key by which its page server is known now; pinned from here on."""
        arriving = vm.record.arriving
        assert arriving is not None, "an arriving VM has an arrival"
        security = self._node.security
        if security is None or vm.watch is None or vm.watch.closed:
            return arriving
        key = vm.watch.arrival.page_server_key()
        if key:
            security.pin(vm.vm_id, key)
        return replace(arriving, page_server_key=key.hex() or arriving.page_server_key)

    async def _learn_server_key(self, vm: Vm) -> None:
        async with vm.lock:
            if vm.record.arriving is None or not vm.record.epoch_prepared:
                return
            arriving = self.with_server_key(vm)
            if arriving != vm.record.arriving:
                log.info("arrival of %s: its page server has another key", vm.vm_id)
                await vm.write(replace(vm.record, arriving=arriving))

    async def stop(self, vm: Vm) -> None:
        """End the engine. The guest stays blocked on what is absent. Idempotent."""
        if self._node.freezer is not None:
            hold_policy.thaw(self._node.freezer, vm)
        watch, vm.watch = vm.watch, None
        if watch is not None:
            await watch.close()
        if self._node.security is not None:
            self._node.security.unpin(vm.vm_id)
        armed = self._armed.pop(vm.vm_id, None)
        if armed is not None:
            armed.close()

    def check_complete(self, vm: Vm) -> None:
        """If every page is here and the guest has been activated, see to MEMORY_COMPLETE."""
        if (
            vm.watch is not None
            and vm.watch.refresh().phase is ArrivalPhase.COMPLETE
            and vm.record.role is Role.ARRIVED
        ):
            self._node.start_task(self._complete(vm), f"complete {vm.vm_id}")

    async def _start(self, vm: Vm, epoch: int, armed: Armed, ram_fd: int, *, adopt: bool) -> None:
        try:
            arriving = vm.record.arriving
            assert arriving is not None, "an arriving VM has an arrival"
            # Before anybody depends on it: it is the way back after our death.
            arriving = replace(arriving, remote_fd=armed.faults.remote_fd)
            await vm.write(replace(vm.record, arriving=arriving))
            await self._make_engine(vm, epoch, armed, ram_fd, adopt=adopt)
        except BaseException:
            armed.close()
            raise
        armed.close_fds()
        self._armed[vm.vm_id] = armed

    async def _make_engine(
        self, vm: Vm, epoch: int, armed: Armed, ram_fd: int, *, adopt: bool
    ) -> None:
        arriving, faults = vm.record.arriving, armed.faults
        assert arriving is not None, "an arriving VM has an arrival"
        log.info(
            "faults of %s come by %s%s",
            vm.vm_id,
            faults.backend,
            f" ({faults.backend_reason})" if faults.backend_reason else "",
        )
        pieces = [(region.offset, region.len_bytes) for region in faults.regions]
        if not covers(pieces, vm.spec.memory_bytes):
            raise ArmError("mappings of the VMM", f"they are {pieces}, not all of the memory")
        address = await numeric(arriving.page_address)
        security = self._node.security
        if security is not None:
            self._node.peer_tls(arriving.page_server_name)  # it has one
            if arriving.page_server_key:
                security.pin(vm.vm_id, bytes.fromhex(arriving.page_server_key))
        config = ArrivalConfig(
            page_size_bytes=PAGE_BYTES,
            epoch=epoch,
            page_map_path=arriving.page_map_path,
            session_id=arriving.session_id,
            image_id=arriving.image_id,
            page_host=address.host,
            page_port=address.port,
            uffds=faults.uffds,
            ram_fd=ram_fd,
            regions=faults.regions,
            exit_channel_fd=faults.exit_channel_fd,
            exit_doorbell_fd=faults.exit_doorbell_fd,
            install_method=faults.install_method,
            traceparent=arriving.traceparent,
            adopt=adopt,
            bulk_bytes_per_s_max=arriving.bulk_bytes_per_s_max,
            sandbox=self._node.config.sandbox,
            tls=security.identity if security is not None else None,
            page_server_name=arriving.page_server_name,
            token=bytes.fromhex(arriving.token),
        )
        try:
            arrival = self._node.pagecore.create_arrival(config)
        except OSError as error:
            if error.errno == errno.EPROTONOSUPPORT:
                raise PageMapNewerError(arriving.page_map_path) from error
            if error.errno in (errno.ENOTEMPTY, errno.ESTALE):
                self._node.violations.labels(invariant="I4").inc()
            raise ArmError("arrival engine", error) from error
        try:
            # Before it runs: an outage that ends from now on is ours to tell.
            holds_seen = arrival.status().hold_count
            self._bandwidth.share(arrival, address.host, vm.spec.bandwidth_weight)
            page_count = vm.spec.memory_bytes // PAGE_BYTES
            arrival.set_order(await asyncio.to_thread(first_touch.read, vm.directory, page_count))
            arrival.start()
            vm.watch = ArrivalWatch(
                arrival,
                epoch=epoch,
                on_change=lambda status: self._on_change(vm, status),
                holds_seen=holds_seen,
                adopted=adopt,
            )
        except BaseException:
            arrival.close()
            raise
        if arriving.freeze_after_ms and self._node.freezer is not None:
            self._node.start_task(
                hold_policy.keep(self._node.freezer, vm, vm.watch, arriving.freeze_after_ms),
                f"freeze {vm.vm_id}",
            )

    def _on_change(self, vm: Vm, status: ArrivalStatus) -> None:
        for hold in vm.watch.new_holds() if vm.watch is not None else ():
            cause = hold.cause.name.lower()
            log.warning(
                "arrival of %s: no page could be had for %.3f s (%s), the guest was held %.3f s",
                vm.vm_id,
                hold.outage_ns / 1e9,
                cause,
                hold.held_ns / 1e9,
            )
            if self._node.held is not None:
                self._node.held.labels(cause=cause).observe(hold.held_ns / 1e9)
        level = logging.INFO
        if status.phase in (ArrivalPhase.REFUSED, ArrivalPhase.LINK_LOST, ArrivalPhase.NO_MEMORY):
            level = logging.WARNING
        if status.phase is ArrivalPhase.VIOLATION:
            level = logging.ERROR
            self._node.violations.labels(invariant="I4").inc()
        log.log(
            level,
            "arrival of %s: %s, %d of %d pages absent %s",
            vm.vm_id,
            status.phase.name,
            status.absent_count,
            status.page_count,
            status.reason,
        )
        if status.phase is ArrivalPhase.REFUSED and vm.record.epoch_activating:
            self._node.start_task(self._ask_again(vm), f"ask again {vm.vm_id}")
        if self._node.security is not None and status.phase is ArrivalPhase.FETCHING:
            self._node.start_task(self._learn_server_key(vm), f"learn the key for {vm.vm_id}")
        self.check_complete(vm)

    async def _complete(self, vm: Vm) -> None:
        while True:
            try:
                async with vm.lock:
                    await self.settle(vm)
            except (GodwitError, OSError) as error:
                # Nothing is lost: every page is here. The VMM holds its registrations a while
                # longer, or the source its memory until MEMORY_COMPLETE can be written.
                log.warning("%s: %s", vm.vm_id, error)
            else:
                return
            await asyncio.sleep(LET_GO_RETRY_S)

    async def settle(self, vm: Vm) -> None:
        """If every page is here, make that durable, then let the memory go. Under the VM's lock.

        Idempotent: an agent that died between the two leaves the second to its successor.

        Raises:
            VmmUnreachableError: the VMM does not answer: call again.
        """
        record, watch = vm.record, vm.watch
        arriving = record.arriving
        if record.role is not Role.ARRIVED or watch is None or arriving is None:
            return
        if watch.refresh().phase is not ArrivalPhase.COMPLETE:
            return
        if record.epoch_memory_complete != watch.epoch:
            # Durable before the source is told that it may forget.
            counters = arriving.counters or watch.counters
            arriving = replace(arriving, counters=counters)
            await vm.write(replace(record, epoch_memory_complete=watch.epoch, arriving=arriving))
            watch.wake()
        if not arriving.unregistered:
            armed = self._armed.get(vm.vm_id)
            if armed is not None:
                await armed.let_go()
            try:
                await asyncio.to_thread(watch.arrival.finish)
            except OSError as error:
                if error.errno != errno.ESRCH:
                    raise
                log.warning("%s ended before its memory was let go", vm.vm_id)
            await vm.write(replace(vm.record, arriving=replace(arriving, unregistered=True)))
            if not watch.adopted:
                await asyncio.to_thread(first_touch.keep, vm.directory, watch.arrival)
            if self._node.config.collapse and armed is not None:
                work = self._collapse(vm, why_refused(armed.faults.backend))
                self._node.start_task(work, f"collapse {vm.vm_id}")
        watch.wake()

    async def _collapse(self, vm: Vm, why_not: str) -> None:
        """Huge pages for a guest that is whole, unless there is a reason why not."""
        stopping = threading.Event()

        def stop() -> bool:
            return stopping.is_set() or vm.record.role not in (Role.ARRIVED, Role.RESIDENT)

        if why_not:
            vm.collapsed = Collapsed(huge_bytes=0, left_bytes=0, why_not=why_not)
        else:
            try:
                vm.collapsed = await asyncio.to_thread(
                    collapse, self._node.pagecore, vm.record.ram_path, stop=stop
                )
            finally:
                stopping.set()
        log.info("memory of %s, collapsed: %s", vm.vm_id, vm.collapsed)

    async def _ask_again(self, vm: Vm) -> None:
        """A guest that runs here has no other source: refusals are asked again, for ever."""
        await asyncio.sleep(REFUSED_RETRY_S)
        try:
            async with vm.lock:
                watch = vm.watch
                if watch is None or watch.closed:
                    return
                if watch.refresh().phase is ArrivalPhase.REFUSED:
                    await self.redirect(vm)
        except (GodwitError, OSError) as error:
            log.warning("arrival of %s: %s", vm.vm_id, error)
        watch = vm.watch
        if watch is not None and watch.refresh().phase is ArrivalPhase.REFUSED:
            self._node.start_task(self._ask_again(vm), f"ask again {vm.vm_id}")


def _shell(vm: Vm) -> tuple[Driver, Process]:
    process = vm.record.process
    if process is None or vm.driver is None or vm.record.arriving is None:
        raise VmmUnreachableError(f"{vm.vm_id} has no shell")
    return vm.driver, process


def _target(vm: Vm, process: Process, ram_fd: int) -> ArmTarget:
    arriving = vm.record.arriving
    assert arriving is not None, "an arriving VM has an arrival"
    return ArmTarget(
        spec=vm.spec,
        process=process,
        directory=vm.directory,
        ram_fd=ram_fd,
        remote_fd=arriving.remote_fd,
    )


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArmError(name, error) from error


@contextlib.contextmanager
def _open_ram(path: str) -> Iterator[int]:
    with _step(path):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def numeric_now(text: str) -> Address:
    """An address with a numeric host; a name is looked up. May block for a name.

    Raises:
        InvalidArgumentError: ADDRESS_INVALID.
        ArmError: the name is not known.
    """
    address = parse_address(text)
    try:
        ipaddress.ip_address(address.host)
    except ValueError:
        try:
            found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ArmError(f"look up {address.host}", error) from error
        return Address(host=str(found[0][4][0]), port=address.port)
    return address


async def numeric(text: str) -> Address:
    """`numeric_now`, without holding up the loop."""
    return await asyncio.to_thread(numeric_now, text)
