# SPDX-License-Identifier: Apache-2.0
"""The agent's VMs as Prometheus metrics, read when somebody asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.fault_agent.evidence import retained_bytes
from services.fault_agent.journal import Counters, Role
from services.fault_agent.node import Node

_ARRIVAL_COUNTERS = (
    ("faults", "Page faults seen", "fault_count"),
    ("received_bytes", "Page bytes received", "received_bytes"),
    ("checksum_errors", "Messages fetched again for their CRC", "checksum_error_count"),
    ("reconnects", "Connections to page servers made again", "reconnect_count"),
    ("violations", "Broken invariants of the page path", "violation_count"),
)
_PAGES = (
    ("demand", "demand_page_count"),
    ("bulk", "bulk_page_count"),
    ("zero", "zero_page_count"),
    ("removed", "removed_page_count"),
)

HELD_SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def guest_held_seconds(registry: CollectorRegistry) -> Histogram:
    """How long guests waited for pages that could not be had; docs/recovery.md."""
    return Histogram(
        "godwit_guest_held_seconds",
        "How long a guest was held in an outage of its page supply, by the outage's cause",
        ["cause"],
        buckets=HELD_SECONDS_BUCKETS,
        registry=registry,
    )


class AgentCollector(Collector):
    """One look at the journal and the arrivals under way."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def describe(self) -> Iterator[Metric]:
        """Nothing ahead of time: what there is depends on the VMs."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Everything, as it is now."""
        node = self._node
        roles = Counter(vm.record.role for vm in node.known_vms())
        vms = GaugeMetricFamily("godwit_agent_vms", "VMs by what they are here", labels=["role"])
        for role in Role:
            vms.add_metric([role.value], roles[role])
        yield vms
        yield GaugeMetricFamily(
            "godwit_agent_corrupt_journals",
            "VMs whose journal cannot be read",
            value=len(node.corrupt),
        )
        retained = GaugeMetricFamily(
            "godwit_agent_retained_bytes",
            "Memory of guests that have left, kept for their destination",
            labels=["vm"],
        )
        for vm in node.known_vms():
            if vm.record.role is Role.SEALED:
                retained.add_metric([vm.vm_id], retained_bytes(vm.record, node.boot_id))
        yield retained
        collapsed = GaugeMetricFamily(
            "godwit_agent_collapsed_bytes",
            "Memory of guests that arrived, by what --collapse made of it",
            labels=["vm", "result"],
        )
        for vm in node.known_vms():
            if vm.collapsed is not None:
                collapsed.add_metric([vm.vm_id, "huge"], vm.collapsed.huge_bytes)
                collapsed.add_metric([vm.vm_id, "left"], vm.collapsed.left_bytes)
        yield collapsed
        yield from self._arrivals()

    def _arrivals(self) -> Iterator[Metric]:
        phase = GaugeMetricFamily(
            "godwit_agent_arrival_phase",
            "1 for the phase that an arrival is in",
            labels=["vm", "phase"],
        )
        absent = GaugeMetricFamily(
            "godwit_agent_arrival_absent_pages", "Pages still at the source", labels=["vm"]
        )
        held = GaugeMetricFamily(
            "godwit_agent_arrival_held_faults", "Faults that wait now", labels=["vm"]
        )
        lost = GaugeMetricFamily(
            "godwit_agent_arrival_link_lost_seconds",
            "How long the demand lane has been down, now",
            labels=["vm"],
        )
        prefetch = CounterMetricFamily(
            "godwit_agent_arrival_prefetch_windows",
            "Guesses that were judged: windows behind a fault, or faults against a recorded order",
            labels=["vm", "policy", "result"],
        )
        prefetch_pages = CounterMetricFamily(
            "godwit_agent_arrival_prefetch_pages",
            "Pages asked for because of a guess, before their turn",
            labels=["vm", "policy"],
        )
        prefetch_off = GaugeMetricFamily(
            "godwit_agent_arrival_prefetch_off",
            "1 while prefetch is off because it did not pay",
            labels=["vm", "policy"],
        )
        held_now = GaugeMetricFamily(
            "godwit_guest_held_now_seconds",
            "How long a guest has been held by an outage that lasts",
            labels=["vm", "cause"],
        )
        frozen = GaugeMetricFamily(
            "godwit_agent_vmm_frozen", "1: the policy on a lost link has frozen it", labels=["vm"]
        )
        counters: dict[str, Counters] = {}
        for vm in self._node.known_vms():
            if vm.watch is None:
                continue
            status = vm.watch.refresh()
            phase.add_metric([vm.vm_id, status.phase.name.lower()], 1)
            absent.add_metric([vm.vm_id], status.absent_count)
            held.add_metric([vm.vm_id], status.held_fault_count)
            lost.add_metric([vm.vm_id], status.link_lost_ns / 1e9)
            if status.hold_now.cause:
                cause = status.hold_now.cause.name.lower()
                held_now.add_metric([vm.vm_id, cause], status.hold_now.held_ns / 1e9)
            frozen.add_metric([vm.vm_id], int(vm.frozen_in is not None))
            counters[vm.vm_id] = vm.watch.counters
            for policy, guessed in (("window", status.prefetch), ("recorded", status.recorded)):
                prefetch.add_metric([vm.vm_id, policy, "hit"], guessed.hit_count)
                prefetch.add_metric([vm.vm_id, policy, "miss"], guessed.miss_count)
                prefetch_pages.add_metric([vm.vm_id, policy], guessed.page_count)
                prefetch_off.add_metric([vm.vm_id, policy], int(guessed.off))
        yield from (phase, absent, held, lost, held_now, frozen)
        yield from (prefetch, prefetch_pages, prefetch_off)
        for name, text, field in _ARRIVAL_COUNTERS:
            family = CounterMetricFamily(f"godwit_agent_arrival_{name}", text, labels=["vm"])
            for vm_id, values in counters.items():
                family.add_metric([vm_id], getattr(values, field))
            yield family
        pages = CounterMetricFamily(
            "godwit_agent_arrival_pages", "Pages installed, by how", labels=["vm", "kind"]
        )
        quantiles = GaugeMetricFamily(
            "godwit_agent_fault_latency_quantile_seconds",
            "From the fault event to the wake",
            labels=["vm", "quantile"],
        )
        for vm_id, values in counters.items():
            for kind, field in _PAGES:
                pages.add_metric([vm_id, kind], getattr(values, field))
            for quantile, nanoseconds in (
                ("0.5", values.fault_p50_ns),
                ("0.99", values.fault_p99_ns),
                ("0.999", values.fault_p999_ns),
                ("1", values.fault_max_ns),
            ):
                quantiles.add_metric([vm_id, quantile], nanoseconds / 1e9)
        yield from (pages, quantiles)
