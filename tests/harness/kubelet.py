# SPDX-License-Identifier: Apache-2.0
"""What no controller and no kubelet of a bare API server does: nodes, and pods that become ready.

It starts nothing: a pod is an object here; the guest beside it is a process of the fleet's agent.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.harness.kube import ApiServer, RefusedError

CRDS = Path(__file__).parents[2] / "deploy/helm/godwit/crds"
_LOOK_S = 0.1
Object = dict[str, Any]


def install_crds(server: ApiServer) -> None:
    """Ours, and wait until they are served."""
    for path in sorted(CRDS.glob("*.yaml")):
        definition = yaml.safe_load(path.read_text())
        server.request(
            "POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition
        )
    for plural in ("vmmigrations", "nodedrains"):
        wait_for(lambda plural=plural: _served(server, plural), f"{plural} are served")  # type: ignore[misc]


def _served(server: ApiServer, plural: str) -> bool:
    with contextlib.suppress(RefusedError):
        server.request("GET", f"/apis/godwit.io/v1alpha1/{plural}")
        return True
    return False


def wait_for(true: Callable[[], Any], what: str, *, s: float = 60.0) -> Any:
    """Return what `true` returns once that is true; the test fails if it never is."""
    done = threading.Event()
    for _ in range(int(s / 0.05)):
        if found := true():
            return found
        done.wait(0.05)
    raise AssertionError(f"never: {what}")


def make_node(server: ApiServer, name: str, labels: dict[str, str] | None = None) -> None:
    """A node that is ready."""
    names = {"kubernetes.io/hostname": name, **(labels or {})}
    server.request("POST", "/api/v1/nodes", {"metadata": {"name": name, "labels": names}})
    # Admission has tainted it as not ready; its controller would take that away.
    server.request(
        "PATCH",
        f"/api/v1/nodes/{name}",
        {"spec": {"taints": None}},
        media="application/merge-patch+json",
    )


def make_vm_pod(server: ApiServer, vm_id: str, node: str, **spec: Any) -> Object:
    """The pod that stands for a VM on a node."""
    body = {
        "metadata": {"name": vm_id, "labels": {"godwit.io/vm": vm_id}},
        "spec": {
            "nodeName": node,
            "containers": [
                {
                    "name": "vmm",
                    "image": "registry.example/vmm:1",
                    "resources": {"requests": {"memory": "64Mi"}},
                }
            ],
            **spec,
        },
    }
    made: Object = server.request("POST", "/api/v1/namespaces/default/pods", body)
    return made


class Kubelet:
    """Of all nodes. `holding`: names of nodes on which no pod becomes ready."""

    def __init__(self, server: ApiServer) -> None:
        self._server = server
        self.holding: set[str] = set()
        self.started: list[tuple[str, str]] = []
        """(node, pod), in the order in which they became ready."""
        self.ended: list[tuple[str, str]] = []
        self._stop = threading.Event()

    def run(self) -> None:
        """Until stopped."""
        while not self._stop.wait(_LOOK_S):
            for pod in self._server.request("GET", "/api/v1/pods")["items"]:
                with contextlib.suppress(RefusedError):
                    self._look(pod)

    def stop(self) -> None:
        """Not any more."""
        self._stop.set()

    def _look(self, pod: Object) -> None:
        metadata, node = pod["metadata"], pod["spec"].get("nodeName", "")
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        if "deletionTimestamp" in metadata:
            self._server.request("DELETE", path, {"gracePeriodSeconds": 0})
            self.ended.append((node, metadata["name"]))
        elif node and node not in self.holding and not _is_ready(pod):
            status = {
                "phase": "Running",
                "podIP": "127.0.0.1",
                "conditions": [{"type": "Ready", "status": "True"}],
            }
            self._server.request(
                "PATCH", f"{path}/status", {"status": status}, media="application/merge-patch+json"
            )
            self.started.append((node, metadata["name"]))


def _is_ready(pod: Object) -> bool:
    return any(
        each["type"] == "Ready" and each["status"] == "True"
        for each in pod.get("status", {}).get("conditions", ())
    )


@contextlib.contextmanager
def kubelet(server: ApiServer) -> Iterator[Kubelet]:
    """One for the length of the block."""
    made = Kubelet(server)
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.stop()
        thread.join()
