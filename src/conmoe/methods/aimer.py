"""AIMER: expert pruning without calibration (arXiv 2603.18492)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from conmoe.ops import scores
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics


@method("aimer", paper="https://arxiv.org/abs/2603.18492", needs=("weights",), form="sliced")
def aimer(statistics: LayerStatistics, experts: Experts, keep: int) -> LayerPlan:
    """Keep the experts whose weights have the heaviest tails, drop the others; no calibration data is looked at.

    ``a_j = mean |w| / rms(w)`` over all weights of gate, up and down together: 0.80 for Gaussian weights, 1 for weights
    of one size, less the more a few weights stand out. The highest go. Biases do not count.
    """
    flatness_E = _flatness(experts)
    plan = scores.prune_lowest(1.0 / flatness_E, statistics, keep)
    return replace(plan, scores={**plan.scores, "mean_over_rms": flatness_E})


def _flatness(experts: Experts) -> Tensor:
    """``a_E``, in float64; an expert that is all zeros is as flat as can be."""
    matrices = experts.gate_EID, experts.up_EID, experts.down_EDI
    return torch.stack([scores.flatness([matrix[e] for matrix in matrices]) for e in range(len(matrices[0]))]).cpu()
