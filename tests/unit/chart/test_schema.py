# SPDX-License-Identifier: Apache-2.0
"""A wrong value is refused, and names itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.harness import helm
from tests.harness.chart_values import CERT_MANAGER, EXISTING, POSTGRESQL
from tests.harness.helm import CHART

WRONG: dict[str, dict[str, Any]] = {
    "orchestrater": {"orchestrater": {}},
    "replicaCount": {"orchestrator": {"replicaCount": 3}},
    "/tls/mode": {"tls": {"mode": "selfsigned"}},
    "/tls/selfSigned/days": {"tls": {"selfSigned": {"days": 0}}},
    "/tls/certManager/nodes/0": {"tls": {"certManager": {"nodes": ["Node.A"]}}},
    "/image/pullPolicy": {"image": {"pullPolicy": "Sometimes"}},
    "/orchestrator/store/type": {"orchestrator": {"store": {"type": "mysql"}}},
    "/orchestrator/replicas": {"orchestrator": {"replicas": 0}},
    "/orchestrator/image/digest": {"orchestrator": {"image": {"digest": "sha256:short"}}},
    "/orchestrator/service/restPort": {"orchestrator": {"service": {"restPort": 123456}}},
    "/orchestrator/extraArgs": {"orchestrator": {"extraArgs": "--lease 5"}},
    "/orchestrator/resources": {"orchestrator": {"resources": {"limit": {"cpu": 1}}}},
    "/orchestrator/resources/requests/memory": {
        "orchestrator": {"resources": {"requests": {"memory": "lots"}}}
    },
    "/auth/oidc/roles/sre": {"auth": {"oidc": {"roles": {"sre": "root"}}}},
    "/auth/oidc/issuer": {"auth": {"oidc": {"issuer": "http://id.example"}}},
    "/node/updateStrategy/type": {"node": {"updateStrategy": {"type": "Recreate"}}},
    "/node/updateStrategy/maxUnavailable": {"node": {"updateStrategy": {"maxUnavailable": 0}}},
    "/node/terminationGracePeriodSeconds": {"node": {"terminationGracePeriodSeconds": 30}},
    "/node/ram/hostPath": {"node": {"ram": {"hostPath": "ram"}}},
    "/node/ram/type": {"node": {"ram": {"type": "emptyDir"}}},
    "/node/agent/injection/enabled": {"node": {"agent": {"injection": {"enabled": "yes"}}}},
    "/node/agent/devices/godwit.io~1kvm": {"node": {"agent": {"devices": {"godwit.io/kvm": 0}}}},
    "/devicePlugin/shares": {"devicePlugin": {"shares": 0}},
    "/networkPolicy/apiServerPorts": {"networkPolicy": {"apiServerPorts": []}},
    "/metrics/rules/runbookBaseUrl": {"metrics": {"rules": {"runbookBaseUrl": "docs"}}},
    "privileged": {"node": {"agent": {"privileged": True}}},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_names_itself(name: str) -> None:
    with pytest.raises(helm.HelmError) as raised:
        helm.render(WRONG[name])
    said = str(raised.value)
    assert name in said or name.replace("~1", "/") in said, said


def _without(values: dict[str, Any], *path: str) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(values))
    at = changed
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return changed


TOGETHER: dict[str, dict[str, Any]] = {
    "tls.certManager.issuer.name": _without(CERT_MANAGER, "tls", "certManager", "issuer"),
    "tls.certManager.nodes": _without(CERT_MANAGER, "tls", "certManager", "nodes"),
    "tls.existing.orchestratorSecret": _without(EXISTING, "tls", "existing", "orchestratorSecret"),
    "tls.existing.viewerSecret": _without(EXISTING, "tls", "existing", "viewerSecret"),
    "orchestrator.store.postgresql.secretName": _without(
        POSTGRESQL, "orchestrator", "store", "postgresql"
    ),
    "auth.oidc.audience": {"auth": {"oidc": {"issuer": "https://id.example"}}},
    "auth.tokensSecret": {"auth": {"tokensSecret": "t"}, "tls": {"mode": "plaintext"}},
    "orchestrator.evictionWebhook.caBundle": {
        **EXISTING,
        "orchestrator": {"evictionWebhook": {"enabled": True}},
    },
    "orchestrator.controller.enabled": {
        "orchestrator": {"evictionWebhook": {"enabled": True}, "controller": {"enabled": False}}
    },
    "tls.mode": {
        "tls": {"mode": "plaintext"},
        "orchestrator": {"evictionWebhook": {"enabled": True}},
    },
}


@pytest.mark.parametrize("name", TOGETHER)
def test_values_that_need_each_other_say_so(name: str) -> None:
    with pytest.raises(helm.HelmError, match=name.replace(".", r"\.")):
        helm.render(TOGETHER[name])


def test_the_schema_knows_every_value_and_no_other() -> None:
    """Closed on every level that the chart fills; open only where Kubernetes has the word."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(schema: dict[str, Any], values: dict[str, Any], path: str) -> None:
        assert schema["additionalProperties"] is False, path
        assert schema["properties"].keys() - {"global"} == values.keys(), path
        for key, value in values.items():
            below = schema["properties"][key]
            if isinstance(value, dict) and below.get("additionalProperties") is False:
                if key != "resources":
                    compare(below, value, f"{path}.{key}")
            elif isinstance(value, dict):
                assert key in OPEN, f"{path}.{key} is open"

    compare(schema, values, "")


OPEN = frozenset(
    {"commonLabels", "roles", "objectSelector", "annotations", "nodeSelector", "affinity"}
    | {"podAnnotations", "devices", "labels"}
)
