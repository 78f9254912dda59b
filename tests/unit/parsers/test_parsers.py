# SPDX-License-Identifier: Apache-2.0
"""Whatever is given to a parser comes out as what it says, or as the refusal that it documents.

Those with tests of this kind elsewhere: the journal and its file, kept states, private maps,
bitmaps and page runs, certificates' names, tokens, JWTs and key sets, audit lines, the demo's
console and images; the page messages in tests/native, and everything in C under native/fuzz.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from godwit.errors import GodwitApiError
from godwit.models import Migration, Node, Recovery, UserfaultBitmap, Vm
from godwit.watch import FleetState, Stream, WatchState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.cli import quantities
from services.common import grpc_status, telemetry
from services.common.auth.access import request_id
from services.common.auth.rules import find_route
from services.common.errors import GodwitError
from services.common.listen import parse_address, parse_listen
from services.common.vm_spec import PAGE_BYTES, VmSpec
from services.fault_agent import handoff, host
from services.fault_agent.drivers import unix_socket
from services.fault_agent.drivers.memory_map import memory_regions
from services.fault_agent.drivers.unix_socket import JsonLines
from services.orchestrator.auth.settings import read_role
from services.orchestrator.main import read_node
from services.orchestrator.paging import read_token, write_token
from services.page_server.records import IMAGE_ID_PATTERN, read_record
from tests.harness.made_up import JSON, TEXTS, wounded
from tests.unit.fault_agent.test_handoff import Vmm

QUICK = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SPEC: dict[str, Any] = {
    "vm_id": "web-1",
    "memory_bytes": 256 << 20,
    "vcpus": 2,
    "kernel": "/boot/vmlinuz",
    "disks": [{"path": "/srv/web.raw", "format": "raw", "cache": "none"}],
    "nics": [{"mac": "52:54:00:00:00:01", "tap": {"bridge": "br0", "netns": ""}}],
    "extra_devices": ["virtio-rng-pci"],
}
RECORD: dict[str, Any] = {
    "image_id": "web.1",
    "vm_id": "web",
    "boot_id": "b",
    "epoch": 7,
    "inode": 5,
    "generation": 1,
    "state": "live",
    "ram_path": "/dev/shm/ram",
    "regions": [{"gpa": 0, "size_bytes": 8192, "file_offset": 0, "page_size_bytes": 4096}],
}


T = TypeVar("T")


def outcome(parse: Callable[[], T]) -> tuple[T | None, str]:
    """What is read, or the reason why it is refused. Anything else is a bug, and raised."""
    try:
        return parse(), ""
    except GodwitError as error:
        return None, error.reason


# --- what a VM is


@QUICK
@given(TEXTS | wounded(SPEC).map(json.dumps).map(str.encode))
def test_a_vm_spec(text: bytes) -> None:
    spec, refusal = outcome(lambda: VmSpec.parse(text))
    if spec is None:
        assert refusal == "SPEC_INVALID"
        return
    again = VmSpec.parse(spec.canonical_json())
    assert again == spec
    assert again.spec_hash == spec.spec_hash


@QUICK
@given(st.integers(32, 8 << 20), st.sampled_from(["pc", "q35"]))
def test_a_memory_map_covers_the_memory_and_nothing_twice(count: int, machine: str) -> None:
    spec = VmSpec.parse(json.dumps(SPEC | {"memory_bytes": count * (2 << 20), "machine": machine}))
    regions = memory_regions(spec)
    assert [region.file_offset for region in regions] == [
        sum(region.size_bytes for region in regions[:index]) for index in range(len(regions))
    ]
    assert sum(region.size_bytes for region in regions) == spec.memory_bytes
    end = 0
    for region in regions:
        assert region.gpa >= end
        assert region.size_bytes % PAGE_BYTES == 0 < region.size_bytes
        end = region.gpa + region.size_bytes


# --- what VMMs and other processes say


@QUICK
@given(wounded(None).map(json.dumps).map(str.encode) | TEXTS, st.data())
def test_a_hand_off(tmp_path_factory: pytest.TempPathFactory, text: bytes, data: Any) -> None:
    """Refused or taken, and no descriptor is left open that is not the result's."""
    vmm = Vmm(tmp_path_factory.mktemp("vmm"), "exit-sigsegv")
    if data.draw(st.booleans()):
        text = json.dumps(data.draw(wounded(vmm.message))).encode()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    fds = vmm.fds()[: data.draw(st.integers(0, 3))]
    _, refusal = outcome(lambda: handoff.close_fds(handoff.accept(text, fds, vmm.expected)))
    assert refusal in ("", "HANDOFF_REFUSED")
    assert len(os.listdir("/proc/self/fd")) - before == len(vmm.names) - len(fds)  # noqa: PTH208


