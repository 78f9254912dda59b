# SPDX-License-Identifier: Apache-2.0
"""The chart's objects at an API server: creating them, and asking what its accounts may."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.harness.kube import ApiServer, RefusedError

NAMESPACE = "fleet"
VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
_PATHS = {
    "Namespace": "/api/v1/namespaces",
    "Node": "/api/v1/nodes",
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "SubjectAccessReview": "/apis/authorization.k8s.io/v1/subjectaccessreviews",
    "ValidatingWebhookConfiguration": (
        "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    ),
}
_NAMESPACED = {
    "ConfigMap": ("/api/v1", "configmaps"),
    "CronJob": ("/apis/batch/v1beta1", "cronjobs"),
    "DaemonSet": ("/apis/apps/v1", "daemonsets"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "Job": ("/apis/batch/v1", "jobs"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Pod": ("/api/v1", "pods"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    "Role": ("/apis/rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "rolebindings"),
    "Secret": ("/api/v1", "secrets"),
    "Service": ("/api/v1", "services"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
}
"""CronJob is batch/v1 since 1.21; a core of 1.20 has the same fields as v1beta1."""


def create(server: ApiServer, body: dict[str, Any], *, dry_run: bool = False) -> Any:
    """Create an object; in a dry run it is checked, defaulted and not kept.

    Raises:
        AssertionError: the server refused it, with its words.
    """
    kind = body["kind"]
    if kind in _PATHS:
        path = _PATHS[kind]
    else:
        base, plural = _NAMESPACED[kind]
        path = f"{base}/namespaces/{body['metadata']['namespace']}/{plural}"
        if kind == "CronJob":
            body = {**body, "apiVersion": "batch/v1beta1"}
    try:
        return server.request("POST", f"{path}{'?dryRun=All' if dry_run else ''}", body)
    except RefusedError as error:
        name = body["metadata"].get("name", "")
        raise AssertionError(f"{kind}/{name}: {error}") from error


def apply(server: ApiServer, objects: Iterable[dict[str, Any]]) -> None:
    """Create all of them."""
    for each in objects:
        create(server, each)


def token_of(server: ApiServer, account: str, namespace: str = NAMESPACE) -> str:
    """A token of a service account, as the kubelet would ask for one."""
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
    body = {"spec": {"expirationSeconds": 3600}}
    return str(server.request("POST", path, body)["status"]["token"])


def _resources(server: ApiServer) -> list[tuple[str, str, str]]:
    """(group, resource, subresource) of everything that is served."""
    groups = [
        ("", "/api/v1"),
        *(
            (group["name"], f"/apis/{group['preferredVersion']['groupVersion']}")
            for group in server.request("GET", "/apis")["groups"]
        ),
    ]
    found = []
    for group, path in groups:
        for each in server.request("GET", path)["resources"]:
            resource, _, subresource = each["name"].partition("/")
            found.append((group, resource, subresource))
    return found


def allowed(server: ApiServer, account: str, namespace: str) -> set[tuple[str, str]]:
    """What the authorizer lets a service account of NAMESPACE do in `namespace`.

    Pairs of `group/resource/subresource` (without the group, for the core's) and verb.
    """
    found = set()
    for group, resource, subresource in _resources(server):
        for verb in VERBS:
            attributes = {"namespace": namespace, "verb": verb, "group": group}
            attributes |= {"resource": resource, "subresource": subresource}
            user = f"system:serviceaccount:{NAMESPACE}:{account}"
            answer = create(
                server,
                {
                    "kind": "SubjectAccessReview",
                    "metadata": {},
                    "spec": {
                        "user": user,
                        "groups": ["system:authenticated", "system:serviceaccounts"],
                        "resourceAttributes": attributes,
                    },
                },
            )
            if answer["status"]["allowed"]:
                found.add(("/".join(filter(None, (group, resource, subresource))), verb))
    return found
