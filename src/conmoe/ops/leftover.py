"""What a plan leaves of a layer's output, token by token, for every kind of plan, and its standard error.

``n`` tokens, ``E`` experts of a layer, ``M`` of a scope, ``K`` prototypes, ``k`` slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from conmoe.ops.answers import Answers, answer, open_answers, source_output, tokens_of
from conmoe.ops.factors import from_weights, reconstruct
from conmoe.types import Experts, LayerPlan, TokenSample


@torch.no_grad()
def leftover(
    samples: Sequence[TokenSample], experts: Sequence[Experts], wide: Experts, plan: LayerPlan
) -> tuple[Tensor, Tensor]:
    """``(residual_n, source_n)``: ``||y - y'||^2`` and ``||y||^2`` of each token, in float64.

    Condensed layers and experts stored as factors are understood too; of a factored matrix what is measured is its
    product, rounded to the dtype of the source.

    Args:
        samples: of each layer of the scope.
        experts: of each layer of the scope, with their own routers, which are asked where the plan drops experts.
        wide: all experts of the scope in one row, as :func:`conmoe.ops.subsets.join_layers` gives them.
        plan: of the scope.
    """
    plan, first = _dense(plan), 0
    parts = []
    for sample, own in zip(samples, experts, strict=True):
        E = own.gate_EID.shape[0]
        reroute = None if own.reroute is None else partial(_shifted, own.reroute, first, E)
        shifted = replace(sample, index_nk=sample.index_nk + first)
        found = _open(shifted, replace(wide, reroute=reroute), plan)
        parts.append([value_nD.double().square().sum(dim=1).cpu() for value_nD in (found.residual_nD, found.source_nD)])
        first += E
    residual, source = zip(*parts, strict=True)
    return torch.cat(residual), torch.cat(source)


def ratio(above_n: Tensor, below_n: Tensor) -> tuple[float, float]:
    """``sum above / sum below`` and its standard error, to first order, as if tokens were independent.

    Tokens of one sequence are not quite, so the true error is larger. The error of a single token is NaN.
    """
    n, total = above_n.numel(), float(below_n.sum()) or 1.0
    value = float(above_n.sum()) / total
    spread = float((above_n - value * below_n).square().sum())
    return value, sqrt(spread * n / (n - 1)) / total if n > 1 else float("nan")


def reached(sample: TokenSample, plan: LayerPlan) -> Tensor:
    """``tokens_K``: how many tokens of the sample chose an expert that each prototype answers for.

    Where the plan drops experts, some of the tokens that had chosen these come on top.
    """
    K = plan.mixing_KE.shape[0]
    index_nk = sample.index_nk.long().cpu()
    answer_nk = plan.assignment_E[index_nk].masked_fill(index_nk < 0, -1)
    member_nK = torch.zeros(len(answer_nk), K + 1, dtype=torch.bool)
    outside_nk = (answer_nk < 0) | (answer_nk >= K)
    member_nK.scatter_(1, answer_nk.masked_fill(outside_nk, K), True)
    return member_nK[:, :K].sum(dim=0)


def _open(sample: TokenSample, experts: Experts, plan: LayerPlan) -> Answers:
    if plan.static_K is None:
        return open_answers(sample, experts, plan)
    x_nD, source_nD = sample.hidden_nD.to(experts.gate_EID.device), source_output(sample, experts)
    n, K = len(x_nD), plan.static_K.numel()
    every_nK = torch.arange(K, device=x_nD.device).expand(n, K)
    gate_nK = plan.static_K.float().to(x_nD.device).expand(n, K)
    found = Answers(experts, plan, x_nD, every_nK, every_nK, gate_nK, source_nD, source_nD.clone())
    for number in range(K):
        rows, share_n = tokens_of(found, number)
        found.residual_nD.index_add_(0, rows, -share_n.unsqueeze(1) * answer(found, number, rows))
    return found


def _dense(plan: LayerPlan) -> LayerPlan:
    factors, dense = from_weights(plan.weights)
    if not factors:
        return plan
    return replace(plan, weights={**dense, **{name: reconstruct(item) for name, item in factors.items()}})


def _shifted(
    reroute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], first: int, E: int, hidden_nD: Tensor, kept_M: Tensor
) -> tuple[Tensor, Tensor]:
    """The router of one layer, asked and answering in the numbers of the scope."""
    own_K = kept_M[(kept_M >= first) & (kept_M < first + E)] - first
    index_nk, weight_nk = reroute(hidden_nD, own_K)
    return torch.where(index_nk < 0, index_nk, index_nk + first), weight_nk
