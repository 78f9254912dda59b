# SPDX-License-Identifier: Apache-2.0
"""The page core's counters as Prometheus metrics, read when somebody asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.page_server.images import ImageTable
from services.pagecore.api import PageServer


class ServeCollector(Collector):
    """Pages, streams and images of one page server."""

    def __init__(self, server: PageServer, images: ImageTable) -> None:
        self._server = server
        self._images = images

    def collect(self) -> Iterator[Metric]:
        """One consistent look at the counters."""
        stats = self._server.stats()
        pages = CounterMetricFamily(
            "godwit_page_server_pages",
            "Pages sent; zero pages went without bytes, on either lane",
            labels=["kind"],
        )
        pages.add_metric(["demand"], stats.demand_page_total)
        pages.add_metric(["bulk"], stats.bulk_page_total)
        pages.add_metric(["zero"], stats.zero_page_total)
        yield pages
        for name, text, value in (
            ("sent_bytes", "Page bytes sent", stats.sent_bytes_total),
            ("wants", "Runs of pages asked for", stats.want_total),
            ("refused_streams", "Streams ended with an error", stats.refused_total),
            ("connections_accepted", "Connections accepted", stats.connection_total),
        ):
            yield CounterMetricFamily(f"godwit_page_server_{name}", text, value=value)
        for name, text, value in (
            ("connections", "Connections open", stats.connection_count),
            ("streams", "Fetch streams open", stats.stream_count),
        ):
            yield GaugeMetricFamily(f"godwit_page_server_{name}", text, value=value)
        images = GaugeMetricFamily("godwit_page_server_images", "Images served", labels=["state"])
        states = [record.state for record in self._images.in_force()]
        for state in ("live", "frozen"):
            images.add_metric([state], states.count(state))
        yield images
