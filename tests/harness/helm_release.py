# SPDX-License-Identifier: Apache-2.0
"""A release of the chart at a real API server, installed by a real Helm."""

from __future__ import annotations

import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python

from tests.harness.helm import CHART
from tests.harness.kube import ApiServer, RefusedError

TIMEOUT_S = 60


@dataclass(slots=True, kw_only=True)
class Release:
    """One name in one namespace.

    chart: a copy that takes any version of Kubernetes: the tests' core is older than the chart's
    kubeVersion. What that core does not serve is left out by values.
    """

    chart: Path
    server: ApiServer
    name: str
    namespace: str

    @classmethod
    def copy(cls, directory: Path, server: ApiServer, *, name: str, namespace: str) -> Release:
        """With a copy of the chart below `directory`."""
        chart = directory / "godwit"
        shutil.copytree(CHART, chart)
        about = chart / "Chart.yaml"
        about.write_text(
            re.sub(r"(?m)^kubeVersion:.*$", 'kubeVersion: ">=1.20.0-0"', about.read_text())
        )
        for template in chart.rglob("templates/**/*.yaml"):
            text = template.read_text()
            if "kind: CronJob" in text:
                template.write_text(
                    text.replace(
                        "apiVersion: batch/v1\nkind: CronJob",
                        "apiVersion: batch/v1beta1\nkind: CronJob",
                    )
                )
        return cls(chart=chart, server=server, name=name, namespace=namespace)

    def _config(self) -> Any:
        return helm_python.Config(kubeconfig_path=self.server.kubeconfig, namespace=self.namespace)

    def install(self, values: dict[str, Any]) -> None:
        """`helm install`."""
        with self._config() as config:
            config.install(self.chart, self.name, values, namespace=self.namespace)

    def upgrade(self, values: dict[str, Any]) -> None:
        """`helm upgrade`."""
        with self._config() as config:
            config.upgrade(self.chart, self.name, values, namespace=self.namespace)

    def uninstall(self, *, hook_succeeds: bool) -> str:
        """`helm uninstall`; what Helm says if it was refused, else "".

        There is no Job controller: a thread says how the hook's Job ended.
        """
        done = threading.Event()
        judge = threading.Thread(target=self._judge, args=(done, hook_succeeds))
        judge.start()
        try:
            with self._config() as config:
                config.uninstall(self.name, timeout=TIMEOUT_S)
        except helm_python.HelmError as error:
            return str(error)
        finally:
            done.set()
            judge.join()
        return ""

    def _judge(self, done: threading.Event, succeeds: bool) -> None:
        path = (
            f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{self.name}-godwit-uninstall/status"
        )
        kind = "Complete" if succeeds else "Failed"
        condition = {"type": kind, "status": "True", "reason": "Test", "message": "by the test"}
        body = {"status": {"conditions": [condition], "succeeded" if succeeds else "failed": 1}}
        while not done.wait(0.1):
            try:
                found = self.server.request("GET", path)
                if not found.get("status", {}).get("conditions"):
                    self.server.request("PATCH", path, body, media="application/merge-patch+json")
            except RefusedError:
                continue
