# SPDX-License-Identifier: Apache-2.0
"""A token is in nothing that an orchestrator writes: log, answers, store, audit log, traces."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from services.common.auth.tokens import new_token

WAIT_S = 60.0
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
ROUTES = (
    ("POST", "/v1/migrations"),
    ("DELETE", "/v1/vms/ghost"),
    ("GET", "/v1/vms"),
    ("GET", "/v1/nothing"),
    ("PUT", "/v1/vms"),
)


class Collector(grpc.GenericRpcHandler):
    """Takes spans as bytes."""

    def __init__(self) -> None:
        self.received: list[bytes] = []

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        return (
            grpc.unary_unary_rpc_method_handler(self._take)
            if handler_call_details.method == EXPORT
            else None
        )

    def _take(self, request: bytes, _context: grpc.ServicerContext) -> bytes:
        self.received.append(request)
        return b""


@contextmanager
def collecting() -> Iterator[tuple[Collector, int]]:
    collector = Collector()
    with futures.ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, handlers=[collector])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield collector, port
        server.stop(None).wait()


@contextmanager
def orchestrator(directory: Path, tokens_file: Path, otlp_port: int) -> Iterator[tuple[str, str]]:
    """A process that logs as much as it can into `directory`; its REST and gRPC addresses."""
    env = os.environ | {
        "GODWIT_LOG_LEVEL": "DEBUG",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{otlp_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    command = [sys.executable, "-m", "services.orchestrator"]
    command += ["--rest", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    command += ["--store", str(directory / "godwit.db"), "--audit-log", str(directory / "audit")]
    command += ["--tokens-file", str(tokens_file)]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=env, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        said = dict(word.split("=", 1) for word in line.split() if "=" in word)
        yield said["rest"], said["grpc"]
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)


def _ask(rest: str, rpc: str, token: str) -> list[str]:
    """Bring `token` to everything, rightly and wrongly; what was answered."""
    answers = []
    for value in (f"Bearer {token}", token, f"Basic {token}"):
        headers = {"Authorization": value, "X-Request-Id": value}
        with httpx.Client(base_url=f"http://{rest}", trust_env=False, timeout=WAIT_S) as http:
            for method, path in ROUTES:
                response = http.request(method, path, headers=headers, json={"vm": "ghost"})
                answers.append(f"{response.headers} {response.text}")
        with grpc.insecure_channel(rpc) as channel:
            for method in ("GetMigration", "CancelMigration"):
                call: Any = channel.unary_unary(f"/godwit.fleet.v1.MigrationService/{method}")
                metadata = (("authorization", value), ("x-request-id", value))
                with pytest.raises(grpc.RpcError) as refused:
                    call(b"", metadata=metadata, timeout=WAIT_S, wait_for_ready=True)
                answers.append(str(refused.value))
    return answers


def test_no_token_is_left_anywhere(tmp_path: Path) -> None:
    """Tokens that are good, that are unknown, and a JWT, brought to every kind of call."""
    written = tmp_path / "written"
    written.mkdir()
    good, line = new_token("alice", "operator")
    (tmp_path / "tokens").write_text(str(line))
    planted = [good, "gdw_planted-and-unknown", "eyJhbGciOiJub25lIn0.cGxhbnRlZA.c2ln"]
    answers: list[str] = []
    with (
        collecting() as (collector, port),
        orchestrator(written, tmp_path / "tokens", port) as (rest, rpc),
    ):
        for token in planted:
            answers += _ask(rest, rpc, token)
        deadline = time.monotonic() + WAIT_S
        while not collector.received and time.monotonic() < deadline:
            time.sleep(0.05)
    files = [path for path in written.rglob("*") if path.is_file()]
    assert {"log", "audit", "godwit.db"} <= {path.name for path in files}
    everything = b"\n".join(
        [*(path.read_bytes() for path in files), *collector.received, "".join(answers).encode()]
    )
    for known in (b"GetMigration refused", b'"reason": "VM_UNKNOWN"', b"godwit-orchestrator"):
        assert known in everything, "it was looked for in too little"
    for token in planted:
        assert token.encode() not in everything
