# SPDX-License-Identifier: Apache-2.0
"""The API server that the other tests here stand on."""

from __future__ import annotations

import pytest

from tests.harness.kube import ApiServer

pytestmark = pytest.mark.requires("kube")


def test_it_is_a_real_one(kube_server: ApiServer) -> None:
    assert kube_server.request("GET", "/version")["gitVersion"].startswith("v1.")
    kinds = kube_server.request("GET", "/apis/apiextensions.k8s.io/v1")["resources"]
    assert "customresourcedefinitions" in {each["name"] for each in kinds}
