# SPDX-License-Identifier: Apache-2.0
"""Command line options of the controller."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from services.common.errors import InvalidArgumentError
from services.common.listen import parse_address
from services.orchestrator.kubernetes.settings import TTL_S, OnCordon, Settings

_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def add_kubernetes_options(parser: argparse.ArgumentParser, env: Mapping[str, str]) -> None:
    """What `read_kubernetes` reads."""
    group = parser.add_argument_group("Kubernetes")
    group.add_argument(
        "--kubernetes",
        action="store_true",
        default=env.get("GODWIT_KUBERNETES", "") == "1",
        help="be the controller of VMMigration and NodeDrain objects, with this pod's service"
        " account (GODWIT_KUBERNETES=1)",
    )
    group.add_argument(
        "--kubeconfig",
        type=Path,
        default=env.get("GODWIT_KUBECONFIG") or None,
        metavar="PATH",
        help="the same, from outside the cluster (GODWIT_KUBECONFIG)",
    )
    group.add_argument(
        "--kubernetes-namespace",
        default=env.get("GODWIT_KUBERNETES_NAMESPACE", ""),
        metavar="NAME",
        help="where pods of VMs and VMMigrations are (GODWIT_KUBERNETES_NAMESPACE, everywhere)",
    )
    group.add_argument(
        "--lease-namespace",
        default=env.get("GODWIT_LEASE_NAMESPACE", ""),
        metavar="NAME",
        help="where the controller's Lease is (GODWIT_LEASE_NAMESPACE, this pod's, else default)",
    )
    group.add_argument(
        "--on-cordon",
        choices=[each.value for each in OnCordon],
        default=env.get("GODWIT_ON_CORDON", OnCordon.DRAIN.value),
        help="what a cordon of a node does (GODWIT_ON_CORDON, %(default)s)",
    )
    group.add_argument(
        "--when-uncordoned",
        choices=["open", "return"],
        default=env.get("GODWIT_WHEN_UNCORDONED", "open"),
        help="open: the node takes VMs again; return: those that left move back too"
        " (GODWIT_WHEN_UNCORDONED, %(default)s)",
    )
    group.add_argument(
        "--object-ttl",
        type=int,
        default=env.get("GODWIT_OBJECT_TTL", str(TTL_S)),
        metavar="SECONDS",
        help="how long a VMMigration stays after its end (GODWIT_OBJECT_TTL, %(default)s)",
    )
    group.add_argument(
        "--webhook",
        default=env.get("GODWIT_WEBHOOK", ""),
        metavar="HOST:PORT",
        help="where the API server asks about evictions, over TLS (GODWIT_WEBHOOK, nowhere)",
    )
    group.add_argument(
        "--webhook-tls-dir",
        type=Path,
        default=env.get("GODWIT_WEBHOOK_TLS_DIR") or None,
        metavar="DIR",
        help="with tls.crt and tls.key for --webhook (GODWIT_WEBHOOK_TLS_DIR)",
    )


def read_kubernetes(parsed: argparse.Namespace) -> Settings | None:
    """The controller's settings; None: none is wanted.

    Raises:
        InvalidArgumentError: WEBHOOK_INVALID, FIELD_INVALID.
    """
    if not parsed.kubernetes and parsed.kubeconfig is None:
        return None
    if bool(parsed.webhook) != (parsed.webhook_tls_dir is not None):
        raise InvalidArgumentError(
            "WEBHOOK_INVALID",
            "--webhook and --webhook-tls-dir are given together or not at all",
            hint="the API server calls webhooks over TLS only",
        )
    if int(parsed.object_ttl) < 0:
        raise InvalidArgumentError("FIELD_INVALID", "--object-ttl is not negative")
    return Settings(
        kubeconfig=parsed.kubeconfig,
        namespace=parsed.kubernetes_namespace,
        lease_namespace=parsed.lease_namespace or _own_namespace(),
        on_cordon=OnCordon(parsed.on_cordon),
        when_uncordoned=parsed.when_uncordoned.capitalize(),
        ttl_s=int(parsed.object_ttl),
        webhook=parse_address(parsed.webhook) if parsed.webhook else None,
        webhook_tls_dir=parsed.webhook_tls_dir,
    )


def _own_namespace() -> str:
    try:
        return _ACCOUNT_NAMESPACE.read_text().strip()
    except OSError:
        return "default"
