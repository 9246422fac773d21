"""How to Score Experts: one family of importance scores (arXiv 2606.15716).

``S_j = sum over the tokens of j of g_j(x)^alpha ||E_j(x)||^beta``, divided by their number if ``mean``. Two members are
methods of their own elsewhere: ``frequency`` (sum, 0, 0) and ``reap`` (mean, 1, 1).
"""

from __future__ import annotations

from typing import Annotated

from conmoe.ops import scores
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics

PAPER = "https://arxiv.org/abs/2606.15716"


@method("seer", paper=PAPER, needs=("gate",), form="sliced")
def seer(statistics: LayerStatistics, experts: Experts, keep: int) -> LayerPlan:
    """Keep the experts to which the router gives the most weight in all, drop the others.

    Score (sum, 1, 0): the sum of gates, SEER's soft count. Like frequency, but a weak choice counts little.
    """
    return _prune(statistics, keep, mean=False, alpha=1, beta=0)


@method("ean", paper=PAPER, needs=("norm",), form="sliced")
def ean(statistics: LayerStatistics, experts: Experts, keep: int) -> LayerPlan:
    """Keep the experts whose outputs are largest in all, before the gate, drop the others.

    Score (sum, 0, 1), the expert activation norm.
    """
    return _prune(statistics, keep, mean=False, alpha=0, beta=1)


@method("man", paper=PAPER, needs=("count", "norm"), form="sliced")
def man(statistics: LayerStatistics, experts: Experts, keep: int) -> LayerPlan:
    """Keep the experts whose outputs are largest on average, before the gate, drop the others.

    Score (mean, 0, 1), the mean activation norm: with MSAN the paper's best on text that is about no task in
    particular.
    """
    return _prune(statistics, keep, mean=True, alpha=0, beta=1)


@method("msan", paper=PAPER, needs=("count", "norm_squared"), form="sliced")
def msan(statistics: LayerStatistics, experts: Experts, keep: int) -> LayerPlan:
    """Keep the experts whose outputs have most energy on average, before the gate, drop the others.

    Score (mean, 0, 2), the mean squared activation norm.
    """
    return _prune(statistics, keep, mean=True, alpha=0, beta=2)


@method("score", paper=PAPER, needs=tuple(scores.SUMS.values()), form="sliced")
def score(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    mean: Annotated[bool, "divide by the number of tokens of the expert"] = False,
    alpha: Annotated[float, "exponent of the gate"] = 2.0,
    beta: Annotated[float, "exponent of the norm of the expert's output"] = 2.0,
) -> LayerPlan:
    """Keep the experts of highest score in a family of your choice, drop the others.

    With (alpha, beta) one of (0,0), (1,0), (2,0), (0,1), (0,2), (1,1), (2,2): those are summed while calibrating. The
    default (sum, 2, 2) is the energy that an expert adds to the layer's output; with (sum, 1, 1) the paper's best on
    the data of one task.
    """
    return _prune(statistics, keep, mean, alpha, beta)


def _prune(statistics: LayerStatistics, keep: int, mean: bool, alpha: float, beta: float) -> LayerPlan:
    return scores.prune_lowest(scores.score(statistics.sums, mean, alpha, beta), statistics, keep)
