# SPDX-License-Identifier: Apache-2.0
"""An API server with our kinds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.kube import ApiServer
from tests.harness.kubelet import Kubelet, install_crds, kubelet


@pytest.fixture(scope="session")
def kube_with_crds(kube_server: ApiServer) -> ApiServer:
    """The session's API server, with VMMigrations and NodeDrains."""
    install_crds(kube_server)
    return kube_server


@pytest.fixture(scope="module")
def kubelets(kube_with_crds: ApiServer) -> Iterator[Kubelet]:
    """Pods become ready, and end."""
    with kubelet(kube_with_crds) as running:
        yield running
