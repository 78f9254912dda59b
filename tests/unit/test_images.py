# SPDX-License-Identifier: Apache-2.0
"""What the images are made of; `make image-rootfs` builds and starts them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness import helm
from tools.runtime_lock import LEFT_OUT, lock_entries, runtime_lock

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
IMAGES = ("orchestrator", "page-server", "fault-agent")


def _dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text()


def test_each_image_of_the_chart_is_a_target() -> None:
    repositories = {
        container["image"].partition(":")[0].removeprefix("godwit/")
        for _, pod in helm.pods(helm.render())
        for container in helm.containers(pod)
    }
    assert repositories == set(IMAGES) == set(LEFT_OUT)
    targets = re.findall(r"^FROM \S+ AS (\S+)$", _dockerfile(), re.MULTILINE)
    assert set(IMAGES) <= set(targets)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_what_it_needs_of_the_lock_and_no_tool_of_ours(image: str) -> None:
    """Every line is the lock's, with its hashes; nothing that only developers use."""
    whole = lock_entries((ROOT / "requirements.lock").read_text())
    part = lock_entries(runtime_lock(image))
    assert part.items() <= whole.items()
    assert {"grpcio", "protobuf", "cryptography", "typer", "prometheus-client"} <= part.keys()
    assert not {"pytest", "mypy", "ruff", "helm-python-sdk", "matplotlib", "grpcio-tools"} & set(
        part
    )
    assert all("--hash=sha256:" in entry for entry in part.values())
    assert ("fastapi" in part) is (image == "orchestrator")


def test_an_image_ends_as_nobody() -> None:
    stages = re.split(r"(?m)^FROM ", _dockerfile())[1:]
    for stage in stages:
        users = re.findall(r"^USER (\S+)$", stage, re.MULTILINE)
        assert not users or users[-1] == "65532:65532", stage.splitlines()[0]
    base = next(stage for stage in stages if stage.split("\n")[0].endswith("AS base"))
    assert "USER 65532:65532" in base


def test_nothing_is_fetched_but_by_package_managers() -> None:
    for name in ("Dockerfile", "stage.sh", "rootfs.sh"):
        text = (DOCKER / name).read_text()
        assert not re.search(r"\b(curl|wget)\b|^ADD ", text, re.MULTILINE), name
    assert "--require-hashes" in (DOCKER / "stage.sh").read_text()
