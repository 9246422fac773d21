"""Means with standard errors, and differences of two models that answered the same documents.

The difference is taken document by document. What makes a document hard for both models cancels, so that its standard
error is usually far below that of either mean; an interval of one model against one of the other would not see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from conmoe.evaluate.fidelity import Measured


@dataclass(frozen=True, slots=True)
class Discordant:
    """Documents that exactly one of two models got right, and McNemar's exact two-sided p of that split."""

    only_model: int
    only_source: int
    p: float


def mean(values: Sequence[float]) -> Measured:
    """The mean and its standard error: the sample's standard deviation (``n - 1``) over ``sqrt(n)``.

    The error of one value is not known (NaN), the mean of none neither. What is too large for a float is infinite, and
    the mean of infinities that contradict each other NaN.
    """
    n = len(values)
    if not n:
        return Measured(math.nan, math.nan)
    value = _sum(values) / n
    if n == 1:
        return Measured(value, math.nan)
    variance = _sum([(each - value) * (each - value) for each in values]) / (n - 1)
    return Measured(value, math.sqrt(variance / n))


def difference(model: Sequence[float], source: Sequence[float]) -> Measured:
    """The mean of ``model - source`` over documents that stand at the same place in both."""
    return mean([a - b for a, b in zip(model, source, strict=True)])


def weighted(parts: Sequence[Measured], weights: Sequence[float]) -> Measured:
    """``sum w m / sum w`` of independent means, with the error that follows from theirs."""
    total = math.fsum(weights)
    value = _sum([w * part.value for w, part in zip(weights, parts, strict=True)]) / total
    errors = [w * part.stderr for w, part in zip(weights, parts, strict=True)]
    return Measured(value, math.sqrt(_sum([error * error for error in errors])) / total)


def _sum(values: Sequence[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond the largest float, or infinities of both signs
        return sum(values)


def discordant(model: Sequence[float], source: Sequence[float]) -> Discordant | None:
    """McNemar's exact test; None unless all values are 0 or 1."""
    if not {*model, *source} <= {0.0, 1.0}:
        return None
    gained = sum(a > b for a, b in zip(model, source, strict=True))
    lost = sum(a < b for a, b in zip(model, source, strict=True))
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Discordant(gained, lost, p)


def as_json(found: Measured) -> dict[str, float | None]:
    """Plain numbers; what cannot be known is null."""
    return {name: None if math.isnan(x) else x for name, x in (("value", found.value), ("stderr", found.stderr))}
