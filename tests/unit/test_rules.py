# SPDX-License-Identifier: Apache-2.0
"""The table of rules is whole: each RPC of each proto, each route of the application, once."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import godwit
import pytest
from google.protobuf.descriptor import FileDescriptor

from services.common.auth.identity import ROLES, Caller
from services.common.auth.rules import ADMIN, BY_RPC, RULES, find_route
from tests.harness import access_table
from tests.harness.fake_fleet import fake_fleet

NOT_OURS = ("grpc.health.v1.", "grpc.reflection.v1alpha.")


def _rpcs() -> dict[str, bool]:
    """Every RPC of our protos, and whether it streams requests.

    Not the kubelet's: those are spoken on unix sockets in a directory that is root's.
    """
    found = {}
    for module in pkgutil.walk_packages(godwit.__path__, "godwit."):
        if module.name.endswith("_pb2") and not module.name.startswith("godwit.kubelet."):
            descriptor: FileDescriptor = importlib.import_module(module.name).DESCRIPTOR
            for service in descriptor.services_by_name.values():
                for method in service.methods:
                    found[f"{service.full_name}/{method.name}"] = bool(method.client_streaming)
    return found


def test_each_rpc_has_its_rule_and_each_rule_its_rpc() -> None:
    rpcs = _rpcs()
    assert len(rpcs) > 30, "a walk that finds nothing proves nothing"
    ruled = {rpc for rpc in BY_RPC if not rpc.startswith(NOT_OURS)}
    assert ruled == set(rpcs), "add it to services/common/auth/rules.py"


async def test_each_route_has_its_rule_and_each_rule_its_route(tmp_path: Path) -> None:
    async with fake_fleet(tmp_path) as fleet:
        app = fleet.core.build_app()
        described = {
            f"{method.upper()} {path}"
            for path, methods in app.openapi()["paths"].items()
            for method in methods
        }
        # FastAPI's own pages, which do not describe themselves.
        plain = {
            f"GET {path}" for route in app.routes if (path := getattr(route, "path", "")) and path
        }
    assert {rule.route for rule in RULES if rule.route} == described | plain, (
        "add it to services/common/auth/rules.py"
    )


def test_nothing_is_in_it_twice() -> None:
    for key in ("rpc", "route"):
        named = [getattr(rule, key) for rule in RULES if getattr(rule, key)]
        assert len(named) == len(set(named))


def test_whoever_may_change_something_has_said_who_he_is() -> None:
    for rule in RULES:
        assert rule.callers or not rule.mutates
        assert not rule.mutates or rule.names, f"{rule.rpc}: the audit log would not say what"


def test_a_role_may_what_a_lesser_one_may() -> None:
    for rule in RULES:
        allowed = [role in rule.callers for role in ROLES]
        assert allowed == sorted(allowed), rule


@pytest.mark.parametrize("method", ["BreakGlass", "AbandonMigration"])
def test_what_may_cost_a_guest_takes_an_admin(method: str) -> None:
    assert BY_RPC[f"godwit.fleet.v1.MigrationService/{method}"].callers == ADMIN


def test_agents_and_page_servers_obey_no_person() -> None:
    for rpc, rule in BY_RPC.items():
        if rpc.startswith(("godwit.agent.", "godwit.page.")):
            assert rule.callers <= {Caller.NODE, Caller.ORCHESTRATOR}
            # Asked by an orchestrator, and by the source's agent before it pauses a guest.
            assert len(rule.callers) == (2 if rpc.endswith("/Describe") else 1)


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("GET", "/v1/vms/a", "GET /v1/vms/{vm}"),
        ("POST", "/v1/migrations/m:cancel", "POST /v1/migrations/{migration_id}:cancel"),
        ("GET", "/v1/migrations/m:cancel", ""),
        ("GET", "/v1/vms/a/b", ""),
        ("GET", "/v1/vms/", ""),
        ("GET", "/v1/vms\n", ""),
        ("GET", "//v1/vms", ""),
        ("PUT", "/v1/vms/a", ""),
        ("POST", "/v1/migrations/m:explode", ""),
        ("GET", "/healthz/", ""),
        ("get", "/healthz", ""),
    ],
)
def test_a_path_finds_its_rule(method: str, path: str, route: str) -> None:
    found = find_route(method, path)
    assert (found.rule.route if found.rule else "") == route


def test_the_tables_in_the_document_are_these() -> None:
    assert access_table.DOCUMENT.read_text() == access_table.expected(), (
        "run `python -m tests.harness.access_table`"
    )
    for way, named in (("REST", "route"), ("gRPC", "rpc")):
        calls = {call for call, _ in access_table.documented(way)}
        assert calls == {name for rule in RULES if (name := getattr(rule, named))}
