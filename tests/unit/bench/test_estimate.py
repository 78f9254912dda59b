# SPDX-License-Identifier: Apache-2.0
"""Quantiles and intervals: right on what is known, wide where little is known."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bench.estimate import estimate, median, quantile, ratio, total


def test_a_quantile_is_of_all_samples() -> None:
    found = estimate(3, quantile([[1, 2, 3], [4, 5, 6], [7, 8, 9]], 0.5))
    assert found.value == 5
    assert found.n == 3
    assert found.low <= 5 <= found.high


def test_equal_rounds_leave_no_doubt() -> None:
    found = estimate(10, median([7.0] * 10))
    assert (found.low, found.value, found.high) == (7, 7, 7)


def test_an_interval_has_the_truth_in_it_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(40):
        found = estimate(30, median(list(draw.normal(100, 10, 30))))
        hits += found.low <= 100 <= found.high
    assert 33 <= hits <= 40


def test_a_ratio_is_of_the_same_rounds() -> None:
    """A machine that is slow for a round is slow for both: the ratio knows no weather."""
    weather = [1.0, 10.0, 3.0, 7.0]
    above, below = [2 * w for w in weather], weather
    found = estimate(4, ratio(median(above), median(below)))
    assert (found.low, found.value, found.high) == (2, 2, 2)
    alone = estimate(4, median(above))
    assert alone.high > 2 * alone.low


def test_a_sum() -> None:
    found = estimate(2, total(median([1.0, 1.0]), quantile([[2], [2]], 0.99)))
    assert found.value == 3


def test_nothing_has_no_estimate() -> None:
    with pytest.raises(ValueError, match="no rounds"):
        estimate(0, median([]))
