"""REAP: router-weighted expert activation pruning (arXiv 2510.13999)."""

from __future__ import annotations

from conmoe.ops import scores
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics


@method("reap", paper="https://arxiv.org/abs/2510.13999", needs=("count", "gate_norm"), form="sliced")
def reap(statistics: LayerStatistics, experts: Experts, keep: int) -> LayerPlan:
    """Keep the experts that add most to the layer's output when they are chosen, drop the others.

    ``S_j = mean over the tokens of j of g_j(x) ||E_j(x)||``, an upper bound of what leaving it out costs a token. The
    rows of dropped experts leave the router, and the softmax runs over the survivors.
    """
    score_E = scores.score(statistics.sums, mean=True, alpha=1, beta=1)
    return scores.prune_lowest(score_E, statistics, keep)
