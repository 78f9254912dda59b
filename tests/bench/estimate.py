# SPDX-License-Identifier: Apache-2.0
"""Quantiles and intervals. A run is rounds, in each of which every variant is measured once.

What is resampled is rounds, not samples: samples of one round share its weather, and a machine that
was slow for a while was slow for all variants. 95 % intervals, percentile bootstrap.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapters 8 and 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLE_COUNT = 1000
SEED = 20261127
LOW, HIGH = 0.025, 0.975

Rounds = Sequence[Sequence[float]]
"""Samples of one variant, round by round."""
Indices = NDArray[np.intp]
"""Rounds that are looked at; one may come twice."""
Statistic = Callable[[Indices], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure and the interval that 95 of 100 such runs would give it."""

    value: float
    low: float
    high: float
    n: int
    """Rounds, or runs."""

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit."""
        return Estimate(
            value=self.value * factor, low=self.low * factor, high=self.high * factor, n=self.n
        )


def estimate(round_count: int, statistic: Statistic) -> Estimate:
    """What `statistic` gives for all rounds, and for rounds drawn with replacement.

    Raises:
        ValueError: there are no rounds.
    """
    if round_count < 1:
        raise ValueError("no rounds")
    draw = np.random.default_rng(SEED)
    drawn = [
        statistic(draw.integers(0, round_count, round_count, dtype=np.intp))
        for _ in range(RESAMPLE_COUNT)
    ]
    low, high = np.quantile(drawn, [LOW, HIGH])
    return Estimate(
        value=statistic(np.arange(round_count)), low=float(low), high=float(high), n=round_count
    )


def quantile(rounds: Rounds, q: float) -> Statistic:
    """The quantile of all samples of the rounds looked at."""
    arrays = [np.asarray(samples, dtype=np.float64) for samples in rounds]

    def of(indices: Indices) -> float:
        return float(np.quantile(np.concatenate([arrays[i] for i in indices]), q))

    return of


def median(values: Sequence[float]) -> Statistic:
    """The median of one value a round."""
    array = np.asarray(values, dtype=np.float64)

    def of(indices: Indices) -> float:
        return float(np.median(array[indices]))

    return of


def total(*parts: Statistic) -> Statistic:
    """The sum of several, on the same rounds."""

    def of(indices: Indices) -> float:
        return sum(part(indices) for part in parts)

    return of


def ratio(above: Statistic, below: Statistic) -> Statistic:
    """One through another, on the same rounds."""

    def of(indices: Indices) -> float:
        return above(indices) / below(indices)

    return of
