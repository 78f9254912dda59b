# SPDX-License-Identifier: Apache-2.0
"""Evictions of a guest's pod: refused until its memory is elsewhere, and the guest is moved."""

from __future__ import annotations

import base64
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.harness.kube import ApiServer, RefusedError, free_port
from tests.harness.kube_fleet import PODS, World, fleet_in_cluster
from tests.harness.kubelet import Kubelet
from tests.harness.microvm import need_backend

pytestmark = [
    pytest.mark.requires("kube", "uffd"),
    pytest.mark.asyncio(loop_scope="module"),
]

BUDGETS = "/apis/policy/v1/namespaces/default/poddisruptionbudgets"
WEBHOOKS = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
NAME = "godwit-evictions"
MERGE = "application/merge-patch+json"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    kube_with_crds: ApiServer, kubelets: Kubelet, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    need_backend("thread", "uffd")
    server, port = kube_with_crds, free_port()
    tls_dir = tmp_path_factory.mktemp("webhook")
    # The server's own CA signs it: the registration below trusts that one alone.
    server.issue(tls_dir, "tls", "godwit-webhook")
    async with fleet_in_cluster(
        server,
        kubelets,
        tmp_path_factory.mktemp("kube") / "cluster",
        ("x", "y"),
        GODWIT_WEBHOOK=f"127.0.0.1:{port}",
        GODWIT_WEBHOOK_TLS_DIR=str(tls_dir),
    ) as made:
        await made.request("POST", WEBHOOKS, registration(server, port))
        yield made
        await made.request("DELETE", f"{WEBHOOKS}/{NAME}")


def registration(server: ApiServer, port: int) -> Any:
    """As the chart's, with a URL in place of a service."""
    trust = base64.b64encode((server.directory / "ca.crt").read_bytes()).decode()
    return {
        "metadata": {"name": NAME},
        "webhooks": [
            {
                "name": "evictions.godwit.io",
                "clientConfig": {"url": f"https://127.0.0.1:{port}/evictions", "caBundle": trust},
                "rules": [
                    {
                        "apiGroups": [""],
                        "apiVersions": ["v1"],
                        "resources": ["pods/eviction"],
                        "operations": ["CREATE"],
                    }
                ],
                "failurePolicy": "Ignore",
                "sideEffects": "NoneOnDryRun",
                "admissionReviewVersions": ["v1"],
                "timeoutSeconds": 10,
            }
        ],
    }


def answers(address: str) -> bool:
    """True if somebody listens there."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


async def evict(world: World, pod: str, **options: Any) -> RefusedError | None:
    """Evict a pod as `kubectl drain` does; None: it is allowed."""
    body = {
        "apiVersion": "policy/v1beta1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": "default"},
        **({"deleteOptions": options} if options else {}),
    }
    try:
        await world.request("POST", f"{PODS}/{pod}/eviction", body)
    except RefusedError as error:
        return error
    return None


async def test_a_guest_is_moved_before_its_pod_goes(world: World) -> None:
    await world.start("evicted", "x")
    await world.verify("evicted")
    # The controller knows the pod, and is asked.
    await world.until(lambda: world.find(f"{BUDGETS}/godwit-evicted"), "there is a budget")
    await world.until(lambda: answers(world.environment["GODWIT_WEBHOOK"]), "it is served")
    world.kubelet.holding.add("y")
    try:
        said = await evict(world, "evicted")
        assert said is not None
        assert said.status == 429
        assert "evicted runs on x; it is being moved" in said.message
        said = await evict(world, "evicted")
        assert said is not None
        assert "evicted moves: migration" in said.message
    finally:
        world.kubelet.holding.clear()
    await world.pods_of("evicted", "y")
    assert await world.where("evicted") == "y"
    await world.verify("evicted")


async def test_a_dry_run_moves_nothing(world: World) -> None:
    before = (await world.client.migrations(vm_id="evicted"))[0]
    (pod,) = await world.pods_of("evicted", "y")
    said = await evict(world, pod["metadata"]["name"], dryRun=["All"])
    assert said is not None
    assert said.status == 429
    assert (await world.client.migrations(vm_id="evicted"))[0] == before


async def test_other_pods_go_as_ever(world: World) -> None:
    container = {"name": "web", "image": "registry.example/web:1"}
    body = {"metadata": {"name": "web"}, "spec": {"nodeName": "x", "containers": [container]}}
    await world.request("POST", PODS, body)
    await world.until(lambda: world.find(f"{PODS}/web").get("status", {}).get("podIP"), "web runs")
    assert await evict(world, "web") is None


async def test_without_the_webhook_the_budget_refuses(world: World) -> None:
    """As a disruption controller would have filled it in: none may be disrupted."""
    webhook = world.find(f"{WEBHOOKS}/{NAME}")
    await world.request("DELETE", f"{WEBHOOKS}/{NAME}")
    try:
        path = f"{BUDGETS}/godwit-evicted"
        await world.until(lambda: world.find(path), "there is a budget")
        found = world.find(path)
        status = {
            "observedGeneration": found["metadata"].get("generation", 1),
            "disruptionsAllowed": 0,
            "currentHealthy": 1,
            "desiredHealthy": 1,
            "expectedPods": 1,
        }
        await world.request("PATCH", f"{path}/status", {"status": status}, media=MERGE)
        (pod,) = await world.pods_of("evicted", "y")
        said = await evict(world, pod["metadata"]["name"])
        assert said is not None
        assert said.status == 429
        assert "disruption budget" in said.message
    finally:
        await world.request("POST", WEBHOOKS, {**webhook, "metadata": {"name": NAME}})
