# SPDX-License-Identifier: Apache-2.0
"""What the orchestrator counts. No VM and no migration is a label: their number has no bound."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.common import metrics


class Metrics:
    """The metrics of one orchestrator, in a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or metrics.new_registry()
        self.invariant_violations = metrics.invariant_violations(self.registry)
        self.migrations = Counter(
            "godwit_migrations",
            "Migrations that ended, by result and reason",
            ["result", "reason"],
            registry=self.registry,
        )
        self.active = Gauge(
            "godwit_migrations_active", "Migrations that have not ended", registry=self.registry
        )
        self.needs_attention = Gauge(
            "godwit_migrations_need_attention",
            "Migrations past the decision that a person must look at",
            registry=self.registry,
        )
        self.phase_seconds = Histogram(
            "godwit_migration_phase_seconds",
            "How long each phase took",
            ["phase"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
            registry=self.registry,
        )
        self.pause_seconds = Histogram(
            "godwit_migration_pause_seconds",
            "From sending Pause until Activate was acknowledged: at least the guest's pause",
            buckets=(0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10),
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "godwit_queue_depth",
            "Migrations that wait for admission, by class",
            ["priority"],
            registry=self.registry,
        )
        self.queue_held = Gauge(
            "godwit_queue_held",
            "Migrations that wait for admission, by what holds them",
            ["reason"],
            registry=self.registry,
        )
        self.admissions = Counter(
            "godwit_admissions",
            "Migrations that were admitted, by class",
            ["priority"],
            registry=self.registry,
        )
        self.frozen = Gauge(
            "godwit_queue_frozen", "1 while the emergency stop is set", registry=self.registry
        )
        self.backing_off = Gauge(
            "godwit_vms_backing_off",
            "VMs that failed lately and are not tried before their back-off is over",
            registry=self.registry,
        )
        self.breaker_open = Gauge(
            "godwit_node_breaker_open",
            "1 while nothing is placed on a node because moves of it failed in a row",
            ["node"],
            registry=self.registry,
        )
        self.reserved_bytes = Gauge(
            "godwit_node_reserved_bytes",
            "Memory that was promised to guests on their way to a node and that they have not"
            " filled yet",
            ["node"],
            registry=self.registry,
        )
        self.tokens = Gauge(
            "godwit_limit_tokens",
            "Tokens of a limit that are held, or (state limit) that there are of one",
            ["kind", "state"],
            registry=self.registry,
        )
        self.queue_wait_seconds = Histogram(
            "godwit_queue_wait_seconds",
            "From asking for a migration until it was admitted",
            buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600),
            registry=self.registry,
        )
        self.retries = Counter(
            "godwit_migration_retries",
            "Migrations that failed and were tried again, by the reason of the failure",
            ["reason"],
            registry=self.registry,
        )
        self.alarms = Counter(
            "godwit_migration_alarms",
            "Times a step took longer than it should, by phase",
            ["phase"],
            registry=self.registry,
        )
        self.store_in_doubt = Gauge(
            "godwit_store_in_doubt",
            "1 if the store may have forgotten something: nothing is admitted or decided",
            registry=self.registry,
        )
        self.leader = Gauge(
            "godwit_leader",
            "1 if this orchestrator leads, 0 if it stands by",
            registry=self.registry,
        )
        self.leader_term = Gauge(
            "godwit_leader_term",
            "The term that this orchestrator leads in, or led in last",
            registry=self.registry,
        )
        self.node_certificate = Gauge(
            "godwit_node_certificate_expiry_seconds",
            "Until the certificate of a node ends, as its agent said last; negative: it has ended",
            ["node"],
            registry=self.registry,
        )
        self.node_by_pin = Gauge(
            "godwit_node_by_pin",
            "1 if the node's agent is known by its pinned key alone: renew certificates",
            ["node"],
            registry=self.registry,
        )
        self.progress_cut = Counter(
            "godwit_progress_streams_cut",
            "Progress streams of agents that were ended: a delta was missing, or too much came",
            ["reason"],
            registry=self.registry,
        )
        self.node_reachable = Gauge(
            "godwit_node_reachable",
            "1 if the node's agent answered lately",
            ["node"],
            registry=self.registry,
        )

    def forget_schedule(self) -> None:
        """This orchestrator leads no more: what it knew of the queue is not true for ever."""
        for gauge in (
            *(self.queue_depth, self.queue_held, self.tokens),
            *(self.breaker_open, self.reserved_bytes),
        ):
            gauge.clear()
        self.backing_off.set(0)
        self.frozen.set(0)
