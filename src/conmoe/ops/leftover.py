"""What a plan leaves of a layer's output, token by token, for every kind of plan, and its standard error.

``n`` tokens, ``E`` experts of a layer, ``M`` of a scope, ``K`` prototypes, ``k`` slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from conmoe.ops.answers import open_answers, source_output
from conmoe.ops.experts import mix, tensors
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
        outputs = _outputs(shifted, replace(wide, reroute=reroute), plan)
        parts.append([value_nD.double().square().sum(dim=1).cpu() for value_nD in outputs])
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


def _outputs(sample: TokenSample, experts: Experts, plan: LayerPlan) -> tuple[Tensor, Tensor]:
    """``residual_nD, source_nD`` of one layer."""
    if plan.static_K is None:
        found = open_answers(sample, experts, plan)
        return found.residual_nD, found.source_nD
    source_nD = source_output(sample, experts)
    n, K = sample.index_nk.shape[0], plan.static_K.numel()
    if K == 0:
        return source_nD, source_nD
    made: dict[str, Any] = {
        name: plan.weights[name].to(tensor) if name in plan.weights else mix(tensor, plan.mixing_KE)
        for name, tensor in tensors(experts).items()
    }
    every = replace(sample, index_nk=torch.arange(K).expand(n, K), weight_nk=plan.static_K.float().expand(n, K))
    return source_nD - source_output(every, replace(experts, **made)), source_nD


def _dense(plan: LayerPlan) -> LayerPlan:
    factors, dense = from_weights(plan.weights)
    if not factors:
        return plan
    return replace(plan, weights={**dense, **{name: reconstruct(item) for name, item in factors.items()}})


def _shifted(
    reroute: Callable[..., tuple[Tensor, Tensor]],
    first: int,
    E: int,
    hidden_nD: Tensor,
    kept_M: Tensor,
    router_KD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The router of one layer, asked and answering in the numbers of the scope."""
    own = (kept_M >= first) & (kept_M < first + E)
    rows = () if router_KD is None else (router_KD[own.to(router_KD.device)],)
    index_nk, weight_nk = reroute(hidden_nD, kept_M[own] - first, *rows)
    return torch.where(index_nk < 0, index_nk, index_nk + first), weight_nk
