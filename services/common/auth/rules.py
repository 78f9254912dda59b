# SPDX-License-Identifier: Apache-2.0
"""The one table of who may call what. What is not in it cannot be called.

docs/api-access.md shows it; tests/unit/test_rules.py compares it with every proto and with
every route, and tests/unit/auth/test_matrix.py tries each row with each kind of credential.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from services.common.auth.identity import Caller, at_least

ANYBODY: frozenset[Caller] = frozenset()
VIEWER = at_least(Caller.VIEWER)
OPERATOR = at_least(Caller.OPERATOR)
ADMIN = at_least(Caller.ADMIN)
NODE = frozenset({Caller.NODE})
ORCHESTRATOR = frozenset({Caller.ORCHESTRATOR})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Who may do one thing, by whichever way it is asked for."""

    rpc: str = ""
    """package.Service/Method; empty: REST only."""
    route: str = ""
    """METHOD /path/{part}; empty: gRPC only."""
    callers: frozenset[Caller]
    """Who may. ANYBODY: also whoever has not said who he is."""
    own: str = ""
    """Field of the request that must be the caller's own name where the caller is a node; "." is
    the server's own node."""
    mutates: bool = False
    """It changes something: it is written into the audit log, also where it is refused."""
    names: tuple[str, ...] = ()
    """Fields of the request, or parts of the path, that say what it changes."""
    repeats: bool = False
    """Asked again and again by machines: only what differs from the last is written down."""
    watches: bool = False
    """Its answers come as long as the caller listens: how many there are at once is limited."""
    rescue: bool = False
    """A guest may wait for it: it is done even where the audit log cannot be written."""
    native: bool = False
    """Served by the C core, which asks for certificates and tokens of its own."""


_FLEET = "godwit.fleet.v1"
_AGENT = "godwit.agent.v1.FaultAgentService"
_PAGE = "godwit.page.v1"


def _agent(method: str, callers: frozenset[Caller] = ORCHESTRATOR) -> Rule:
    # Not written down once more here: whoever had the orchestrator order it is in its audit log.
    return Rule(rpc=f"{_AGENT}/{method}", callers=callers)


def _migration(method: str, route: str, callers: frozenset[Caller]) -> Rule:
    return Rule(rpc=f"{_FLEET}.MigrationService/{method}", route=route, callers=callers)


def _schedule(method: str, route: str, *names: str, rescue: bool = False) -> Rule:
    """Of the queue, limits, policies and placement; with `names` it changes something."""
    return Rule(
        rpc=f"{_FLEET}.ScheduleService/{method}",
        route=route,
        callers=OPERATOR if names else VIEWER,
        mutates=bool(names),
        names=names,
        rescue=rescue,
    )


def _operation(method: str, route: str, *names: str, rescue: bool = False) -> Rule:
    """Of drains and the like; with `names` it changes something."""
    return Rule(
        rpc=f"{_FLEET}.OperationService/{method}",
        route=route,
        callers=OPERATOR if names else VIEWER,
        mutates=bool(names),
        names=names,
        rescue=rescue,
    )


