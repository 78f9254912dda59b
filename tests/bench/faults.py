# SPDX-License-Identifier: Apache-2.0
"""How long a guest waits for an absent page, and how many it gets a second: `make bench-faults`.

A guest (godwit-microvm, workload `measure`) is moved to a second VMM whose memory is absent; there
it writes once to each of its pages in an order that jumps about, and times each write by the TSC.
Two agents answer. `local` copies pages out of a file on the same machine and does nothing else: the
price of the mechanism. `engine` is the agent's own arrival engine, bulk lane off, that fetches each
page over gRPC on loopback from a page server in a process of its own: what a guest gets.
Rounds go over all cases in turn, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tests.harness.microvm import need_microvm, why_not

REPO = Path(__file__).parents[2]
LOCAL_AGENT = REPO / "build/native/bench_fault_agent"
START_S = 30.0
ASK_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Case:
    """What is compared."""

    agent: str
    accel: str
    backend: str
    vcpu_count: int
    uffd_count: int
    """Userfaultfds among which the memory is dealt out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One move's."""

    page_count: int
    pages_per_s: float
    p50_us: float
    p99_us: float
    p999_us: float
    exit_count: int
    """vCPU exits; 0: they wait in the kernel."""
    spurious_count: int
    """Exits whose page had come in the meantime."""


class Vmm:
    """A godwit-microvm and the connection to it."""

    def __init__(self, process: subprocess.Popen[bytes], control: Path) -> None:
        self._process = process
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ASK_S)
        self._socket.connect(str(control))
        self._answers: IO[bytes] = self._socket.makefile("rb")

    def ask(self, cmd: str, **members: object) -> dict[str, Any]:
        """The answer to one command."""
        self._socket.sendall(json.dumps({"cmd": cmd, **members}).encode() + b"\n")
        answer: dict[str, Any] = json.loads(self._answers.readline())
        if not answer.get("ok"):
            raise RuntimeError(f"{cmd}: {answer}")
        return answer

    def quit(self) -> None:
        """End it."""
        self.ask("quit")
        self._process.wait(START_S)
        self._answers.close()
        self._socket.close()


@contextmanager
def _process(*args: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [str(arg) for arg in args], stdout=subprocess.PIPE, cwd=REPO, stdin=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().decode().strip()
    if not line:
        raise RuntimeError(f"{process.args!r} said nothing, exit {process.wait(START_S)}")
    return line


@contextmanager
def _vmm(control: Path, *args: str | Path) -> Iterator[Vmm]:
    with _process(need_microvm(), "--control", control, "--die-with-parent", *args) as process:
        _line(process)
        yield Vmm(process, control)


class Guest:
    """A guest that has filled its memory and stopped: its memory file and its state."""

    def __init__(self, directory: Path, case: Case, memory_mib: int) -> None:
        self.ram = directory / "source-ram"
        self.state = directory / "state"
        self.memory = f"{memory_mib}M"
        args = ["--accel", case.accel, "--memory", self.memory, "--vcpus", str(case.vcpu_count)]
        args += ["--memory-file", str(self.ram), "--workload", "measure"]
        with _vmm(directory / "source.sock", *args) as vmm:
            deadline = time.monotonic() + ASK_S
            while not all(vcpu["filled_pages"] for vcpu in vmm.ask("stats")["vcpus"]):
                if time.monotonic() > deadline:
                    raise RuntimeError("the guest does not fill its memory")
                time.sleep(0.01)
            vmm.ask("pause")
            vmm.ask("save", path=str(self.state))
            vmm.quit()


@contextmanager
def _agent(case: Case, guest: Guest, directory: Path, spin_us: int) -> Iterator[Path]:
    path = directory / "faults.sock"
    with ExitStack() as stack:
        if case.agent == "local":
            command: list[str | Path] = [LOCAL_AGENT, path, guest.ram, str(spin_us)]
        else:
            serve: list[str | Path] = [sys.executable, "-m", "tests.bench.serve", guest.ram]
            port = _line(stack.enter_context(_process(*serve)))
            command = [sys.executable, "-m", "tests.bench.engine", path, port]
            command += [str(directory / "page-map")]
        agent = stack.enter_context(_process(*command))
        _line(agent)
        yield path


def run(case: Case, *, memory_mib: int, spin_us: int) -> Result:
    """One move and its measurement."""
    with ExitStack() as stack:
        # In tmpfs, where an agent keeps a guest's memory.
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="gw-bench-", dir="/dev/shm"))
        directory = Path(name)
        guest = Guest(directory, case, memory_mib)
        path = stack.enter_context(_agent(case, guest, directory, spin_us))
        vmm = stack.enter_context(
            _vmm(
                directory / "destination.sock",
                *("--accel", case.accel, "--memory", guest.memory),
                *("--vcpus", str(case.vcpu_count), "--incoming"),
                *("--memory-file", directory / "destination-ram"),
                *("--fault-socket", path, "--fault-backend", case.backend),
                *("--uffd-count", str(case.uffd_count)),
            )
        )
        vmm.ask("load", path=str(guest.state))
        vmm.ask("resume")
        checked = vmm.ask("verify")
        if checked["errors"]:
            raise RuntimeError(f"{case}: the guest found {checked['errors']} errors")
        vcpus = vmm.ask("stats")["vcpus"]
        vmm.quit()
    return _result(vcpus)


