# SPDX-License-Identifier: Apache-2.0
"""The chart renders for every way to install it, and gives nobody more than he needs."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

import pytest

from tests.harness import helm
from tests.harness.chart_values import EXISTING, MATRIX, MONITORED, POSTGRESQL, WEBHOOK
from tests.harness.helm import containers, find, pods
from tests.harness.pod_security import beyond_baseline, beyond_restricted

CLUSTER_KINDS = frozenset(
    {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}
    | {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
    | {"ValidatingWebhookConfiguration"}
)

matrix = pytest.mark.parametrize("name", MATRIX)


@functools.cache
def rendered(name: str) -> list[helm.Object]:
    """Of the matrix. Nobody changes it."""
    return helm.render(MATRIX[name])


def test_the_matrix_is_wide() -> None:
    assert len(MATRIX) >= 12


@matrix
def test_lint_finds_nothing(name: str) -> None:
    assert helm.lint(MATRIX[name]) == []


@matrix
def test_objects_are_whole_and_told_apart(name: str) -> None:
    objects = rendered(name)
    names = Counter(
        (each["kind"], each["metadata"].get("namespace", ""), each["metadata"]["name"])
        for each in objects
    )
    assert max(names.values()) == 1, names
    for each in objects:
        labels = each["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "gw", each["metadata"]["name"]
        assert labels["app.kubernetes.io/part-of"] == "godwit"
        assert labels["helm.sh/chart"].startswith("godwit-")
        namespace = each["metadata"].get("namespace")
        assert (namespace is None) == (each["kind"] in CLUSTER_KINDS), each["metadata"]["name"]
        for long in re.findall(r"[^ ]{64,}", each["metadata"]["name"]):
            pytest.fail(f"{long} is longer than a label may be")


@matrix
def test_every_pod_is_admitted_at_the_level_that_the_notes_say(name: str) -> None:
    """All but the node's two are within `restricted`; those exceed `baseline` by hostPath alone."""
    node = MATRIX[name].get("node", {})
    for owner, pod in pods(rendered(name)):
        if not owner.startswith("DaemonSet/"):
            assert beyond_restricted(pod) == [], owner
            continue
        more = [each for each in beyond_baseline(pod) if not each.startswith("hostPath ")]
        injection = node.get("agent", {}).get("injection", {})
        asked = []
        if not owner.endswith("plugin"):
            asked += ["hostNetwork"] * bool(node.get("hostNetwork"))
            asked += ["hostPID"] * bool(injection.get("enabled") and injection.get("hostPID", True))
            if node.get("agent", {}).get("networkTaps", {}).get("enabled"):
                asked.append("fault-agent: NET_ADMIN")
            if injection.get("enabled"):
                asked += ["fault-agent: SYS_PTRACE", "fault-agent: AppArmor unconfined"]
        assert more == asked, owner


@matrix
def test_containers_are_confined(name: str) -> None:
    """No privileged container; roots are read-only; nobody can gain what it was not given."""
    for owner, pod in pods(rendered(name)):
        for container in containers(pod):
            context = container["securityContext"]
            where = f"{owner} {container['name']}"
            assert not context.get("privileged"), where
            assert context["readOnlyRootFilesystem"] is True, where
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["capabilities"]["drop"] == ["ALL"], where
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}, where
            assert "cpu" not in container["resources"].get("limits", {}), f"{where} is throttled"


@matrix
def test_tokens_are_where_they_are_used(name: str) -> None:
    """Only the controller and the certificates' Job have one; of the node's pod, the keeper."""
    controller = MATRIX[name].get("orchestrator", {}).get("controller", {}).get("enabled", True)
    for owner, pod in pods(rendered(name)):
        wanted = "certificates" in owner or ("orchestrator" in owner and controller)
        assert pod["automountServiceAccountToken"] is wanted, owner
        for container in containers(pod):
            mounts = [each["mountPath"] for each in container.get("volumeMounts", [])]
            has = any("serviceaccount" in path for path in mounts)
            assert has <= (container["name"] == "keeper"), f"{owner} {container['name']}"