RULES: tuple[Rule, ...] = (
    # Nodes
    Rule(rpc=f"{_FLEET}.NodeService/ListNodes", route="GET /v1/nodes", callers=VIEWER),
    Rule(rpc=f"{_FLEET}.NodeService/GetNode", route="GET /v1/nodes/{name}", callers=VIEWER),
    Rule(
        rpc=f"{_FLEET}.NodeService/RegisterNode",
        route="POST /v1/nodes",
        callers=OPERATOR | NODE,
        own="name",
        mutates=True,
        names=("name", "agent_address"),
        repeats=True,
        rescue=True,
    ),
    # VMs
    Rule(rpc=f"{_FLEET}.VmService/ListVms", route="GET /v1/vms", callers=VIEWER),
    Rule(rpc=f"{_FLEET}.VmService/GetVm", route="GET /v1/vms/{vm}", callers=VIEWER),
    Rule(
        rpc=f"{_FLEET}.VmService/GetUserfaultBitmap",
        route="GET /v1/vms/{vm}/userfault-bitmap",
        callers=VIEWER,
    ),
    Rule(
        rpc=f"{_FLEET}.VmService/GetResidency",
        route="GET /v1/vms/{vm}/residency",
        callers=VIEWER,
    ),
    Rule(
        rpc=f"{_FLEET}.VmService/StartVm",
        route="POST /v1/vms",
        callers=OPERATOR,
        mutates=True,
        names=("node", "vm_id"),
    ),
    Rule(
        rpc=f"{_FLEET}.VmService/StopVm",
        route="DELETE /v1/vms/{vm}",
        callers=OPERATOR,
        mutates=True,
        names=("vm", "vm_id"),
    ),
    # Migrations
    _migration("ListMigrations", "GET /v1/migrations", VIEWER),
    _migration("GetMigration", "GET /v1/migrations/{migration_id}", VIEWER),
    Rule(
        rpc=f"{_FLEET}.MigrationService/WatchMigration",
        route="GET /v1/migrations/{migration_id}/events",
        callers=VIEWER,
        watches=True,
    ),
    Rule(
        rpc=f"{_FLEET}.MigrationService/CreateMigration",
        route="POST /v1/migrations",
        callers=OPERATOR,
        mutates=True,
        names=("vm", "vm_id", "destination_node"),
    ),
    Rule(
        rpc=f"{_FLEET}.MigrationService/CancelMigration",
        route="POST /v1/migrations/{migration_id}:cancel",
        callers=OPERATOR,
        mutates=True,
        names=("migration_id",),
        rescue=True,
    ),
    Rule(
        rpc=f"{_FLEET}.MigrationService/RecoverMigration",
        route="POST /v1/migrations/{migration_id}:recover",
        callers=OPERATOR,
        mutates=True,
        names=("migration_id",),
        rescue=True,
    ),
    Rule(
        rpc=f"{_FLEET}.MigrationService/AbandonMigration",
        route="POST /v1/migrations/{migration_id}:abandon",
        callers=ADMIN,
        mutates=True,
        names=("migration_id", "epoch", "confirm"),
    ),
    Rule(
        rpc=f"{_FLEET}.MigrationService/BreakGlass",
        route="POST /v1/migrations/{migration_id}:break-glass",
        callers=ADMIN,
        mutates=True,
        names=("migration_id", "epoch", "fenced_vm_id", "operator", "because"),
    ),
    # Queue, limits, policies, placement
    _schedule("GetQueue", "GET /v1/queue"),
    _schedule("FreezeAdmissions", "POST /v1/queue:freeze", "because", rescue=True),
    _schedule("ThawAdmissions", "POST /v1/queue:thaw", "because", rescue=True),
    _schedule("GetLimits", "GET /v1/limits"),
    _schedule("SetLimits", "PATCH /v1/limits", "values", "remove"),
    _schedule("ListPolicies", "GET /v1/policies"),
    _schedule("PutPolicy", "PUT /v1/policies/{name}", "name"),
    _schedule("DeletePolicy", "DELETE /v1/policies/{name}", "name"),
    _schedule("SetNodePlacement", "PUT /v1/nodes/{name}/placement", "name", "labels", "taints"),
    _schedule("SetVmPlacement", "PUT /v1/vms/{vm}/placement", "vm", "vm_id", "labels"),
    # Operations
    _operation("DrainNode", "POST /v1/nodes/{node}:drain", "node"),
    _operation("UndrainNode", "POST /v1/nodes/{node}:undrain", "node", "no_return"),
    _operation("Rebalance", "POST /v1/operations:rebalance", "spread_max"),
    _operation("MoveBatch", "POST /v1/operations:batch", "vms", "vm_ids", "destination_node"),
    _operation("ListOperations", "GET /v1/operations"),
    _operation("GetOperation", "GET /v1/operations/{operation_id}"),
    _operation("ListOperationVms", "GET /v1/operations/{operation_id}/vms"),
    _operation(
        "CancelOperation",
        "POST /v1/operations/{operation_id}:cancel",
        "operation_id",
        rescue=True,
    ),
    _operation("PauseOperation", "POST /v1/operations/{operation_id}:pause", "operation_id"),
    _operation("ResumeOperation", "POST /v1/operations/{operation_id}:resume", "operation_id"),
    Rule(
        rpc=f"{_FLEET}.OperationService/WatchOperation",
        route="GET /v1/operations/{operation_id}/events",
        callers=VIEWER,
        watches=True,
    ),
    # Events
    Rule(
        rpc=f"{_FLEET}.EventService/WatchEvents",
        route="GET /v1/events",
        callers=VIEWER,
        watches=True,
    ),
    # The process itself: neither guests nor people are named there
    Rule(route="GET /healthz", callers=ANYBODY),
    Rule(route="GET /readyz", callers=ANYBODY),
    Rule(route="GET /metrics", callers=ANYBODY),
    Rule(route="GET /openapi.json", callers=ANYBODY),
    Rule(route="GET /docs", callers=ANYBODY),
    Rule(route="GET /docs/oauth2-redirect", callers=ANYBODY),
    Rule(route="GET /redoc", callers=ANYBODY),
    Rule(rpc="grpc.health.v1.Health/Check", callers=ANYBODY),
    Rule(rpc="grpc.health.v1.Health/Watch", callers=ANYBODY),
    Rule(rpc="grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", callers=ANYBODY),
    # Agents
    _agent("Hello"),
    _agent("ListVms"),
    _agent("Describe", ORCHESTRATOR | NODE),  # the source's agent asks before it pauses a guest
    _agent("Preflight"),
    _agent("StartVm"),
    _agent("StopVm"),
    _agent("Prepare"),
    _agent("Pause"),
    _agent("Resume"),
    _agent("TransferDeviceState"),
    _agent("LoadDeviceState", NODE),  # the source's agent brings it
    _agent("Activate"),
    _agent("Seal"),
    _agent("Abort"),
    _agent("Recall"),
    _agent("Release"),
    _agent("WatchProgress"),
    # Page servers
    Rule(rpc=f"{_PAGE}.ImageAdminService/ReloadImages", callers=NODE, own="."),
    Rule(rpc=f"{_PAGE}.PageService/DescribeImage", callers=NODE, native=True),
    Rule(rpc=f"{_PAGE}.PageService/Fetch", callers=NODE, native=True),
)