def _result(vcpus: list[dict[str, Any]]) -> Result:
    touches = [vcpu["touches"] for vcpu in vcpus]
    page_count = sum(int(touch["count"]) for touch in touches)

    def mean_us(name: str) -> float:
        # Quantiles of vCPUs that do the same: their mean, weighed by touches.
        total: float = sum(float(touch[name]) * touch["count"] for touch in touches)
        return total / page_count / 1000

    return Result(
        page_count=page_count,
        pages_per_s=page_count / max(touch["span_ns"] for touch in touches) * 1e9,
        p50_us=mean_us("p50_ns"),
        p99_us=mean_us("p99_ns"),
        p999_us=mean_us("p999_ns"),
        exit_count=sum(vcpu["faults"] for vcpu in vcpus),
        spurious_count=sum(vcpu.get("spurious", 0) for vcpu in vcpus),
    )


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    backends = {
        "kvm": ("uffd", "exit-emulation", "kvm-userfault"),
        "thread": ("uffd", "exit-sigsegv"),
    }
    for accel in args.accel:
        for backend in backends[accel]:
            if why := why_not(accel, backend):
                print(f"not here: {accel} {backend}: {why}", file=sys.stderr)
                continue
            for agent, vcpus in itertools.product(args.agent, args.vcpus):
                # Without a userfaultfd there is nothing to deal out.
                uffds = [1] if backend == "exit-sigsegv" else args.uffds
                for uffd_count in uffds:
                    yield Case(
                        agent=agent,
                        accel=accel,
                        backend=backend,
                        vcpu_count=vcpus,
                        uffd_count=uffd_count,
                    )


def _median(results: list[Result], name: str) -> float:
    values: list[float] = [getattr(result, name) for result in results]
    return statistics.median(values)


def _table(results: dict[Case, list[Result]]) -> Iterator[str]:
    yield (
        "| agent | accel | backend | vCPUs | uffds | n | pages/s | of 1 vCPU"
        " | p50 µs | p99 µs | p99.9 µs | of uffd, p50 | exits/page | spurious |"
    )
    yield "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for case, runs in results.items():
        rate, p50 = _median(runs, "pages_per_s"), _median(runs, "p50_us")
        alone = _same(results, case, vcpu_count=1)
        blocking = _same(results, case, backend="uffd", uffd_count=1)
        pages = sum(run.page_count for run in runs)
        yield (
            f"| {case.agent} | {case.accel} | {case.backend} | {case.vcpu_count}"
            f" | {case.uffd_count} | {len(runs)} | {rate:,.0f}"
            f" | {_ratio(rate, alone, 'pages_per_s')} | {p50:.1f} | {_median(runs, 'p99_us'):.1f}"
            f" | {_median(runs, 'p999_us'):.1f} | {_ratio(p50, blocking, 'p50_us')}"
            f" | {sum(run.exit_count for run in runs) / pages:.2f}"
            f" | {sum(run.spurious_count for run in runs)} |"
        )


def _same(results: dict[Case, list[Result]], case: Case, **changes: object) -> list[Result]:
    wanted = asdict(case) | changes
    return next((runs for other, runs in results.items() if asdict(other) == wanted), [])


def _ratio(value: float, runs: list[Result], name: str) -> str:
    return f"{value / _median(runs, name):.2f}" if runs else "-"


def main() -> None:
    """Run all cases, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-mib", type=int, default=128)
    parser.add_argument("--vcpus", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--uffds", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--accel", nargs="+", default=["kvm", "thread"])
    parser.add_argument("--agent", nargs="+", default=["local", "engine"])
    parser.add_argument("--spin-us", type=int, default=0, help="of the local agent")
    parser.add_argument("--json", type=Path, help="write all results there too")
    args = parser.parse_args()
    cases = list(_cases(args))
    results: dict[Case, list[Result]] = {case: [] for case in cases}
    for number in range(args.rounds):
        for case in cases:
            results[case].append(run(case, memory_mib=args.memory_mib, spin_us=args.spin_us))
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    print(f"{os.cpu_count()} CPUs, Linux {platform.release()}, load {os.getloadavg()[0]:.1f}")
    print(f"{args.memory_mib} MiB guests; medians of n moves\n")
    print("\n".join(_table(results)))
    if args.json:
        rows = [
            {"case": asdict(case), "runs": [asdict(run) for run in runs]}
            for case, runs in results.items()
        ]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
