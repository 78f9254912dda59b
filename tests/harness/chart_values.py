# SPDX-License-Identifier: Apache-2.0
"""Ways to install the chart: the render matrix."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]

POSTGRESQL: Values = {
    "orchestrator": {"store": {"type": "postgresql", "postgresql": {"secretName": "db"}}}
}
CERT_MANAGER: Values = {
    "tls": {
        "mode": "certManager",
        "certManager": {"issuer": {"name": "godwit"}, "nodes": ["node-a", "node-b"]},
    }
}
EXISTING: Values = {
    "tls": {
        "mode": "existing",
        "existing": {"orchestratorSecret": "orchestrator", "viewerSecret": "viewer"},
    }
}
MONITORED: Values = {
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "rules": {"enabled": True, "runbookBaseUrl": "https://runbooks.example/godwit/"},
        "dashboards": {"enabled": True, "annotations": {"grafana_folder": "VMs"}},
    }
}
WEBHOOK: Values = {"orchestrator": {"evictionWebhook": {"enabled": True}}}

MATRIX: dict[str, Values] = {
    "default": {},
    "postgresql": POSTGRESQL,
    "postgresql-one": {"orchestrator": {**POSTGRESQL["orchestrator"], "replicas": 1}},
    "cert-manager": CERT_MANAGER,
    "existing-certificates": EXISTING,
    "plaintext": {"tls": {"mode": "plaintext"}},
    "monitored": MONITORED,
    "monitored-plaintext": {**MONITORED, "tls": {"mode": "plaintext"}},
    "webhook": WEBHOOK,
    "webhook-cert-manager": {**WEBHOOK, **CERT_MANAGER},
    "webhook-existing": {
        **EXISTING,
        "orchestrator": {"evictionWebhook": {"enabled": True, "caBundle": "Q0E="}},
    },
    "injection": {"node": {"agent": {"injection": {"enabled": True}}}},
    "injection-own": {"node": {"agent": {"injection": {"enabled": True, "hostPID": False}}}},
    "taps-and-disks": {
        "node": {
            "agent": {"networkTaps": {"enabled": True}, "peerBytesPerSecondMax": 2_500_000_000},
            "diskPaths": ["/srv/disks", "/mnt/luns"],
        }
    },
    "host-network": {"node": {"hostNetwork": True}},
    "ipv6": {"node": {"ipFamily": "IPv6"}},
    "rolling": {"node": {"updateStrategy": {"type": "RollingUpdate", "maxUnavailable": "10%"}}},
    "own-tmpfs": {"node": {"ram": {"hostPath": "/var/lib/godwit/ram", "type": "Directory"}}},
    "inhibitor": {"node": {"shutdownInhibitor": {"enabled": True}}},
    "no-condition": {"node": {"condition": {"enabled": False}}},
    "no-controller": {"orchestrator": {"controller": {"enabled": False}}},
    "other-plugin": {
        "devicePlugin": {"enabled": False},
        "node": {"agent": {"devices": {"devices.kubevirt.io/kvm": 1}}},
    },
    "no-metrics": {"metrics": {"enabled": False}},
    "no-network-policy": {"networkPolicy": {"enabled": False}},
    "no-crds": {"crds": {"install": False}},
    "bare": {
        "crds": {"keep": False},
        "tests": {"enabled": False},
        "uninstall": {"refuseWhileGuestsDepend": False},
    },
    "callers": {
        "auth": {
            "tokensSecret": "tokens",
            "oidc": {
                "issuer": "https://id.example",
                "audience": "godwit",
                "roles": {"sre": "admin", "dev": "viewer"},
            },
        }
    },
    "named": {
        "fullnameOverride": "mover",
        "commonLabels": {"team": "virt"},
        "image": {
            "registry": "registry.example:5000/virt",
            "tag": "1.2.3",
            "pullSecrets": ["pull"],
        },
        "orchestrator": {
            "image": {"digest": "sha256:" + "0" * 64},
            "serviceAccount": {"name": "mine"},
            "extraArgs": ["--audit-log=/tmp/audit.jsonl"],
        },
    },
}
"""By name. `tests/unit/chart` renders each, `tests/kube` hands each to a real API server."""