@QUICK
@given(st.lists(TEXTS, max_size=5), st.lists(st.integers(0, 400), max_size=6))
async def test_a_monitors_lines(lines: list[bytes], cuts: list[int]) -> None:
    """Each line is one value, wherever the stream is cut; what is no JSON is None."""
    said = b"".join(line.replace(b"\n", b" ") + b"\n" for line in lines)
    heard: list[object] = []
    ended: list[str] = []
    over = asyncio.Event()

    def end(why: str) -> None:
        ended.append(why)
        over.set()

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    reader = JsonLines(ours, on_message=heard.append, on_end=end)
    with theirs:
        at = 0
        for cut in sorted({min(cut, len(said)) for cut in (*cuts, len(said))}):
            theirs.sendall(said[at:cut])
            at = cut
            await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await over.wait()
    reader.end("again")
    assert ended == ["closed by the VMM"]
    assert len(heard) == len(lines)
    for value, line in zip(heard, said.split(b"\n"), strict=False):
        try:
            expected = json.loads(line)
        except ValueError:
            expected = None
        assert value == expected or (value != value and expected != expected)


async def test_a_line_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix_socket, "_LINE_LEN_MAX", 1000)
    over = asyncio.Event()
    ended: list[str] = []

    def end(why: str) -> None:
        ended.append(why)
        over.set()

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    JsonLines(ours, on_message=lambda value: None, on_end=end)
    with theirs:
        theirs.sendall(b'"' + b"x" * 2000)
        async with asyncio.timeout(30):
            await over.wait()
    assert ended == ["a line of more than 1000 bytes"]