@matrix
def test_no_account_is_an_administrator(name: str) -> None:
    """No wildcard, no cluster-admin, nothing that would make more of itself."""
    for each in rendered(name):
        if each["kind"] in ("ClusterRoleBinding", "RoleBinding"):
            assert each["roleRef"]["name"].startswith(("gw-godwit", "mover")), each
        if each["kind"] not in ("ClusterRole", "Role"):
            continue
        for rule in each["rules"]:
            text = str(rule)
            assert "*" not in text, text
            assert not {"impersonate", "bind", "escalate"} & set(rule["verbs"]), text
            if "secrets" in rule["resources"]:
                assert each["kind"] == "Role"
                assert rule["verbs"] == ["create"] or rule["resourceNames"], text
            assert not any(word in text for word in ("pods/exec", "serviceaccounts", "roles"))


@matrix
def test_guest_memory_outlives_the_pod(name: str) -> None:
    """RAM files and journals are the node's, never an emptyDir's, and the same path in all."""
    objects = rendered(name)
    for owner, pod in pods(objects):
        if not owner.endswith("-node"):
            continue
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert "hostPath" in volumes["ram"]
        assert "hostPath" in volumes["state"]
        for container in pod["containers"]:
            mounts = {each["name"]: each for each in container["volumeMounts"]}
            assert mounts["ram"]["mountPath"] == "/var/lib/godwit/ram"
            assert mounts["ram"].get("readOnly", False) is (container["name"] != "fault-agent")


@matrix
def test_a_node_pod_is_not_ended_under_its_guests(name: str) -> None:
    objects = rendered(name)
    for each in objects:
        if each["kind"] != "DaemonSet" or each["metadata"]["name"].endswith("plugin"):
            continue
        strategy, pod = each["spec"]["updateStrategy"], each["spec"]["template"]["spec"]
        if strategy["type"] == "RollingUpdate":
            assert strategy["rollingUpdate"]["maxSurge"] == 0
        assert pod["priorityClassName"] == "system-node-critical"
        assert {"operator": "Exists"} in pod["tolerations"]
        for container in pod["containers"]:
            stop = container["lifecycle"]["preStop"]["exec"]["command"]
            assert stop[:2] == ["godwit", "node-wait"], container["name"]
            assert "livenessProbe" not in container, "it would end guests"
            drains = [arg for arg in container["args"] if arg.startswith("--drain-s=")]
            for drain in drains:
                assert int(drain.split("=")[1]) < pod["terminationGracePeriodSeconds"]


def test_devices_come_from_the_plugin_and_not_from_a_host_path() -> None:
    """A hostPath device node cannot be opened: the device control group does not have it."""
    objects = helm.render(MATRIX["taps-and-disks"])
    node = find(objects, "DaemonSet", "gw-godwit-node")["spec"]["template"]["spec"]
    (agent,) = [each for each in node["containers"] if each["name"] == "fault-agent"]
    wanted = {"godwit.io/kvm", "godwit.io/userfaultfd", "godwit.io/tun"}
    assert agent["resources"]["limits"].keys() == wanted
    assert not any(
        volume["hostPath"]["path"].startswith("/dev/")
        and not volume["hostPath"]["path"].startswith("/dev/shm/")
        for volume in node["volumes"]
        if "hostPath" in volume
    )
    plugin = find(objects, "DaemonSet", "gw-godwit-device-plugin")["spec"]["template"]["spec"]
    offered = {
        arg.removeprefix("--device=").partition("=")[0]
        for arg in plugin["containers"][0]["args"]
        if arg.startswith("--device=")
    }
    assert offered == wanted
    assert "limits" not in plugin["containers"][0]["resources"] or not (
        wanted & plugin["containers"][0]["resources"]["limits"].keys()
    ), "it would wait for itself"


