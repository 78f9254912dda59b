# SPDX-License-Identifier: Apache-2.0
"""A real Helm (its Go code, as a library in a Python package), for tests of the chart.

The one module that imports it, so that another could take its place.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "godwit"
Object = dict[str, Any]


class HelmError(Exception):
    """What Helm said."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It tells of each symbolic link that it follows, on descriptor 2."""
    sys.stderr.flush()
    saved = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    except helm_python.HelmError as error:
        raise HelmError(str(error)) from error
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def render_files(
    values: Mapping[str, Any] | None = None,
    *,
    name: str = "gw",
    namespace: str = "fleet",
    chart: Path = CHART,
) -> dict[str, str]:
    """What each template gives, by its path.

    Raises:
        HelmError: the schema or a template refused the values.
    """
    with _quiet(), helm_python.Chart.load(chart) as loaded:
        rendered: dict[str, str] = loaded.render(
            dict(values or {}), name=name, namespace=namespace, revision=1, is_install=True
        )
    return rendered


def render(
    values: Mapping[str, Any] | None = None, *, name: str = "gw", namespace: str = "fleet"
) -> list[Object]:
    """The objects.

    Raises:
        HelmError: the schema or a template refused the values.
    """
    files = render_files(values, name=name, namespace=namespace)
    return [
        each
        for path, text in sorted(files.items())
        if path.endswith(".yaml")
        for each in yaml.safe_load_all(text)
        if each
    ]


def lint(values: Mapping[str, Any] | None = None) -> list[str]:
    """Warnings and errors of `helm lint --strict`."""
    with _quiet():
        found = helm_python.lint(CHART, dict(values or {}), namespace="fleet", strict=True)
    return [
        f"{each['path']}: {each['error']}" for each in found["messages"] if each["severity"] > 1
    ]


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every pod spec, with `Kind/name` of who makes it."""
    for each in objects:
        name = f"{each['kind']}/{each['metadata']['name']}"
        spec = each.get("spec", {})
        if each["kind"] == "Pod":
            yield name, spec
        elif each["kind"] == "CronJob":
            yield name, spec["jobTemplate"]["spec"]["template"]["spec"]
        elif "template" in spec and "spec" in spec["template"]:
            yield name, spec["template"]["spec"]


def containers(pod: Object) -> list[Object]:
    """Of a pod, those that start it too."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def find(objects: list[Object], kind: str, name: str) -> Object:
    """The one object of that kind and name."""
    (found,) = [e for e in objects if e["kind"] == kind and e["metadata"]["name"] == name]
    return found
