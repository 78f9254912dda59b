# SPDX-License-Identifier: Apache-2.0
"""godwit-microvm as a process: its ready line, its socket, moves to another process, its death."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("GODWIT_MICROVM", ROOT / "build" / "native" / "godwit-microvm"))
WAIT_S = 100.0
MEMORY_BYTES = 64 << 20
WORK_BYTES = 8 << 20
WORK_OFFSET = 4 << 20
PAGE_BYTES = 4096
DEFAULTS = ("--memory", "64M", "--workload-size", "8M", "--die-with-parent")

ACCELS = [pytest.param("thread"), pytest.param("kvm", marks=pytest.mark.requires("kvm"))]

Reply = dict[str, Any]


class Client:
    """One connection to a control socket."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(path)
        self.lines = self.socket.makefile("rb")

    def send(self, line: bytes, *fds: int) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([line], rights)

    def reply(self) -> Reply:
        line = self.lines.readline()
        assert line.endswith(b"\n"), "hung up"
        answer: Reply = json.loads(line)
        return answer

    def raw(self, line: bytes, *fds: int) -> Reply:
        self.send(line + b"\n", *fds)
        return self.reply()

    def ask(self, cmd: str, **members: object) -> Reply:
        return self.raw(json.dumps({"cmd": cmd, **members}).encode())

    def do(self, cmd: str, **members: object) -> Reply:
        """Ask for what must be granted."""
        answer = self.ask(cmd, **members)
        assert answer["ok"], answer
        return answer

    def hung_up(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


@dataclasses.dataclass(kw_only=True)
class Microvm:
    """A running process; `ready` is its first line."""

    process: subprocess.Popen[bytes]
    ready: Reply
    client: Client

    def connect(self) -> Client:
        return Client(self.ready["control"])

    def vcpus(self) -> list[dict[str, Any]]:
        vcpus: list[dict[str, Any]] = self.client.do("stats")["vcpus"]
        return vcpus

    def events(self) -> list[Reply]:
        """All that it prints until it ends."""
        assert self.process.stdout is not None
        return [json.loads(line) for line in self.process.stdout]

    def quit(self) -> list[Reply]:
        self.client.do("quit")
        events = self.events()
        assert self.process.wait(WAIT_S) == 0
        return events


Start = Callable[..., Microvm]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts microvms; what the test leaves running is killed, by its own process id."""
    with contextlib.ExitStack() as stack:
        count = 0

        def run(*args: str, prefix: tuple[str, ...] = (), control: Path | None = None) -> Microvm:
            nonlocal count
            count += 1
            path = control or tmp_path / f"control-{count}"
            process = subprocess.Popen(
                [*prefix, BINARY, "--control", path, *DEFAULTS, *args], stdout=subprocess.PIPE
            )
            stack.callback(_end, process)
            assert process.stdout is not None
            readable, _, _ = select.select([process.stdout], [], [], WAIT_S)
            assert readable
            client = Client(str(path)) if (line := process.stdout.readline()) else None
            assert client is not None, "it ended before it was ready"
            stack.callback(client.close)
            return Microvm(process=process, ready=json.loads(line), client=client)

        yield run


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


@pytest.fixture
def memory_files() -> Iterator[Callable[[str], Path]]:
    """Names for guest memory in RAM; removed afterwards."""
    directory = Path("/dev/shm") / f"godwit-test-microvm-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir()
    try:
        yield lambda name: directory / name
    finally:
        shutil.rmtree(directory)


def _refused(*args: str, control: Path) -> str:
    done = subprocess.run(
        [BINARY, "--control", control, *args],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 2, done
    assert done.stdout == ""
    return done.stderr


# --- what it says of itself


@pytest.mark.parametrize("accel", ACCELS)
def test_the_ready_line_tells_what_an_agent_needs(accel: str, start: Start) -> None:
    vm = start("--accel", accel, "--vcpus", "2")
    ready = vm.ready
    assert (ready["event"], ready["vmm"], ready["protocol"]) == ("ready", "godwit-microvm", 1)
    assert (ready["accel"], ready["vcpu_count"], ready["state"]) == (accel, 2, "running")
    assert (ready["memory_bytes"], ready["page_size"]) == (MEMORY_BYTES, PAGE_BYTES)
    assert [(s["gpa"], s["size"], s["offset"]) for s in ready["slots"]] == [
        (0, 2 << 20, 0),
        (2 << 20, 62 << 20, 2 << 20),
    ]
    assert ready["pid"] == vm.process.pid
    fd = Path(f"/proc/{ready['pid']}/fd/{ready['memory_fd']}")
    assert fd.stat().st_size == MEMORY_BYTES
    hello = vm.client.do("hello")
    assert {key: hello[key] for key in ready if key != "event"} | {"event": "ready"} == ready
    vm.quit()


@pytest.mark.requires("root")
def test_without_kvm_it_runs_threads_and_says_why(start: Start) -> None:
    hide = ("unshare", "--mount", "sh", "-ec", 'mount --bind /dev/null /dev/kvm; exec "$@"', "sh")
    prefix = hide if Path("/dev/kvm").exists() else ()
    vm = start("--accel", "auto", prefix=prefix)
    assert vm.ready["accel"] == "thread"
    assert "/dev/kvm" in vm.ready["accel_reason"]
    assert vm.client.do("verify")["errors"] == 0
    vm.quit()


@pytest.mark.requires("kvm")
def test_with_kvm_it_takes_kvm(start: Start) -> None:
    vm = start()
    assert vm.ready["accel"] == "kvm"
    assert "accel_reason" not in vm.ready
    vm.quit()


# --- the guest


@pytest.mark.parametrize("accel", ACCELS)
@pytest.mark.parametrize("workload", ["verify", "sequential", "hot", "idle"])
def test_a_guest_runs_and_finds_no_error(accel: str, workload: str, start: Start) -> None:
    vm = start("--accel", accel, "--vcpus", "2", "--workload", workload)
    if workload != "idle":
        _run_until_ops(vm)
    for _ in range(5):
        report = vm.client.do("verify")
        assert (report["errors"], report["pages_verified"]) == (0, WORK_BYTES // PAGE_BYTES)
        assert (report["ops"] == 0) == (workload == "idle")
    for vcpu in vm.vcpus():
        assert vcpu["errors"] == vcpu["beat_jumps"] == vcpu["faults"] == 0
        assert vcpu["ticks"] >= vcpu["last_beat"]["number"] > 0
        assert workload != "idle" or vcpu["idle_ns"] > 0
    events = vm.quit()
    assert [event["event"] for event in events] == ["filled", "filled"]
    assert sum(event["pages"] for event in events) == WORK_BYTES // PAGE_BYTES


@pytest.mark.parametrize("accel", ACCELS)
def test_a_pause_holds_the_guest(accel: str, start: Start) -> None:
    vm = start("--accel", accel, "--vcpus", "2")
    vm.client.do("verify")
    vm.client.do("pause")
    before = vm.vcpus()
    other = vm.connect()
    other.do("hello")
    after = vm.vcpus()
    assert [v["last_beat"] for v in before] == [v["last_beat"] for v in after]
    assert [v["exits"] for v in before] == [v["exits"] for v in after]
    assert vm.client.do("pause")["ok"]
    assert vm.client.ask("verify")["code"] == "EBUSY"
    vm.client.do("resume")
    assert vm.client.do("verify")["errors"] == 0
    other.close()
    vm.quit()


def _run_until_ops(vm: Microvm) -> None:
    while vm.client.do("verify")["ops"] == 0:
        pass


@pytest.mark.parametrize("accel", ACCELS)
@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_a_guest_moves_to_another_process_and_goes_on(
    accel: str, vcpus: int, start: Start, memory_files: Callable[[str], Path], tmp_path: Path
) -> None:
    """Three times: each by another way for the state, each on a copy of the memory."""
    state = tmp_path / "state"
    machine = ("--accel", accel, "--vcpus", str(vcpus))
    source = start(*machine, "--memory-file", str(memory_files("0")))
    _run_until_ops(source)
    for move in range(1, 4):
        source.client.do("pause")
        if move == 1:
            saved = source.client.do("save", path=str(state))
        elif move == 2:
            with state.open("wb") as file:
                saved = source.client.raw(b'{"cmd":"save"}', file.fileno())
        else:
            saved, blob = _save_into_pipe(source.client)
            state.write_bytes(blob)
        assert saved["ok"]
        assert state.stat().st_size == saved["bytes"]
        left = source.vcpus()
        shutil.copyfile(memory_files(str(move - 1)), memory_files(str(move)))
        source.quit()
        memory_files(str(move - 1)).unlink()

        destination = start(*machine, "--incoming", "--memory-file", str(memory_files(str(move))))
        assert destination.ready["state"] == "incoming"
        if move == 1:
            destination.client.do("load", path=str(state))
        else:
            with state.open("rb") as file:
                assert destination.client.raw(b'{"cmd":"load"}', file.fileno())["ok"]
        assert destination.client.do("hello")["state"] == "paused"
        destination.client.do("resume")
        assert destination.client.do("verify")["errors"] == 0
        for before, vcpu in zip(left, destination.vcpus(), strict=True):
            assert vcpu["first_beat"]["number"] == before["last_beat"]["number"] + 1
            assert vcpu["first_beat"]["time_ns"] > before["last_beat"]["time_ns"]
            assert vcpu["errors"] == vcpu["beat_jumps"] == 0
            assert vcpu["ops"] >= before["ops"]
        source = destination
    assert source.quit() == []


def _save_into_pipe(client: Client) -> tuple[Reply, bytes]:
    """As an agent does it; the reply comes after the last byte."""
    reader, writer = os.pipe()
    client.send(b'{"cmd":"save"}\n', writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        blob = file.read()
    return client.reply(), blob


@pytest.mark.parametrize("accel", ACCELS)
def test_a_flipped_bit_in_the_copy_turns_the_verdict_red(
    accel: str, start: Start, memory_files: Callable[[str], Path], tmp_path: Path
) -> None:
    source = start("--accel", accel, "--memory-file", str(memory_files("a")))
    _run_until_ops(source)
    source.client.do("pause")
    source.client.do("save", path=str(tmp_path / "state"))
    shutil.copyfile(memory_files("a"), memory_files("b"))
    with memory_files("b").open("r+b") as file:
        file.seek(WORK_OFFSET + 1234 * PAGE_BYTES + 2048)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    copy = start("--accel", accel, "--incoming", "--memory-file", str(memory_files("b")))
    copy.client.do("load", path=str(tmp_path / "state"))
    copy.client.do("resume")
    assert copy.client.do("verify")["errors"] > 0
    errors = [event for event in copy.quit() if event["event"] == "guest_error"]
    assert {event["page"] for event in errors} == {1234}
    source.client.do("resume")
    assert source.client.do("verify")["errors"] == 0
    source.quit()


@pytest.mark.parametrize("accel", ACCELS)
def test_a_guest_without_its_memory_does_not_pass_for_one(
    accel: str, start: Start, tmp_path: Path
) -> None:
    """Zero pages everywhere: what closing the last userfaultfd would hand it."""
    source = start("--accel", accel, "--vcpus", "2")
    _run_until_ops(source)
    source.client.do("pause")
    source.client.do("save", path=str(tmp_path / "state"))
    source.quit()
    empty = start("--accel", accel, "--vcpus", "2", "--incoming")
    empty.client.do("load", path=str(tmp_path / "state"))
    empty.client.do("resume")
    assert empty.process.stdout is not None
    event = json.loads(empty.process.stdout.readline())
    assert event["event"] == ("failed" if accel == "kvm" else "guest_error")
    assert empty.client.do("hello")["state"] == ("failed" if accel == "kvm" else "running")
    empty.client.do("quit")
    assert empty.process.wait(WAIT_S) == (1 if accel == "kvm" else 0)


@pytest.mark.parametrize("accel", ACCELS)
def test_huge_pages(accel: str, start: Start, tmp_path: Path) -> None:
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not free.exists() or int(free.read_text()) < MEMORY_BYTES >> 21:
        pytest.skip("needs 32 free huge pages of 2 MiB: sysctl vm.nr_hugepages=64")
    vm = start("--accel", accel, "--vcpus", "2", "--huge-pages")
    assert vm.ready["page_size"] == 2 << 20
    _run_until_ops(vm)
    vm.client.do("pause")
    vm.client.do("save", path=str(tmp_path / "state"))
    vm.client.do("resume")
    assert vm.client.do("verify")["errors"] == 0
    vm.quit()


# --- refusals


@pytest.mark.parametrize(
    ("line", "code", "why"),
    [
        (b"", "EINVAL", "not a JSON object"),
        (b"pause", "EINVAL", "not a JSON object"),
        (b"{}", "EINVAL", "no cmd"),
        (b'{"cmd":7}', "EINVAL", "not a string"),
        (b'{"cmd":"reboot"}', "ENOSYS", "no command reboot"),
        (b'{"cmd":"reb\xff\xfeoot"}', "ENOSYS", "no command reb??oot"),
        (b'{"cmd":"pause","now":true}', "EINVAL", "unknown member now"),
        (b'{"cmd":"pause","timeout_ms":"5"}', "EINVAL", "timeout_ms"),
        (b'{"cmd":"pause","timeout_ms":600001}', "EINVAL", "timeout_ms"),
        (b'{"cmd":"pause","id":-1}', "EINVAL", "member 1"),
        (b'{"cmd":"pause"}{"cmd":"quit"}', "EINVAL", "behind the object"),
        (b'{"cmd":"save"}', "EINVAL", "a path, or a descriptor"),
        (b'{"cmd":"save","path":"/nowhere/state"}', "ENOENT", "/nowhere/state"),
        (b'{"cmd":"save","path":7}', "EINVAL", "path"),
        (b'{"cmd":"load","path":"/dev/null"}', "EBUSY", "running"),
        (b'{"cmd":"stats","deep":{}}', "EINVAL", "member 1"),
    ],
)
def test_a_line_that_breaks_the_rules_changes_nothing(
    line: bytes, code: str, why: str, start: Start
) -> None:
    vm = start("--accel", "thread")
    answer = vm.client.raw(line)
    assert (answer["ok"], answer["code"]) == (False, code)
    assert why in answer["error"]
    assert vm.client.raw(b'{"cmd":"hello","id":18446744073709551615}')["id"] == 2**64 - 1
    assert vm.client.do("hello")["state"] == "running"
    assert vm.client.do("verify")["errors"] == 0
    vm.quit()


def test_a_descriptor_has_to_be_wanted(start: Start) -> None:
    vm = start("--accel", "thread")
    with Path("/dev/null").open("wb") as null:
        answer = vm.client.raw(b'{"cmd":"pause"}', null.fileno())
        assert answer["code"] == "EINVAL"
        assert vm.client.do("hello")["state"] == "running"
        answer = vm.client.raw(b'{"cmd":"save","path":"/nowhere"}', null.fileno())
        assert answer["code"] == "EINVAL"
        greedy = vm.connect()
        greedy.send(b'{"cmd":"hello"}\n', null.fileno(), null.fileno())
        assert greedy.hung_up()
        greedy.close()
    open_fds = len(list(Path(f"/proc/{vm.process.pid}/fd").iterdir()))
    again = vm.connect()
    again.do("hello")
    assert len(list(Path(f"/proc/{vm.process.pid}/fd").iterdir())) <= open_fds + 1
    again.close()
    vm.quit()


@pytest.mark.parametrize("accel", ACCELS)
def test_a_state_that_is_not_one_is_refused_and_the_right_one_still_loads(
    accel: str, start: Start, memory_files: Callable[[str], Path], tmp_path: Path
) -> None:
    source = start("--accel", accel, "--vcpus", "2", "--memory-file", str(memory_files("a")))
    _run_until_ops(source)
    source.client.do("pause")
    source.client.do("save", path=str(tmp_path / "state"))
    source.quit()
    good = (tmp_path / "state").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x10
    wrong = {
        "empty": b"",
        "short": good[:-8],
        "long": good + bytes(8),
        "flipped": bytes(flipped),
        "zeros": bytes(len(good)),
        "endless": bytes((16 << 20) + 1),
    }
    vm = start(
        *("--accel", accel, "--vcpus", "2", "--incoming"),
        *("--memory-file", str(memory_files("a"))),
    )
    for name, blob in wrong.items():
        (tmp_path / name).write_bytes(blob)
        answer = vm.client.ask("load", path=str(tmp_path / name))
        assert (answer["ok"], answer["code"]) == (False, "EBADMSG"), name
        assert vm.client.do("hello")["state"] == "incoming"
        assert vm.client.ask("resume")["code"] == "EBUSY"
    vm.client.do("load", path=str(tmp_path / "state"))
    vm.client.do("resume")
    assert vm.client.do("verify")["errors"] == 0
    vm.quit()


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--memory", "63M"), "64 MiB"),
        (("--memory", "64.5M"), "with K, M or G"),
        (("--memory", "-1"), "not a number"),
        (("--memory", "99999999999G"), "too large"),
        (("--vcpus", "0"), "vCPUs"),
        (("--vcpus", "33"), "vCPUs"),
        (("--vcpus", "2x"), "not a number"),
        (("--accel", "tcg"), "--accel"),
        (("--workload", "sleep"), "--workload"),
        (("--workload-size", "1G"), "does not fit"),
        (("--tick-us", "1"), "tick"),
        (("--memory-file", "/nowhere/ram"), "/nowhere/ram"),
        (("--memory-file", "/dev"), "/dev"),
        (("--faster",), "--faster"),
        (("faster",), "faster"),
    ],
)
def test_what_cannot_be_is_refused_with_words(
    args: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    assert why in _refused("--accel", "thread", *args, control=tmp_path / "control")
    assert not (tmp_path / "control").exists()


def test_one_process_has_a_name_and_one_has_a_memory_file(
    start: Start, memory_files: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "control"
    vm = start("--accel", "thread", "--memory-file", str(memory_files("a")), control=path)
    assert "Address already in use" in _refused("--accel", "thread", control=path)
    other = tmp_path / "other"
    busy = _refused(*("--incoming", "--memory", "64M"), *_file(memory_files("a")), control=other)
    assert "another process runs a guest on it" in busy
    vm.process.kill()
    vm.process.wait()
    assert path.exists()
    in_use = _refused(*("--memory", "64M"), *_file(memory_files("a")), control=other)
    assert "only --incoming takes a file over" in in_use
    again = start(
        *("--accel", "thread", "--incoming", "--memory-file", str(memory_files("a"))), control=path
    )
    assert again.ready["state"] == "incoming"
    again.quit()
    assert not path.exists()


def _file(path: Path) -> tuple[str, str]:
    return ("--memory-file", str(path))


# --- clients and ends


@pytest.mark.parametrize("accel", ACCELS)
def test_the_death_of_a_client_does_not_touch_the_guest(accel: str, start: Start) -> None:
    vm = start("--accel", accel, "--vcpus", "2")
    for line in (b"", b'{"cmd":"pa', b'{"cmd":"verify"}\n', b'{"cmd":"stats"}\n' * 100):
        client = vm.connect()
        client.send(line)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
        client.close()
    too_long = vm.connect()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        too_long.socket.sendall(b" " * 100000)
    assert too_long.hung_up()
    too_long.close()
    assert vm.client.do("hello")["state"] == "running"
    assert vm.client.do("verify")["errors"] == 0
    vm.quit()


def test_a_client_that_reads_no_answers_is_hung_up_on(start: Start) -> None:
    vm = start("--accel", "thread", "--vcpus", "4")
    deaf = vm.connect()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            deaf.socket.sendall(b'{"cmd":"stats"}\n' * 64)
    deaf.close()
    assert vm.client.do("verify")["errors"] == 0
    vm.quit()


def test_there_is_room_for_eight_clients(start: Start) -> None:
    vm = start("--accel", "thread")
    others = [vm.connect() for _ in range(7)]
    for other in others:
        other.do("hello")
    ninth = vm.connect()
    assert ninth.hung_up()
    ninth.close()
    others.pop().close()
    assert vm.client.do("verify")["errors"] == 0
    for other in others:
        other.do("hello")
        other.close()
    vm.quit()


@pytest.mark.parametrize("accel", ACCELS)
def test_who_waits_for_a_sweep_is_answered_after_a_pause(accel: str, start: Start) -> None:
    vm = start("--accel", accel, "--vcpus", "2")
    waiting = [vm.connect() for _ in range(3)]
    for client in waiting:
        client.send(b'{"cmd":"verify","id":5}\n{"cmd":"hello","id":6}\n')
    vm.client.do("pause")
    vm.client.do("stats")
    vm.client.do("resume")
    for client in waiting:
        report = client.reply()
        if report["ok"]:
            assert (report["id"], report["errors"]) == (5, 0)
        else:
            assert report["code"] == "EBUSY"  # asked while the guest was paused
        assert client.reply()["id"] == 6
        client.close()
    vm.quit()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_in_order(number: signal.Signals, start: Start) -> None:
    vm = start("--accel", "thread", "--vcpus", "2")
    vm.process.send_signal(number)
    assert vm.process.wait(WAIT_S) == 0
    assert not Path(vm.ready["control"]).exists()


def test_it_runs_on_when_nobody_reads_its_output(start: Start) -> None:
    vm = start("--accel", "thread", "--vcpus", "4")
    assert vm.process.stdout is not None
    vm.process.stdout.close()
    assert vm.client.do("verify")["errors"] == 0
    vm.client.do("quit")
    assert vm.process.wait(WAIT_S) == 0