def test_one_orchestrator_on_a_file_several_on_postgresql() -> None:
    """Two processes on one SQLite file would each decide."""
    one = find(helm.render(), "Deployment", "gw-godwit-orchestrator")["spec"]
    assert (one["replicas"], one["strategy"]) == (1, {"type": "Recreate"})
    asked = {"orchestrator": {"replicas": 5}}
    assert find(helm.render(asked), "Deployment", "gw-godwit-orchestrator")["spec"]["replicas"] == 1
    objects = helm.render(POSTGRESQL)
    two = find(objects, "Deployment", "gw-godwit-orchestrator")["spec"]
    assert (two["replicas"], two["strategy"]["type"]) == (2, "RollingUpdate")
    assert len(two["template"]["spec"]["topologySpreadConstraints"]) == 2
    budget = find(objects, "PodDisruptionBudget", "gw-godwit-orchestrator")["spec"]
    assert budget["selector"]["matchLabels"] == two["selector"]["matchLabels"]
    assert not any(each["kind"] == "PersistentVolumeClaim" for each in objects)


def test_what_must_outlive_the_release_is_kept() -> None:
    objects = helm.render()
    kept = {
        (each["kind"], each["metadata"]["name"])
        for each in objects
        if each["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    assert kept == {
        ("PersistentVolumeClaim", "gw-godwit-orchestrator-store"),
        ("CustomResourceDefinition", "vmmigrations.godwit.io"),
        ("CustomResourceDefinition", "nodedrains.godwit.io"),
    }
    crds = {each["kind"] for each in helm.render({"crds": {"install": False}})}
    assert "CustomResourceDefinition" not in crds


def test_nothing_is_reachable_that_is_not_said() -> None:
    """Default deny covers every pod; each other policy says ports."""
    objects = helm.render({**MONITORED, **WEBHOOK})
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    (deny,) = [each for each in policies if each["metadata"]["name"].endswith("-deny")]
    assert set(deny["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in deny["spec"]
    assert "egress" not in deny["spec"]
    wanted = deny["spec"]["podSelector"]["matchLabels"].items()
    for each in objects:
        template = each.get("spec", {}).get("template", {}).get("metadata")
        if template:
            assert wanted <= template["labels"].items(), each["metadata"]["name"]
    for policy in policies:
        for rule in policy["spec"].get("ingress", []) + policy["spec"].get("egress", []):
            assert rule["ports"], policy["metadata"]["name"]


def test_the_eviction_webhook_never_blocks_a_cluster() -> None:
    objects = helm.render(WEBHOOK)
    (hook,) = find(objects, "ValidatingWebhookConfiguration", "gw-godwit-eviction")["webhooks"]
    assert hook["failurePolicy"] == "Ignore"
    assert hook["objectSelector"] == {
        "matchExpressions": [{"key": "godwit.io/vm", "operator": "Exists"}]
    }
    service = find(objects, "Service", hook["clientConfig"]["service"]["name"])
    assert 443 in [port["port"] for port in service["spec"]["ports"]]


def test_certificates_have_the_names_that_peers_check() -> None:
    objects = helm.render(MATRIX["cert-manager"])
    names = {
        each["spec"]["secretName"]: each["spec"]["dnsNames"][0]
        for each in objects
        if each["kind"] == "Certificate"
    }
    assert names == {
        "gw-godwit-orchestrator-tls": "orchestrator.godwit",
        "gw-godwit-viewer-tls": "chart.viewer.godwit",
        "gw-godwit-node-node-a-tls": "node-a.node.godwit",
        "gw-godwit-node-node-b-tls": "node-b.node.godwit",
    }


def test_with_certificates_of_its_own_a_node_holds_no_other_nodes_key() -> None:
    node = find(helm.render(EXISTING), "DaemonSet", "gw-godwit-node")["spec"]["template"]["spec"]
    assert "tls-all" not in [each["name"] for each in node["volumes"]]
    assert "initContainers" not in node


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["helm test gw -n fleet", "privileged", "gw-godwit-authority"]),
        ({"tls": {"mode": "plaintext"}}, ["TLS IS OFF"]),
        ({"node": {"agent": {"injection": {"enabled": True}}}}, ["root on the node"]),
        ({"node": {"shutdownInhibitor": {"enabled": True}}}, ["root on the node"]),
    ],
    ids=["default", "plaintext", "injection", "inhibitor"],
)
def test_the_notes_say_what_is_next_and_what_is_dangerous(
    values: dict[str, Any], words: list[str]
) -> None:
    notes = helm.render_files(values)["godwit/templates/NOTES.txt"]
    for word in words:
        assert word in notes
    assert ("TLS IS OFF" in notes) is (values.get("tls") is not None)
