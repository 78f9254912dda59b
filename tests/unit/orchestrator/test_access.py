# SPDX-License-Identifier: Apache-2.0
"""Who may call an orchestrator, over real connections; what is written down, and what never."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from godwit.fleet.v1 import migration_service_pb2, migration_service_pb2_grpc

from services.common import grpc_client
from services.common.auth import access
from services.common.auth.tokens import new_token
from services.common.errors import GodwitError
from services.orchestrator.auth.settings import AuthSettings
from tests.harness.fake_agent import spec
from tests.harness.fake_fleet import VM, FakeFleet, eventually, fake_fleet

ROLES = ("viewer", "operator", "admin")


@dataclass(frozen=True, slots=True)
class Guarded:
    """A fleet whose orchestrator asks who calls."""

    fleet: FakeFleet
    tokens: dict[str, str]
    tokens_file: Path
    audit: Path

    def headers(self, role: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.tokens[role]}"} if role else {}

    async def ask(self, role: str, method: str, path: str, **more: Any) -> httpx.Response:
        headers = self.headers(role) | more.pop("headers", {})
        return await self.fleet.http.request(method, path, headers=headers, **more)

    def audited(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.audit.read_text().splitlines()]


@contextlib.asynccontextmanager
async def guarded_fleet(directory: Path) -> AsyncIterator[Guarded]:
    made = {role: new_token(f"a-{role}", role) for role in ROLES}
    tokens_file = directory / "tokens"
    tokens_file.write_text("".join(f"{line}\n" for _, line in made.values()))
    auth = AuthSettings(tokens_file=tokens_file, audit_log=directory / "audit")
    async with fake_fleet(directory, listening=True, auth=auth) as fleet:
        tokens = {role: token for role, (token, _) in made.items()}
        yield Guarded(fleet, tokens, tokens_file, directory / "audit")


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarded_fleet(tmp_path) as running:
        yield running


def assert_refused(response: httpx.Response, status: int, reason: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["reason"] == reason
    assert response.json()["hint"]
    assert ("www-authenticate" in response.headers) == (status == 401)


async def test_a_role_may_what_the_table_says(guarded: Guarded) -> None:
    assert_refused(await guarded.ask("", "GET", "/v1/vms"), 401, "UNAUTHENTICATED")
    assert (await guarded.ask("viewer", "GET", "/v1/vms")).status_code == 200
    body = {"vm": VM, "destination_node": "b"}
    refused = await guarded.ask("viewer", "POST", "/v1/migrations", json=body)
    assert_refused(refused, 403, "PERMISSION_DENIED")
    assert refused.json()["metadata"] == {"caller": "viewer a-viewer"}
    assert refused.json()["hint"] == "it takes operator or admin"
    moved = await guarded.ask("operator", "POST", "/v1/migrations", json=body)
    assert moved.status_code == 202
    migration_id = moved.json()["migration_id"]
    await guarded.fleet.ended(migration_id)
    path = f"/v1/migrations/{migration_id}:abandon"
    abandon = {"epoch": 2, "confirm": True}
    refused = await guarded.ask("operator", "POST", path, json=abandon)
    assert_refused(refused, 403, "PERMISSION_DENIED")
    assert (await guarded.ask("admin", "POST", path, json=abandon)).status_code == 409


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer",
        "Basic YTpi",
        "Bearer wrong",
        "gdw_x",
        "Bearer a.b.c",
        "Bearer " + "x" * 9000,
    ],
    ids=lambda text: text[:14],
)
async def test_what_is_no_token_is_no_anonymous_call(guarded: Guarded, authorization: str) -> None:
    for path in ("/v1/vms", "/v1/migrations/none"):
        response = await guarded.ask("", "GET", path, headers={"Authorization": authorization})
        assert_refused(response, 401, "UNAUTHENTICATED")


async def test_the_process_is_watched_without_a_token(guarded: Guarded) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"):
        assert (await guarded.ask("", "GET", path)).status_code == 200
    assert VM not in (await guarded.ask("", "GET", "/metrics")).text


async def test_a_stranger_is_refused_before_his_body_is_read(guarded: Guarded) -> None:
    """He is not told more about it than that either."""
    response = await guarded.ask("", "POST", "/v1/vms", content=b"{" * (2 << 20))
    assert_refused(response, 401, "UNAUTHENTICATED")


async def test_a_revoked_token_is_refused_within_a_second(guarded: Guarded) -> None:
    assert (await guarded.ask("viewer", "GET", "/v1/vms")).status_code == 200
    kept = [line for line in guarded.tokens_file.read_text().splitlines() if "viewer" not in line]
    guarded.tokens_file.write_text("\n".join(kept))

    async def refused() -> bool:
        return (await guarded.ask("viewer", "GET", "/v1/vms")).status_code == 401

    await eventually(refused)
    assert (await guarded.ask("admin", "GET", "/v1/vms")).status_code == 200


async def test_grpc_asks_the_same(guarded: Guarded) -> None:
    request = migration_service_pb2.BreakGlassRequest(migration_id="none")
    expected = {
        "": "UNAUTHENTICATED",
        "viewer": "PERMISSION_DENIED",
        "operator": "PERMISSION_DENIED",
    }
    async with grpc_client.open_channel(str(guarded.fleet.grpc)) as channel:
        stub = migration_service_pb2_grpc.MigrationServiceStub(channel)
        for role, reason in (expected | {"admin": "FIELD_INVALID"}).items():
            metadata = [(key.lower(), value) for key, value in guarded.headers(role).items()]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.BreakGlass(request, metadata=metadata)
            error: GodwitError = grpc_client.to_error(refused.value)
            assert error.reason == reason
            if role in expected:
                assert refused.value.code().name == reason
        watch = stub.WatchMigration(migration_service_pb2.WatchMigrationRequest(migration_id="x"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await watch.read()
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        await grpc_client.beat(channel, timeout_s=5)


async def test_each_change_is_written_down_also_if_it_was_refused(guarded: Guarded) -> None:
    body = {"vm": VM, "destination_node": "b"}
    await guarded.ask("", "POST", "/v1/migrations", json=body)
    await guarded.ask("viewer", "POST", "/v1/migrations", json=body)
    await guarded.ask("viewer", "GET", "/v1/migrations")
    moved = await guarded.ask(
        "operator", "POST", "/v1/migrations", json=body, headers={"X-Request-Id": "ticket-7"}
    )
    assert moved.headers["x-request-id"] == "ticket-7"
    await guarded.ask(
        "operator", "POST", "/v1/migrations", json={"vm": "ghost", "destination_node": "b"}
    )
    await guarded.ask("operator", "POST", "/v1/vms", json={"node": "b", "spec": spec("vm-2")})
    await guarded.ask("admin", "DELETE", "/v1/vms/ghost")
    async with grpc_client.open_channel(str(guarded.fleet.grpc)) as channel:
        stub = migration_service_pb2_grpc.MigrationServiceStub(channel)
        metadata = [(key.lower(), value) for key, value in guarded.headers("operator").items()]
        call = stub.CancelMigration(
            migration_service_pb2.CancelMigrationRequest(migration_id="none"), metadata=metadata
        )
        with pytest.raises(grpc.aio.AioRpcError):
            await call
    entries = [
        (each["identity"], each["method"], each["resource"], each["outcome"], each["reason"])
        for each in guarded.audited()
        if each["identity"] != "local"
    ]
    both = {"vm": VM, "destination_node": "b"}
    cancel = "godwit.fleet.v1.MigrationService/CancelMigration"
    assert entries == [
        ("", "POST /v1/migrations", {}, "refused", "UNAUTHENTICATED"),
        ("a-viewer", "POST /v1/migrations", both, "refused", "PERMISSION_DENIED"),
        ("a-operator", "POST /v1/migrations", both, "ok", ""),
        ("a-operator", "POST /v1/migrations", both | {"vm": "ghost"}, "refused", "VM_UNKNOWN"),
        ("a-operator", "POST /v1/vms", {"node": "b"}, "ok", ""),
        ("a-admin", "DELETE /v1/vms/{vm}", {"vm": "ghost"}, "refused", "VM_UNKNOWN"),
        ("a-operator", cancel, {"migration_id": "none"}, "refused", "MIGRATION_UNKNOWN"),
    ]
    ids = [each["request_id"] for each in guarded.audited()]
    assert "ticket-7" in ids
    assert len(set(ids)) == len(ids)


async def test_who_gave_a_guest_up_is_who_was_recognised(guarded: Guarded) -> None:
    """Not whoever he says he is."""
    gate = guarded.fleet.b.hold("PrepareDestination")
    migration_id = await guarded.fleet.migrate()
    await gate.reached.wait()
    body = {"epoch": 9, "fenced_vm_id": VM, "operator": "the boss", "because": "x"}
    path = f"/v1/migrations/{migration_id}:break-glass"
    assert (await guarded.ask("admin", "POST", path, json=body)).status_code == 409
    gate.opened.set()
    [line] = [each for each in guarded.audited() if "break-glass" in each["method"]]
    assert (line["identity"], line["resource"]["operator"]) == ("a-admin", "the boss")


async def test_one_caller_does_not_take_every_place(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "OWN_WATCHER_COUNT_MAX", 1)
    guarded.fleet.b.fetching.clear()
    migration_id = await guarded.fleet.migrate()
    path = f"/v1/migrations/{migration_id}/events"
    http = guarded.fleet.http
    async with http.stream("GET", path, headers=guarded.headers("viewer")) as stream:
        assert stream.status_code == 200
        refused = await guarded.ask("viewer", "GET", path)
        assert (refused.status_code, refused.json()["reason"]) == (429, "TOO_MANY_WATCHERS")
        async with http.stream("GET", path, headers=guarded.headers("operator")) as another:
            assert another.status_code == 200
    guarded.fleet.b.fetching.set()
    await guarded.fleet.ended(migration_id)