@QUICK
@given(TEXTS | wounded(RECORD).map(json.dumps).map(str.encode))
def test_an_image_record(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "web.1.json"
    path.write_bytes(text)
    record, refusal = outcome(lambda: read_record(path))
    if record is None:
        assert refusal == "RECORD_MALFORMED"
        return
    assert record.message().image_id == "web.1"
    assert record.serve_image(ram_fd=0).regions


@QUICK
@given(
    st.binary(max_size=200) | st.text(max_size=200).map(str.encode),
    st.sampled_from(list(grpc.StatusCode)),
)
def test_a_peers_status(details: bytes, code: grpc.StatusCode) -> None:
    error = grpc_status.from_status(code, "x", details)
    assert isinstance(error, GodwitError)
    assert error.reason


@QUICK
@given(st.text(max_size=300))
def test_a_mount_table(text: str) -> None:
    with contextlib.suppress(LookupError):
        host.find_mount(Path("/"), text)


# --- what people write


@QUICK
@given(st.text(max_size=30) | st.from_regex(r"\d{1,400}(\.\d+)?[KMGTkmgt]?i?B?", fullmatch=True))
def test_an_amount(text: str) -> None:
    for parse in (quantities.parse_rate, quantities.parse_memory):
        with contextlib.suppress(ValueError):
            assert 1 <= parse(text) < 1 << 63


@pytest.mark.parametrize("text", ["9" * 400, "9" * 18 + "T", "0.0000001", "1e5", "\u0661K"])
def test_an_amount_that_nothing_has(text: str) -> None:
    for parse in (quantities.parse_rate, quantities.parse_memory):
        with pytest.raises(ValueError, match=r"write for example|less than|more than"):
            parse(text)


@QUICK
@given(st.integers(0, 10**19))
def test_a_duration_and_a_size_are_told_in_few_words(number: int) -> None:
    assert len(quantities.duration(number)) < 20
    assert len(quantities.memory(number)) < 20


@QUICK
@given(
    st.text(max_size=40)
    | st.builds(
        lambda host, port: f"{host}:{port}",
        st.ip_addresses(v=4).map(str)
        | st.ip_addresses(v=6).map(lambda address: f"[{address}]")
        | st.sampled_from(["localhost", "example.org", ""]),
        st.integers(-1, 100_000) | st.text(max_size=3),
    )
)
def test_an_address(text: str) -> None:
    for parse in (parse_address, parse_listen):
        address, refusal = outcome(lambda parse=parse: parse(text))  # type: ignore[misc]
        if address is None:
            assert refusal in ("ADDRESS_INVALID", "LISTEN_NOT_LOOPBACK")
            continue
        assert parse(str(address)) == address
        assert 0 <= address.port <= 65535
        assert parse is parse_address or address.is_loopback


@QUICK
@given(st.text(max_size=40) | st.from_regex(r"[a-z]{1,4}=[a-z0-9.]{1,9}:\d{1,6}", fullmatch=True))
def test_what_stands_behind_an_option(text: str) -> None:
    assert outcome(lambda: read_node(text))[1] in ("", "NODE_INVALID", "FIELD_INVALID")
    assert outcome(lambda: read_role(text))[1] in ("", "OPTION_INVALID")


# --- what comes over the API


@QUICK
@given(st.text(max_size=80))
def test_a_traceparent(text: str) -> None:
    assert telemetry.traceparent_of({telemetry.TRACEPARENT: text}) in ("", text)
    with telemetry.span("x", traceparent=text):
        pass
    assert telemetry.is_traceparent(telemetry.new_traceparent())


@QUICK
@given(st.text(max_size=80))
def test_a_page_token(text: str) -> None:
    for token in (text, write_token("vms", text), write_token("nodes", "a")):
        key, refusal = outcome(partial(read_token, "vms", token))
        if key is None:
            assert refusal == "FIELD_INVALID"
        else:
            assert not token or key == text
            assert not key or read_token("vms", write_token("vms", key)) == key


@QUICK
@given(st.text(max_size=80), st.text(max_size=80))
def test_a_route_and_a_request_id(method: str, path: str) -> None:
    for each in (path, f"/v1/vms/{path}", f"/v1/migrations/{path}:cancel"):
        found = find_route(method, each)
        assert found.rule is None or method == found.rule.route.split(" ")[0]
    drawn = request_id(path)
    assert drawn.isascii()
    assert drawn.isprintable()
    assert 0 < len(drawn) <= 64


@QUICK
@given(JSON, TEXTS)
def test_what_a_client_is_answered(value: Any, text: bytes) -> None:
    error = GodwitApiError.from_problem(500, value, "text")
    assert error.reason
    for model in (Node, Vm, Recovery, UserfaultBitmap):
        model.from_json(value)
    heard = text.decode(errors="replace")
    states: list[Stream[Any]] = [
        WatchState.of_migration(1.0),
        WatchState.of_operation(1.0),
        FleetState(1.0),
    ]
    for state in states:
        for name in ("migration", "operation", "node", "reset", "weather"):
            state.accept(name, "1", heard)
            state.accept(name, "1", json.dumps(value))
        with pytest.raises(GodwitApiError):
            state.accept("problem", "1", json.dumps(value))
        assert math.isfinite(state.broken(0.0, error))


MIGRATION: dict[str, Any] = {
    "migration_id": "01M",
    "version": 3,
    "phase": "postcopy",
    "created_at": "2026-11-22T19:00:00Z",
    "counters": {"page_count": 5, "holds": [{"cause": "x"}], "fault_latency": {"p50_ns": 7}},
    "transitions": [{"phase": "pending", "at": "2026-11-22T19:00:00Z", "message": ""}],
    "events": [{"kind": "x", "at": "2026-11-22T19:00:00Z", "evidence": ["y"]}],
}


@QUICK
@given(wounded(MIGRATION))
def test_a_migration_of_a_newer_server(value: Any) -> None:
    """Read, whatever it has become: a watch does not end because of one odd event."""
    Migration.from_json(value)
    WatchState.of_migration(1.0).accept("migration", "1", json.dumps(value))


def test_the_pattern_of_image_ids_is_a_file_name() -> None:
    assert "/" not in IMAGE_ID_PATTERN
