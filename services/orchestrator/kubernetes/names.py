# SPDX-License-Identifier: Apache-2.0
"""Names that others may rely on: kinds, labels, annotations, taints."""

from __future__ import annotations

from services.orchestrator.kubernetes.api import Kind

GROUP = "godwit.io"
VERSION = "v1alpha1"

MIGRATIONS = Kind(group=GROUP, version=VERSION, plural="vmmigrations", name="VMMigration")
DRAINS = Kind(group=GROUP, version=VERSION, plural="nodedrains", name="NodeDrain", namespaced=False)
PODS = Kind(group="", version="v1", plural="pods", name="Pod")
NODES = Kind(group="", version="v1", plural="nodes", name="Node", namespaced=False)
CLAIMS = Kind(group="", version="v1", plural="persistentvolumeclaims", name="PersistentVolumeClaim")
BUDGETS = Kind(
    group="policy", version="v1", plural="poddisruptionbudgets", name="PodDisruptionBudget"
)
LEASES = Kind(group="coordination.k8s.io", version="v1", plural="leases", name="Lease")
EVENTS = Kind(group="events.k8s.io", version="v1", plural="events", name="Event")

VM_LABEL = f"{GROUP}/vm"
"""On a pod: the virtual machine that it is."""
MIGRATION_LABEL = f"{GROUP}/migration"
"""On a pod that was made for a move, and on an object that mirrors one that began elsewhere: the
migration's id in lower case."""
ORIGIN_LABEL = f"{GROUP}/origin"
"""On an object of ours that the controller made: why, `mirror`, `cordon` or `taint`."""
DRAIN_TAINT = f"{GROUP}/drain"
"""On a node: empty it."""
FINALIZER = f"{GROUP}/rollback"
"""On a VMMigration before its decision: to delete it is a cancel, which has to be carried out."""
DRAIN_FINALIZER = f"{GROUP}/open"
"""On a NodeDrain: deleting it opens the node."""
AGENT_SELECTOR = "app.kubernetes.io/name=godwit,app.kubernetes.io/component=node"
"""Pods with an agent in them."""
AGENT_PORT = "agent"
"""Name of its port there."""
