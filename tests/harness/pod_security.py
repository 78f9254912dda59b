# SPDX-License-Identifier: Apache-2.0
"""The Pod Security Standards, as far as a chart can break them.

Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

from typing import Any

from tests.harness.helm import containers

_VOLUMES = frozenset(
    {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"}
    | {"projected", "secret"}
)
_BASELINE_CAPABILITIES = frozenset(
    {"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD"}
    | {"NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"}
)


def beyond_baseline(pod: dict[str, Any]) -> list[str]:
    """What level `baseline` would refuse."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    found += [
        f"hostPath {volume['hostPath']['path']}"
        for volume in pod.get("volumes", [])
        if "hostPath" in volume
    ]
    for container in containers(pod):
        name, context = container["name"], container.get("securityContext", {})
        if context.get("privileged"):
            found.append(f"{name}: privileged")
        added = set(context.get("capabilities", {}).get("add", []))
        found += [f"{name}: {each}" for each in sorted(added - _BASELINE_CAPABILITIES)]
        if context.get("appArmorProfile", {}).get("type") == "Unconfined":
            found.append(f"{name}: AppArmor unconfined")
        if any(port.get("hostPort") for port in container.get("ports", [])):
            found.append(f"{name}: hostPort")
        if context.get("seccompProfile", {}).get("type") == "Unconfined":
            found.append(f"{name}: seccomp unconfined")
    return found


def beyond_restricted(pod: dict[str, Any]) -> list[str]:
    """What level `restricted` would refuse."""
    found = beyond_baseline(pod)
    of_pod = pod.get("securityContext", {})
    for volume in pod.get("volumes", []):
        (kind,) = volume.keys() - {"name"}
        if kind not in _VOLUMES and kind != "hostPath":
            found.append(f"volume {kind}")
    for container in containers(pod):
        name, context = container["name"], container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False:
            found.append(f"{name}: privilege escalation")
        if context.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
            found.append(f"{name}: may be root")
        if context.get("runAsUser", of_pod.get("runAsUser")) == 0:
            found.append(f"{name}: root")
        profile = context.get("seccompProfile", of_pod.get("seccompProfile", {}))
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            found.append(f"{name}: no seccomp profile")
        capabilities = context.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []):
            found.append(f"{name}: keeps capabilities")
        if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            found.append(f"{name}: adds capabilities")
    return found