BY_RPC: Mapping[str, Rule] = {rule.rpc: rule for rule in RULES if rule.rpc}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A rule's way through REST."""

    method: str
    pattern: re.Pattern[str]
    rule: Rule


def _route(rule: Rule) -> Route:
    # No part of a path has a colon: what follows one is a verb, which is a path of its own.
    method, _, path = rule.route.partition(" ")
    parts = re.split(r"\{(\w+)\}", path)
    pattern = "".join(
        f"(?P<{part}>[^/:]+)" if index % 2 else re.escape(part) for index, part in enumerate(parts)
    )
    return Route(method=method, pattern=re.compile(pattern), rule=rule)


ROUTES: tuple[Route, ...] = tuple(_route(rule) for rule in RULES if rule.route)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What REST may be asked under a path."""

    rule: Rule | None
    """None: nothing by this method."""
    parts: Mapping[str, str]
    """Of the path, by name."""
    methods: tuple[str, ...]
    """By which this path may be asked for; empty: there is no such path."""


def find_route(method: str, path: str) -> Found:
    """The rule of a request."""
    methods = []
    for route in ROUTES:
        if match := route.pattern.fullmatch(path):
            if route.method == method:
                return Found(rule=route.rule, parts=match.groupdict(), methods=(method,))
            methods.append(route.method)
    return Found(rule=None, parts={}, methods=tuple(methods))
