# SPDX-License-Identifier: Apache-2.0
"""godwit-microvm with --fault-socket: guests whose memory an agent brings, with every backend.

The agent is tests/native/microvm_agent.py, a process of its own that shares no code with the VMM.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.microvm import BACKENDS, need_backend, why_not
from tests.native.test_microvm import (
    ACCELS,
    BINARY,
    PAGE_BYTES,
    WORK_BYTES,
    Microvm,
    Reply,
    Start,
    _refused,
    memory_files,
    start,
)

__all__ = ["memory_files", "start"]  # fixtures

AGENT = Path(__file__).with_name("microvm_agent.py")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A guest that was stopped: its machine's options, its memory and its state."""

    options: tuple[str, ...]
    memory: Path
    state: Path
    vcpus: list[dict[str, Any]]


class AgentProcess:
    """An agent that listens at `path`; killed at the end."""

    def __init__(self, path: Path, memory: Path, seed: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, AGENT, path, memory, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self, event: str) -> Reply:
        """The next line, which must be `event`; those about held pages may come before it."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            said: Reply = json.loads(line)
            if said["event"] == event:
                return said
            assert said["event"] == "held", said
        pytest.fail(f"the agent ended before it said {event}")

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        self.hear("obeyed")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


@pytest.fixture
def agents() -> Iterator[list[AgentProcess]]:
    """Put an agent in: it is killed at the end."""
    running: list[AgentProcess] = []
    yield running
    for agent in running:
        agent.kill()


def _save(start: Start, memory: Path, *options: str) -> Saved:
    """Run a guest until each vCPU has worked and beaten, and stop it for good."""
    vm = start(*options, "--memory-file", str(memory))
    while not all(vcpu["ops"] and vcpu["last_beat"]["number"] for vcpu in vm.vcpus()):
        vm.client.do("verify")
    vm.client.do("pause")
    state = memory.with_suffix(".state")
    vm.client.do("save", path=str(state))
    vcpus = vm.vcpus()
    vm.quit()
    return Saved(options=options, memory=memory, state=state, vcpus=vcpus)


def _incoming(start: Start, saved: Saved, path: Path, *options: str) -> Microvm:
    vm = start(*saved.options, "--incoming", "--fault-socket", str(path), *options)
    assert (vm.ready["state"], vm.ready["faults"]) == ("incoming", "armed")
    return vm


def _go(vm: Microvm, saved: Saved) -> None:
    vm.client.do("load", path=str(saved.state))
    vm.client.do("resume")


def _await_event(vm: Microvm, name: str) -> None:
    assert vm.process.stdout is not None
    while line := vm.process.stdout.readline():
        event = json.loads(line)["event"]
        if event == name:
            return
        assert event == "filled", line
    pytest.fail(f"it ended before {name}")


def _check(vm: Microvm, saved: Saved) -> list[dict[str, Any]]:
    """Not a bit of the guest is lost, nor a beat of it, and its timer goes on."""
    report = vm.client.do("verify")
    assert report["errors"] == 0
    vcpus = vm.vcpus()
    for before, vcpu in zip(saved.vcpus, vcpus, strict=True):
        assert vcpu["first_beat"]["number"] == before["last_beat"]["number"] + 1
        assert vcpu["errors"] == vcpu["beat_jumps"] == 0
        assert vcpu["ticks"] > before["ticks"]
        assert vcpu["ops"] >= before["ops"]
    return vcpus


@pytest.mark.parametrize("vcpus", [1, 2, 4])
@pytest.mark.parametrize(("accel", "backend"), BACKENDS)
def test_all_memory_comes_through_the_agent(
    accel: str,
    backend: str,
    vcpus: int,
    start: Start,
    memory_files: Callable[[str], Path],
    agents: list[AgentProcess],
    tmp_path: Path,
) -> None:
    """16384 pages, checked byte by byte: as its faults ask for them, mixed with a random order."""
    need_backend(accel, backend, str(BINARY))
    machine = ("--accel", accel, "--vcpus", str(vcpus), "--memory", "68M")
    saved = _save(start, memory_files("ram"), *machine, "--workload-size", "64M")
    path = tmp_path / "agent"
    vm = _incoming(start, saved, path, "--fault-backend", backend, "--uffd-count", str(vcpus))
    assert (vm.ready["fault_backend"], vm.ready["faults"]) == (backend, "armed")
    agents.append(AgentProcess(path, saved.memory, seed=vcpus))
    hand_off = agents[0].hear("hand_off")
    assert (hand_off["backend"], hand_off["vcpu_count"]) == (backend, vcpus)
    assert hand_off["fds"].count("uffd") == (0 if backend == "exit-sigsegv" else vcpus)
    agents[0].tell("mix")
    _go(vm, saved)
    _check(vm, saved)
    agents[0].tell("bulk")
    _await_event(vm, "faults_complete")
    released = agents[0].hear("released")
    assert released["done"] == (68 << 20) // PAGE_BYTES
    assert released["faults"] > 0
    assert vm.client.do("hello")["faults"] == vm.client.do("stats")["faults"] == "released"
    after = _check(vm, saved)
    for vcpu in after:
        assert (vcpu["faults"] > 0) == (vcpu["blocked_ns"] > 0) == (backend != "uffd")
        assert vcpu["spurious"] <= vcpu["faults"]
    faults = [vcpu["faults"] for vcpu in after]
    assert vm.client.do("verify")["errors"] == 0
    assert [vcpu["faults"] for vcpu in vm.vcpus()] == faults
    assert vm.quit() == []


@pytest.mark.parametrize(("accel", "backend"), BACKENDS)
def test_every_page_by_demand_and_none_by_bulk(
    accel: str,
    backend: str,
    start: Start,
    memory_files: Callable[[str], Path],
    agents: list[AgentProcess],
    tmp_path: Path,
) -> None:
    need_backend(accel, backend, str(BINARY))
    saved = _save(start, memory_files("ram"), "--accel", accel, "--vcpus", "2")
    vm = _incoming(start, saved, tmp_path / "agent", "--fault-backend", backend)
    agents.append(AgentProcess(tmp_path / "agent", saved.memory, seed=1))
    agents[0].hear("hand_off")
    _go(vm, saved)
    vcpus = _check(vm, saved)
    if backend != "uffd":
        assert sum(vcpu["faults"] - vcpu["spurious"] for vcpu in vcpus) >= WORK_BYTES // PAGE_BYTES
    agents[0].tell("bulk")
    _await_event(vm, "faults_complete")
    agents[0].hear("released")
    _check(vm, saved)
    vm.quit()


@pytest.mark.parametrize(("accel", "backend"), BACKENDS)
def test_a_pause_meets_vcpus_that_wait_for_pages(
    accel: str,
    backend: str,
    start: Start,
    memory_files: Callable[[str], Path],
    agents: list[AgentProcess],
    tmp_path: Path,
) -> None:
    """A vCPU of KVM parks at the instruction. A thread cannot: the pause times out, it runs on."""
    need_backend(accel, backend, str(BINARY))
    saved = _save(start, memory_files("ram"), "--accel", accel, "--vcpus", "2")
    vm = _incoming(start, saved, tmp_path / "agent", "--fault-backend", backend)
    agents.append(AgentProcess(tmp_path / "agent", saved.memory, seed=1))
    agents[0].hear("hand_off")
    _go(vm, saved)
    waiting = vm.connect()
    waiting.send(b'{"cmd":"verify"}\n')
    # Until a page of the workload is asked for: where KVM's emulator waits, for the system area,
    # nothing can be interrupted. No vCPU has run before that page without the pages below.
    agents[0].tell("hold-work")
    agents[0].hear("held")
    for _ in range(3):
        if accel == "kvm":
            vm.client.do("pause")
            assert vm.client.do("hello")["state"] == "paused"
            vm.client.do("resume")
        else:
            assert vm.client.ask("pause", timeout_ms=20)["code"] == "ETIMEDOUT"
            assert vm.client.do("hello")["state"] == "running"
    agents[0].tell("bulk")
    assert waiting.reply()["errors"] == 0
    waiting.close()
    _await_event(vm, "faults_complete")
    _check(vm, saved)
    vm.quit()


@pytest.mark.parametrize(("accel", "backend"), BACKENDS)
def test_an_agent_dies_and_another_goes_on(
    accel: str,
    backend: str,
    start: Start,
    memory_files: Callable[[str], Path],
    agents: list[AgentProcess],
    tmp_path: Path,
) -> None:
    """Killed while vCPUs wait for it, with requests that it took to its grave."""
    need_backend(accel, backend, str(BINARY))
    saved = _save(start, memory_files("ram"), "--accel", accel, "--vcpus", "2")
    path = tmp_path / "agent"
    vm = _incoming(start, saved, path, "--fault-backend", backend)
    agents.append(AgentProcess(path, saved.memory, seed=1))
    agents[0].hear("hand_off")
    _go(vm, saved)
    waiting = vm.connect()
    waiting.send(b'{"cmd":"verify"}\n')
    for number in range(1, 4):
        agents[-1].tell("hold")
        agents[-1].hear("held")
        agents[-1].kill()
        assert vm.client.do("hello")["faults"] == "armed"
        agents.append(AgentProcess(path, saved.memory, seed=number))
        agents[-1].hear("hand_off")
    agents[-1].tell("bulk")
    assert waiting.reply()["errors"] == 0
    waiting.close()
    _await_event(vm, "faults_complete")
    agents[-1].hear("released")
    _check(vm, saved)
    vm.quit()


@pytest.mark.parametrize("accel", ACCELS)
def test_it_waits_for_an_agent_that_is_late(
    accel: str,
    start: Start,
    memory_files: Callable[[str], Path],
    agents: list[AgentProcess],
    tmp_path: Path,
) -> None:
    """The guest may be loaded and told to run before anybody listens; and be told to quit."""
    saved = _save(start, memory_files("ram"), "--accel", accel, "--vcpus", "2")
    path = tmp_path / "agent"
    vm = _incoming(start, saved, path)
    abandoned = _incoming(start, saved, tmp_path / "nobody")
    if accel == "thread":  # KVM's state touches guest memory on its way in
        _go(abandoned, saved)
        _go(vm, saved)
    abandoned.quit()
    agents.append(AgentProcess(path, saved.memory, seed=1))
    agents[0].hear("hand_off")
    if accel == "kvm":
        _go(vm, saved)
    agents[0].tell("bulk")
    _await_event(vm, "faults_complete")
    _check(vm, saved)
    vm.quit()


# --- refusals


def test_the_choice_is_told_with_its_reason(start: Start, tmp_path: Path) -> None:
    vm = start("--accel", "thread", "--incoming", "--fault-socket", str(tmp_path / "agent"))
    assert vm.ready["fault_backend"] in ("uffd", "exit-sigsegv")
    assert vm.ready["fault_backend_reason"]
    assert vm.client.do("hello")["faults"] == "armed"
    vm.quit()
    vm = start("--accel", "thread", "--incoming")
    assert vm.ready["faults"] == "none"
    assert "fault_backend" not in vm.ready
    vm.quit()


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--fault-socket", "s"), "--incoming"),
        (("--fault-backend", "uffd"), "--fault-socket"),
        (("--incoming", "--fault-backend", "uffd"), "--fault-socket"),
        (("--incoming", "--fault-socket", "s", "--fault-backend", "magic"), "--fault-backend"),
        (("--incoming", "--fault-socket", "s", "--fault-backend", "kvm-userfault"), "thread"),
        (("--incoming", "--fault-socket", "s", "--fault-backend", "exit-emulation"), "thread"),
        (("--incoming", "--fault-socket", "s", "--uffd-count", "0"), "--uffd-count"),
        (("--incoming", "--fault-socket", "s", "--uffd-count", "17"), "--uffd-count"),
        (("--incoming", "--fault-socket", "s", "--fault-spin-us", "x"), "--fault-spin-us"),
        (("--incoming", "--fault-socket", "s" * 200), "--fault-socket"),
    ],
)
def test_what_cannot_be_is_refused_with_words(
    args: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    assert why in _refused("--accel", "thread", *args, control=tmp_path / "control")


@pytest.mark.requires("kvm")
def test_a_backend_by_name_is_that_one_or_none(tmp_path: Path) -> None:
    """kvm-userfault says what the kernel said; threads' backend is not for KVM."""
    asked = ("--accel", "kvm", "--incoming", "--fault-socket", str(tmp_path / "agent"))
    control = tmp_path / "control"
    if why_not("kvm", "kvm-userfault", str(BINARY)):
        refused = _refused(*asked, "--fault-backend", "kvm-userfault", control=control)
        assert "KVM_MEM_USERFAULT" in refused
    refused = _refused(*asked, "--fault-backend", "exit-sigsegv", control=control)
    assert "not with --accel kvm" in refused
