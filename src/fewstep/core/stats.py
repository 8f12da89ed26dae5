"""A figure with its confidence interval, and the bootstrap over prompts that gives one.

Images of one prompt are not independent, so whole prompts are resampled, not images: each
prompt is first reduced to one number, and whole prompts are drawn with replacement (Efron and Tibshirani,
*An Introduction to the Bootstrap*, chapters 8 and 13: cluster resampling, percentile interval).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Confidence of every interval of this room."""

Z = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""

DRAWS = 2000
"""Bootstrap draws; the interval's ends then move by about 1 % of its width between generator seeds."""


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % confidence interval ``[low, high]``.

    Attributes:
        value: the figure.
        low: lower end.
        high: upper end.
        without: the figure with each group left out, ``[G]``, where the interval is a jackknife's: the
            difference of two such figures over the same groups has an interval of its own.
    """

    value: float
    low: float
    high: float
    without: tuple[float, ...] | None = None


def mean(values: NDArray[np.floating]) -> Interval:
    """Mean over prompts, ``values [P]``, with its percentile bootstrap interval.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise ValueError("a mean needs at least one prompt")
    return _interval(float(values.mean()), _resample(len(values)) @ values / len(values))


def ratio(above: NDArray[np.floating], below: NDArray[np.floating]) -> Interval | None:
    """Ratio of two means over the same prompts (``[P]`` each), prompts resampled together.

    Returns ``None`` when the denominator is zero: the ratio has no value then. An end of the interval is
    infinite when that happens in more than 2.5 % of the draws.
    """
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if above.shape != below.shape:
        raise ValueError("a paired ratio needs the same prompts on both sides")
    if below.sum() == 0:
        return None
    counts = _resample(len(above))
    top, bottom = counts @ above, counts @ below
    draws = np.divide(top, bottom, out=np.full_like(top, np.inf), where=bottom > 0)
    return _interval(float(above.sum() / below.sum()), draws)


def jackknife(value: float, without: NDArray[np.floating]) -> Interval:
    """A figure with its delete-one-group interval (Efron and Tibshirani, chapter 11).

    Args:
        value: over all groups.
        without: with each group left out, ``[G]``.
    """
    without = np.asarray(without, np.float64)
    count = len(without)
    error = float(np.sqrt((count - 1) / count * np.sum((without - without.mean()) ** 2)))
    return Interval(value, value - Z * error, value + Z * error, tuple(without.tolist()))


def _resample(size: int) -> NDArray[np.float64]:
    """How often each of ``size`` prompts is drawn, ``[DRAWS, size]``; the same at every call."""
    rng = np.random.Generator(np.random.Philox(key=0))
    return rng.multinomial(size, np.full(size, 1 / size), size=DRAWS).astype(np.float64)


def _interval(value: float, draws: NDArray[np.float64]) -> Interval:
    tail = (1 - LEVEL) / 2
    # No interpolation between draws: it would make NaN of an infinite end.
    low, high = np.quantile(draws, [tail, 1 - tail], method="inverted_cdf")
    return Interval(value, float(low), float(high))
