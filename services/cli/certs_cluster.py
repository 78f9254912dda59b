# SPDX-License-Identifier: Apache-2.0
"""`godwit certs cluster`: what the chart's Job runs (services.common.cluster_certificates)."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Annotated, Any

import typer


def cluster(
    namespace: Annotated[str, typer.Option(help="Of the Secrets.")],
    authority_secret: Annotated[str, typer.Option(help="Certificate and key of the authority.")],
    orchestrator_secret: Annotated[str, typer.Option(help="The orchestrator's.")],
    viewer_secret: Annotated[str, typer.Option(help="Of who may only look.")],
    nodes_secret: Annotated[str, typer.Option(help="NODE.crt and NODE.key of every node.")],
    address: Annotated[
        list[str] | None, typer.Option(help="Host name of the orchestrator. Repeatable.")
    ] = None,
    days: Annotated[int, typer.Option(help="How long certificates are good for.")] = 90,
    authority_days: Annotated[int, typer.Option(help="How long the authority is.")] = 3650,
    node_label: Annotated[
        list[str] | None, typer.Option(help="LABEL=VALUE that nodes must have. Repeatable.")
    ] = None,
    webhook: Annotated[
        str, typer.Option(help="ValidatingWebhookConfiguration that gets the authority.")
    ] = "",
    kubeconfig: Annotated[
        Path | None, typer.Option(help="Default: the account of the pod it runs in.")
    ] = None,
) -> None:
    """Make and renew the certificates of a Kubernetes cluster's fleet, as Secrets."""
    from kubernetes import client, config

    from services.common.cluster_certificates import Secrets, Wanted, bring_about, renew, trust

    if kubeconfig is not None:
        config.load_kube_config(str(kubeconfig))  # type: ignore[no-untyped-call]
    else:
        config.load_incluster_config()  # type: ignore[no-untyped-call]
    core: Any = client.CoreV1Api()
    listed = core.list_node(label_selector=",".join(node_label or [])).items
    nodes: list[str] = sorted(node.metadata.name for node in listed)
    wanted = Wanted(days=days, authority_days=authority_days, addresses=tuple(address or ()))
    names = {
        "authority": authority_secret,
        "orchestrator": orchestrator_secret,
        "viewer": viewer_secret,
        "nodes": nodes_secret,
    }
    secrets = Secrets(core, namespace)
    done = bring_about(
        secrets, names, lambda fleet: renew(fleet, wanted, nodes, dt.datetime.now(dt.UTC))
    )
    for line in done:
        print(line)
    if webhook and trust(
        client.AdmissionregistrationV1Api(), webhook, secrets.read(orchestrator_secret)
    ):
        print(f"{webhook}: trusts the authority")
    print(f"{len(nodes)} nodes; {'all was good' if not done else 'done'}")
