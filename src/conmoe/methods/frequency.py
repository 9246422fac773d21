"""Keep the experts the router chooses most often."""

from __future__ import annotations

from conmoe.ops import scores
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics


@method("frequency", paper="baseline", needs=("count",), form="sliced")
def frequency(statistics: LayerStatistics, experts: Experts, keep: int) -> LayerPlan:
    """Keep the experts that most calibration tokens chose, drop the others.

    Score (b, alpha, beta) = (0, 0, 0) of "How to Score Experts" (arXiv 2606.15716). Knows nothing about what an expert
    says, only how often it is asked.
    """
    score_E = scores.score(statistics.sums, mean=False, alpha=0, beta=0)
    return scores.prune_lowest(score_E, statistics, keep)
