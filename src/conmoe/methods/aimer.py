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
    size = sum(matrix[0].numel() for matrix in matrices)
    absolute_E = torch.stack([_sums(matrix, order=1) for matrix in matrices]).sum(dim=0)
    square_E = torch.stack([_sums(matrix, order=2) for matrix in matrices]).sum(dim=0)
    return torch.where(square_E > 0, absolute_E / (size * square_E).sqrt(), 1.0)


def _sums(matrix_Eab: Tensor, order: int) -> Tensor:
    """``sum of |w|^order`` of each expert, without a float64 copy of the weights."""
    norms = [torch.linalg.vector_norm(matrix_ab, ord=order, dtype=torch.float64) for matrix_ab in matrix_Eab]
    return torch.stack(norms).cpu() ** order
