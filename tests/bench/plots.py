# SPDX-License-Identifier: Apache-2.0
"""The plots of the report, as SVG that is the same for the same figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from tests.bench import lanes
from tests.bench.peers import section as peers
from tests.bench.section import Result

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "godwit", "svg.fonttype": "none", "font.size": 9})

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen

_METADATA = {"Date": None, "Creator": None}
_SHOWN = ("tcp", "uffd", "wire", "idle", "capped", "bulk", "grpcio")
_POINT_COUNT = 200
_PEERS = (peers.UNCAPPED, peers.FAST, peers.SLOW)


def _latency(results: Mapping[str, Result]) -> Any:
    figure, axes = plt.subplots(figsize=(7, 4))
    us = results["lanes"]["us"]
    for key in _SHOWN:
        samples = np.concatenate([np.asarray(samples) for samples in us[key]])
        # Down to what ten samples have seen; a point for each that can be told apart.
        rarity = np.geomspace(1, 10 / samples.size, _POINT_COUNT)
        label = lanes.LABELS[key]
        axes.plot(rarity, np.quantile(samples, 1 - rarity), label=label, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, 1e-4)
    axes.set_xlabel("share of pages that take longer")
    axes.set_ylabel("µs")
    axes.set_title("One page of 4 KiB over loopback")
    axes.grid(visible=True, which="both", linewidth=0.2)
    axes.legend(fontsize=7)
    return figure


def _moves(name: str, title: str, factor: float) -> Callable[[Mapping[str, Result]], Any]:
    def draw(results: Mapping[str, Result]) -> Any:
        shown = [section for section in _PEERS if section.name in results]
        figure, all_axes = plt.subplots(
            1, len(shown), figsize=(3.2 * len(shown), 3.2), squeeze=False
        )
        for axes, section in zip(all_axes[0], shown, strict=True):
            moves = {k: v for k, v in results[section.name]["moves"].items() if v}
            values = [[run[name] * factor for run in runs] for runs in moves.values()]
            axes.boxplot(values, widths=0.6, medianprops={"color": "black"})
            axes.set_xticklabels(
                [key.replace(" QEMU", "\nQEMU").replace(", ", ",\n") for key in moves],
                fontsize=6,
            )
            axes.set_title(section.title.split(": ")[1], fontsize=8)
            axes.set_ylim(bottom=0)
            axes.grid(visible=True, axis="y", linewidth=0.2)
        figure.suptitle(title)
        figure.tight_layout()
        return figure

    return draw


_PLOTS: Mapping[str, tuple[set[str], Callable[[Mapping[str, Result]], Any]]] = {
    "latency.svg": ({"lanes"}, _latency),
    "gap.svg": (
        {section.name for section in _PEERS},
        _moves("gap_ms", "Gap between a guest's heartbeats, ms", 1),
    ),
    "first-second.svg": (
        {section.name for section in _PEERS},
        _moves("first_second_share", "Speed in the first second after the switch, %", 100),
    ),
}


def draw(results: Mapping[str, Result], directory: Path) -> list[str]:
    """Those for which there are figures; their names."""
    drawn = []
    for name, (needed, make) in _PLOTS.items():
        if not needed & results.keys():
            continue
        figure = make(results)
        figure.savefig(directory / name, metadata=_METADATA)
        plt.close(figure)
        drawn.append(name)
    return drawn
