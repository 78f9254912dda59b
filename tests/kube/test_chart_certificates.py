# SPDX-License-Identifier: Apache-2.0
"""`godwit certs cluster` at a real API server, with the account that the chart gives it."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.common.certificates import Kind
from services.common.tls import Certificates
from services.node_keeper.certificates import Copies
from tests.harness import helm
from tests.harness.chart_accounts import apply, create, token_of
from tests.harness.chart_values import WEBHOOK
from tests.harness.kube import ApiServer

pytestmark = pytest.mark.requires("kube")

NAMESPACE = "certificates"


@pytest.fixture(scope="module")
def arguments(kube_with_crds: ApiServer) -> list[str]:
    """The Job's own, and a kubeconfig of its account for the pod's token."""
    server = kube_with_crds
    create(server, {"kind": "Namespace", "metadata": {"name": NAMESPACE}})
    objects = helm.render(WEBHOOK, name="cc", namespace=NAMESPACE)
    kinds = {"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    kinds.add("ValidatingWebhookConfiguration")
    apply(server, [each for each in objects if each["kind"] in kinds])
    job = helm.find(objects, "Job", "cc-godwit-certificates-1")["spec"]["template"]["spec"]
    (container,) = job["containers"]
    account = server.directory / "certificates.kubeconfig"
    token = token_of(server, job["serviceAccountName"], NAMESPACE)
    server.write_kubeconfig(account, {"token": token})
    return [*container["command"][1:], *container["args"], f"--kubeconfig={account}"]


def _run(arguments: list[str]) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("godwit")), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _files(server: ApiServer, secret: str, where: Path) -> Path:
    """A Secret as the kubelet mounts it."""
    found = server.request("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/cc-godwit-{secret}")
    where.mkdir()
    for name, text in found["data"].items():
        (where / name).write_bytes(base64.b64decode(text))
    return where


def test_a_cluster_gets_its_certificates_and_keeps_them(
    kube_with_crds: ApiServer, arguments: list[str], tmp_path: Path
) -> None:
    """Made once; left alone; a node that comes gets one; the API server trusts the webhook."""
    server = kube_with_crds
    labels = {"kubernetes.io/os": "linux"}
    create(server, {"kind": "Node", "metadata": {"name": "cert-a", "labels": labels}})
    create(server, {"kind": "Node", "metadata": {"name": "cert.dots", "labels": labels}})
    create(server, {"kind": "Node", "metadata": {"name": "cert-w", "labels": {}}})
    said = _run(arguments)
    assert "authority made" in said
    assert "cert-a.node.godwit: made" in said
    assert "no certificate for node cert.dots" in said
    assert "cert-w" not in said, "it has not the label"
    assert "trusts the authority" in said
    orchestrator = Certificates(_files(server, "orchestrator-tls", tmp_path / "orchestrator"))
    orchestrator.require(Kind.ORCHESTRATOR)
    Certificates(_files(server, "viewer-tls", tmp_path / "viewer")).require(Kind.VIEWER, "chart")
    nodes = _files(server, "nodes-tls", tmp_path / "nodes")
    (tmp_path / "a").mkdir()
    copies = Copies(source=nodes, node="cert-a", target=tmp_path / "a")
    assert copies.copy() is True
    assert copies.copy() is False, "nothing has changed"
    Certificates(tmp_path / "a").require(Kind.NODE, "cert-a")
    hook = server.request(
        "GET",
        "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/cc-godwit-eviction",
    )["webhooks"][0]
    bundle = base64.b64decode(hook["clientConfig"]["caBundle"])
    assert bundle == (tmp_path / "orchestrator" / "ca.crt").read_bytes()
    authority = _files(server, "authority", tmp_path / "authority")
    assert (authority / "tls.key").read_bytes() not in b"".join(
        path.read_bytes() for path in nodes.iterdir()
    )

    assert "made" not in _run(arguments), "what is good is left alone"
    again = _files(server, "nodes-tls", tmp_path / "again")
    assert (again / "cert-a.key").read_bytes() == (nodes / "cert-a.key").read_bytes()

    create(server, {"kind": "Node", "metadata": {"name": "cert-b", "labels": labels}})
    said = _run(arguments)
    assert "cert-b.node.godwit: made" in said
    assert "cert-a.node.godwit" not in said
