# SPDX-License-Identifier: Apache-2.0
"""Alerts fire when they should, name metrics that exist, and each has a runbook."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from prometheus_client import CollectorRegistry

from services.common.tls_metrics import TlsCollector
from services.fault_agent import agent_metrics
from services.fault_agent.journal import Role
from services.orchestrator.metrics import Metrics
from services.page_server.collector import ServeCollector
from services.pagecore.api import Hold, HoldCause
from tests.harness import helm
from tests.harness.chart_values import MONITORED

RUNBOOKS = Path(__file__).resolve().parents[3] / "docs" / "runbooks"
TESTS = Path(__file__).with_name("alerts_test.yaml")
_NAME = re.compile(r"\bgodwit_[a-z0-9_]+")


def _rules() -> dict[str, Any]:
    objects = helm.render(MONITORED)
    spec: dict[str, Any] = helm.find(objects, "PrometheusRule", "gw-godwit")["spec"]
    return spec


def _alerts() -> list[dict[str, Any]]:
    return [rule for group in _rules()["groups"] for rule in group["rules"]]


def _dashboards() -> dict[str, Any]:
    found = helm.find(helm.render(MONITORED), "ConfigMap", "gw-godwit-dashboards")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["metadata"]["annotations"] == {"grafana_folder": "VMs"}
    return {name: json.loads(text) for name, text in found["data"].items()}


@pytest.fixture
def rules_file(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(_rules()))
    return path


@pytest.mark.requires("promtool")
def test_prometheus_takes_the_rules(rules_file: Path) -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", rules_file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(_alerts())} rules found" in done.stdout


@pytest.mark.requires("promtool")
def test_alerts_fire_when_they_should_and_not_before(rules_file: Path) -> None:
    tests = yaml.safe_load(TESTS.read_text())
    tests["rule_files"] = [str(rules_file)]
    path = rules_file.with_name("tests.yaml")
    path.write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        ["promtool", "test", "rules", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried_both_ways() -> None:
    fires: set[str] = set()
    quiet: set[str] = set()
    for case in yaml.safe_load(TESTS.read_text())["tests"]:
        for tried in case["alert_rule_test"]:
            (fires if tried["exp_alerts"] else quiet).add(tried["alertname"])
    names = {alert["alert"] for alert in _alerts()}
    assert fires == names
    assert quiet == names


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    names = {alert["alert"] for alert in _alerts()}
    assert {path.stem for path in RUNBOOKS.glob("Godwit*.md")} == names
    for alert in _alerts():
        url = f"https://runbooks.example/godwit/{alert['alert']}.md"
        assert alert["annotations"]["runbook_url"] == url
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert alert["labels"]["severity"] in ("page", "ticket")
        text = (RUNBOOKS / f"{alert['alert']}.md").read_text()
        assert f"`{alert['alert']}`" in text
        assert "## What to do" in text
        assert f"({alert['alert']}.md)" in (RUNBOOKS / "README.md").read_text()


class _AnyPlace:
    """Stands in for a VM's watch or a page server: what is exported, not what it says."""

    def __getattr__(self, name: str) -> Any:
        if name == "collapsed":
            return SimpleNamespace(huge_bytes=1, left_bytes=1)
        if name == "hold_now":
            return Hold(number=1, cause=HoldCause.LINK_LOST, outage_ns=1, held_ns=1)
        return 1


def _exported() -> set[str]:
    """Every sample that the three services can show, by asking their own collectors."""
    orchestrator = Metrics(CollectorRegistry())
    # One with labels shows nothing before its first use.
    orchestrator.migrations.labels("failed", "x").inc()
    orchestrator.phase_seconds.labels("x").observe(1)
    orchestrator.queue_depth.labels("x").set(1)
    orchestrator.alarms.labels("x").inc()
    orchestrator.node_reachable.labels("x").set(1)
    orchestrator.invariant_violations.labels("I1").inc()
    registry = CollectorRegistry()
    agent_metrics.guest_held_seconds(registry).labels("link_lost").observe(1)
    families = [*orchestrator.registry.collect(), *registry.collect()]
    families += _agent_families()
    server = cast(Any, SimpleNamespace(stats=_AnyPlace))
    images = cast(Any, SimpleNamespace(in_force=list))
    families += ServeCollector(server, images).collect()
    certificates = cast(Any, SimpleNamespace(seconds_left=lambda: {"tls.crt": 1.0}))
    identity = cast(Any, SimpleNamespace(pinned_count=lambda: 1))
    families += TlsCollector(certificates, identity).collect()
    return {sample.name for family in families for sample in family.samples}


def _agent_families() -> list[Any]:
    status: Any = _AnyPlace()
    status.phase = SimpleNamespace(name="POSTCOPY")
    status.prefetch = status.recorded = SimpleNamespace(
        hit_count=1, miss_count=1, page_count=1, off=False
    )
    watch = SimpleNamespace(refresh=lambda: status, counters=_AnyPlace())
    record = SimpleNamespace(role=Role.SEALED, boot_id="b", ram_path="/dev/null", vm_id="v")
    vm = SimpleNamespace(
        record=record, vm_id="v", watch=watch, frozen_in=None, collapsed=_AnyPlace().collapsed
    )
    node = cast(Any, SimpleNamespace(known_vms=lambda: [vm], corrupt={}, boot_id="b"))
    return list(agent_metrics.AgentCollector(node).collect())


def test_every_metric_that_is_asked_for_exists() -> None:
    exported = _exported()
    asked = {
        name
        for alert in _alerts()
        for name in _NAME.findall(alert["expr"] + str(alert["annotations"]))
    }
    for dashboard in _dashboards().values():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                asked |= set(_NAME.findall(target["expr"]))
        for variable in dashboard["templating"]["list"]:
            asked |= set(_NAME.findall(str(variable.get("query"))))
    assert len(asked) > 20
    assert asked <= exported, sorted(asked - exported)


def test_dashboards_are_whole() -> None:
    (dashboard,) = _dashboards().values()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        assert panel["type"] == "row" or panel["targets"], panel["title"]
