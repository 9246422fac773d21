"""Importance scores from sums over tokens, and the choice of the highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conmoe.ops import plans
from conmoe.types import LayerPlan, LayerStatistics, UsageError

#: Which statistic is the sum over tokens of g^alpha * ||E||^beta.
SUMS: dict[tuple[float, float], str] = {
    (0, 0): "count",
    (1, 0): "gate",
    (2, 0): "gate_squared",
    (0, 1): "norm",
    (0, 2): "norm_squared",
    (1, 1): "gate_norm",
    (2, 2): "gate_norm_squared",
}


def score(sums: Mapping[str, Tensor], mean: bool, alpha: float, beta: float) -> Tensor:
    """``S_j = sum over its tokens of g^alpha ||E_j||^beta``, divided by their number if ``mean`` ("How to Score
    Experts", arXiv 2606.15716): (0,0,0) frequency, (0,1,0) SEER, (0,0,1) EAN, (1,1,1) REAP, (1,0,1) MAN, (1,0,2) MSAN.

    An expert without tokens scores 0.

    Raises:
        UsageError: no statistic is the sum with these exponents.
    """
    if (alpha, beta) not in SUMS:
        known = ", ".join(map(str, SUMS))
        raise UsageError(f"No statistic sums g^{alpha:g} ||E||^{beta:g}; known exponents are {known}.")
    total_E = sums[SUMS[alpha, beta]].double()
    return total_E / sums["count"].clamp_min(1) if mean else total_E


def prune_lowest(score_E: Tensor, statistics: LayerStatistics, keep: int) -> LayerPlan:
    """Keep the ``keep`` experts of highest score, each score a share of its layer's, and drop the others.

    In a scope every layer keeps as many as its router picks.
    """
    if keep == score_E.numel():
        return plans.identity(keep)
    owner_E = statistics.owner_E
    kept_K = top(share_within(score_E, owner_E), keep, owner_E, own_by_default(statistics, keep))
    return replace(plans.prune(kept_K, score_E.numel()), scores={"score": score_E})


def flatness(matrices_ab: Sequence[Tensor]) -> Tensor:
    """``mean |w| / rms(w)`` over all weights of one expert (AIMER, arXiv 2603.18492), in float64; 1 if all are zero."""
    size = sum(matrix_ab.numel() for matrix_ab in matrices_ab)
    absolute, square = (
        torch.stack([torch.linalg.vector_norm(w_ab, ord=order, dtype=torch.float64) for w_ab in matrices_ab]) ** order
        for order in (1, 2)
    )
    total = absolute.sum()
    return torch.where(total > 0, total / (size * square.sum()).sqrt(), 1.0)


def minmax(value_E: Tensor) -> Tensor:
    """``(v - min v) / (max v - min v + 1e-12)``: all zero where all are equal."""
    return (value_E - value_E.min()) / (value_E.max() - value_E.min() + 1e-12)


def share_within(value_E: Tensor, owner_E: Tensor) -> Tensor:
    """``value_E`` over its sum in the layer ``owner_E``; even shares where a layer sums to zero.

    Norms grow with depth, so raw scores of two layers of a scope cannot be compared.
    """
    value_E = value_E.double()
    size_W = torch.bincount(owner_E).double()
    total_W = torch.zeros_like(size_W).index_add_(0, owner_E, value_E)
    even_E = 1.0 / size_W[owner_E]
    return torch.where(total_W[owner_E] > 0, value_E / total_W[owner_E], even_E)


def top(score_E: Tensor, keep: int, owner_E: Tensor | None = None, min_own: int = 0) -> Tensor:
    """The ``keep`` experts of highest score in ascending order, at least ``min_own`` of each layer; ties to the lower
    index.
    """
    order_E = score_E.argsort(descending=True, stable=True)
    if owner_E is not None and min_own > 0:
        check_min_own(owner_E, keep, min_own)
        ranked_owner_E = owner_E[order_E]
        own_E = torch.zeros_like(order_E, dtype=torch.bool)
        for layer in range(int(owner_E.max()) + 1):
            own_E[(ranked_owner_E == layer).nonzero().flatten()[:min_own]] = True
        order_E = torch.cat([order_E[own_E], order_E[~own_E]])
    return order_E[:keep].sort().values


def own_by_default(statistics: LayerStatistics, keep: int) -> int:
    """As many prototypes of its own for each layer of a scope as its router picks, where there are so many."""
    size_W = layer_sizes(statistics.owner_E)
    return min(statistics.sample.index_nk.shape[1], keep // size_W.numel(), int(size_W.min()))


def layer_sizes(owner_E: Tensor) -> Tensor:
    """How many experts of each layer of a scope are to be planned; layers without any are left out."""
    size_W = torch.bincount(owner_E)
    return size_W[size_W > 0]


def check_min_own(owner_E: Tensor, keep: int, min_own: int) -> None:
    """Raise :class:`UsageError` where ``keep`` prototypes cannot give every layer ``min_own`` of its own."""
    size_W = layer_sizes(owner_E)
    if min_own * size_W.numel() > keep or int(size_W.min()) < min_own:
        raise UsageError(
            f"{keep} prototypes cannot give each of {size_W.numel()} layers {min_own} of its own; "
            "keep more, or lower min_own."
        )
