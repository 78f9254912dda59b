# SPDX-License-Identifier: Apache-2.0
"""The chart's objects at a real API server, and what its accounts may there."""

from __future__ import annotations

import datetime as dt
import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import UnavailableError
from services.node_keeper.condition import TYPE, Condition, NodeStatus
from services.node_keeper.dependence import Dependence, Why
from tests.harness import helm
from tests.harness.chart_accounts import NAMESPACE, allowed, apply, create, token_of
from tests.harness.chart_values import MATRIX, WEBHOOK
from tests.harness.helm_release import Release
from tests.harness.kube import ApiServer, RefusedError
from tests.harness.kubelet import wait_for

pytestmark = pytest.mark.requires("kube")

NOT_SERVED = frozenset(
    {"Certificate", "ServiceMonitor", "PodMonitor", "PrometheusRule"}
    | {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
)
"""Other projects' kinds, and what a core of 1.20 has not."""
NEWER = frozenset({"appArmorProfile", "ttlSecondsAfterFinished"})
"""Fields that a core of 1.20 drops: of a later release, or not yet for everybody."""


@pytest.fixture(scope="module")
def server(kube_with_crds: ApiServer) -> ApiServer:
    create(kube_with_crds, {"kind": "Namespace", "metadata": {"name": NAMESPACE}})
    return kube_with_crds


def _dropped(sent: Any, stored: Any, path: str = "") -> list[str]:
    """Fields that the server does not know: it drops them without a word."""
    if isinstance(sent, dict):
        if not isinstance(stored, dict):
            return [path]
        return [
            each
            for key, value in sent.items()
            if key not in NEWER and value not in ({}, [], None, "", False, 0)
            for each in (
                _dropped(value, stored[key], f"{path}.{key}")
                if key in stored
                else [f"{path}.{key}"]
            )
        ]
    if isinstance(sent, list):
        if not isinstance(stored, list) or len(sent) != len(stored):
            return [path]
        return [
            each
            for index, value in enumerate(sent)
            for each in _dropped(value, stored[index], f"{path}[{index}]")
        ]
    return []


@pytest.mark.parametrize("name", MATRIX)
def test_the_api_server_takes_every_object(server: ApiServer, name: str) -> None:
    """Each is created in a dry run; no field of it is one that the server has never heard of."""
    taken = 0
    for sent in helm.render(MATRIX[name], name=f"dry-{name}"[:30].rstrip("-"), namespace=NAMESPACE):
        if sent["kind"] in NOT_SERVED:
            continue
        if sent["kind"] == "CustomResourceDefinition":
            # They are there: the same name cannot be created, and their fields must be known.
            path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
            stored = server.request("GET", f"{path}/{sent['metadata']['name']}")
            assert _dropped(sent["spec"], stored["spec"]) == []
            continue
        stored = create(server, sent, dry_run=True)
        assert _dropped(sent, stored) == [], f"{sent['kind']}/{sent['metadata']['name']}"
        taken += 1
    assert taken > 10


ORCHESTRATOR = {
    "": {
        "godwit.io/vmmigrations": "create delete list patch watch",
        "godwit.io/vmmigrations/status": "patch",
        "godwit.io/nodedrains": "create delete list patch watch",
        "godwit.io/nodedrains/status": "patch",
        "pods": "create delete list watch",
        "persistentvolumeclaims": "get",
        "nodes": "list watch",
        "policy/poddisruptionbudgets": "create delete get patch",
        "events.k8s.io/events": "create",
    },
    # In its own namespace, besides.
    NAMESPACE: {"coordination.k8s.io/leases": "create"},
}
NODE: dict[str, dict[str, str]] = {"": {"nodes": "get", "nodes/status": "patch"}, NAMESPACE: {}}
CERTIFICATES = {"": {"nodes": "list"}, NAMESPACE: {"secrets": "create"}}


@pytest.fixture(scope="module")
def accounts(server: ApiServer) -> ApiServer:
    """The accounts and their roles, as the chart makes them."""
    kinds = {"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    apply(
        server,
        [each for each in helm.render(WEBHOOK, namespace=NAMESPACE) if each["kind"] in kinds],
    )
    create(
        server,
        {"kind": "ServiceAccount", "metadata": {"name": "nobody", "namespace": NAMESPACE}},
    )
    return server


@pytest.mark.parametrize(
    ("account", "wanted"),
    [
        ("gw-godwit-orchestrator", ORCHESTRATOR),
        ("gw-godwit-node", NODE),
        ("gw-godwit-certificates", CERTIFICATES),
    ],
)
def test_an_account_may_what_it_needs_and_nothing_else(
    accounts: ApiServer, account: str, wanted: dict[str, dict[str, str]]
) -> None:
    """Every verb on every resource that the server has, asked of its authorizer."""
    for namespace in (NAMESPACE, "default"):
        everywhere = {key: set(verbs.split()) for key, verbs in wanted[""].items()}
        if namespace == NAMESPACE:
            everywhere |= {key: set(verbs.split()) for key, verbs in wanted[NAMESPACE].items()}
        free = allowed(accounts, "nobody", namespace)
        assert (
            allowed(accounts, account, namespace)
            == {(key, verb) for key, verbs in everywhere.items() for verb in verbs} | free
        ), namespace


def test_by_name_an_account_may_touch_its_own_alone(accounts: ApiServer) -> None:
    def may(account: str, verb: str, group: str, resource: str, name: str) -> bool:
        attributes = {
            "namespace": NAMESPACE,
            "verb": verb,
            "group": group,
            "resource": resource,
            "name": name,
        }
        answer = create(
            accounts,
            {
                "kind": "SubjectAccessReview",
                "metadata": {},
                "spec": {
                    "user": f"system:serviceaccount:{NAMESPACE}:{account}",
                    "resourceAttributes": attributes,
                },
            },
        )
        return bool(answer["status"]["allowed"])

    orchestrator, certificates = "gw-godwit-orchestrator", "gw-godwit-certificates"
    for verb in ("get", "patch"):
        assert may(orchestrator, verb, "coordination.k8s.io", "leases", "godwit-controller")
        assert not may(orchestrator, verb, "coordination.k8s.io", "leases", "kube-scheduler")
    hooks = "validatingwebhookconfigurations"
    for secret in ("authority", "orchestrator-tls", "viewer-tls", "nodes-tls"):
        for verb in ("get", "update"):
            assert may(certificates, verb, "", "secrets", f"gw-godwit-{secret}")
            assert not may(orchestrator, verb, "", "secrets", f"gw-godwit-{secret}")
            assert not may("gw-godwit-node", verb, "", "secrets", f"gw-godwit-{secret}")
    assert not may(certificates, "get", "", "secrets", "db-password")
    for verb in ("get", "patch"):
        group = "admissionregistration.k8s.io"
        assert may(certificates, verb, group, hooks, "gw-godwit-eviction")
        assert not may(certificates, verb, group, hooks, "somebody-elses")


def test_a_node_tells_what_it_retains(accounts: ApiServer) -> None:
    """With its own account; others' conditions stay, and it may write nothing else of a node."""
    name = "node.with.dots"
    create(accounts, {"kind": "Node", "metadata": {"name": name}})
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": ""}
    path = f"/api/v1/nodes/{name}"
    accounts.request(
        "PATCH",
        f"{path}/status",
        {"status": {"conditions": [ready]}},
        media="application/strategic-merge-patch+json",
    )
    account_dir = accounts.directory / "keeper"
    account_dir.mkdir()
    (account_dir / "token").write_text(token_of(accounts, "gw-godwit-node"))
    (account_dir / "ca.crt").write_bytes((accounts.directory / "ca.crt").read_bytes())

    def conditions() -> dict[str, Any]:
        found = accounts.request("GET", path)["status"]["conditions"]
        return {each["type"]: each for each in found}

    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    status = NodeStatus(url=accounts.url, node=name, account_dir=account_dir)
    kept = [Dependence(vm_id="web-1", why=Why.RETAINED, size_bytes=1 << 30)]
    status.tell(Condition.of(kept), start)
    told = conditions()
    assert told["Ready"]["reason"] == "KubeletReady"
    assert (told[TYPE]["status"], told[TYPE]["reason"]) == ("True", "MemoryRetained")
    assert "web-1 (retained, 1024 MiB)" in told[TYPE]["message"]
    # Another keeper, after a restart, does not pretend that it has just begun.
    again = NodeStatus(url=accounts.url, node=name, account_dir=account_dir)
    again.tell(Condition.of(kept), start + dt.timedelta(hours=1))
    assert conditions()[TYPE]["lastTransitionTime"] == "2026-01-01T00:00:00Z"
    assert conditions()[TYPE]["lastHeartbeatTime"] == "2026-01-01T01:00:00Z"
    again.tell(Condition.of([]), start + dt.timedelta(hours=2))
    assert conditions()[TYPE]["status"] == "False"
    assert conditions()[TYPE]["lastTransitionTime"] == "2026-01-01T02:00:00Z"
    (account_dir / "token").write_text(token_of(accounts, "nobody"))
    with pytest.raises(UnavailableError, match="403"):
        again.tell(Condition.of(kept), start)


def test_helm_installs_and_does_not_uninstall_under_guests(
    server: ApiServer, tmp_path: Path
) -> None:
    """A real Helm; this test is the Job controller that says how the hook ended."""
    release = Release.copy(tmp_path, server, name="real", namespace="released")
    create(server, {"kind": "Namespace", "metadata": {"name": "released"}})
    # Their definitions are there already, and belong to no release.
    values = {"crds": {"install": False}, "node": {"condition": {"restrict": False}}}
    release.install(values)
    deployment = "/apis/apps/v1/namespaces/released/deployments/real-godwit-orchestrator"
    claim = "/api/v1/namespaces/released/persistentvolumeclaims/real-godwit-orchestrator-store"
    assert server.request("GET", deployment)["spec"]["replicas"] == 1
    release.upgrade({**values, "auth": {"tokensSecret": "tokens"}})
    assert "--tokens-file=" in json.dumps(server.request("GET", deployment))

    refused = release.uninstall(hook_succeeds=False)
    assert "real-godwit-uninstall" in refused or "failed" in refused, refused
    assert server.request("GET", deployment)["kind"] == "Deployment", "nothing was removed"

    assert release.uninstall(hook_succeeds=True) == ""
    wait_for(lambda: _is_gone(server, deployment), "the deployment is gone")
    assert server.request("GET", claim)["kind"] == "PersistentVolumeClaim", "the store is kept"


def _is_gone(server: ApiServer, path: str) -> bool:
    try:
        server.request("GET", path)
    except RefusedError as error:
        return error.status == HTTPStatus.NOT_FOUND
    return False
