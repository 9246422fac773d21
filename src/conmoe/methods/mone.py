"""MoNE: pruned experts become constant vectors, "novices" (arXiv 2507.00390)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from conmoe.ops import plans
from conmoe.ops.experts import expert_hidden
from conmoe.ops.scores import share_within, top
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics, TokenSample, UsageError

Ranking = Literal["fusion", "gate", "output_variance", "input_variance", "unit_variance"]


@method(
    "mone", paper="https://arxiv.org/abs/2507.00390", needs=("count", "gate", "output", "output_squared", "weights")
)
def mone(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    ranking: Annotated[Ranking, "which experts are kept: those of highest ..."] = "fusion",
    constant: Annotated[Literal["mean", "zero"], "what answers for the others; zero is the ablation"] = "mean",
) -> LayerPlan:
    """Keep the experts that are chosen often and vary; each other one answers with its own mean output.

    ``r_j = mean gate_j * ||std of E_j(x)||`` ("fusion"): the gate over all tokens of the layer, zero where ``j`` was
    not chosen, so that use counts; the deviation over the tokens of ``j``. Other rankings take the gate alone, or the
    norm of a variance: of the output, of what the expert reads ("input_variance"), or of its hidden units, each times
    the squared norm of its column in the down projection ("unit_variance"); the last two look at the token sample.
    The router stays, and the gate of a pruned expert multiplies its constant. Variances are unbiased and exact, from
    sums; the authors' code runs an approximate update. An expert without tokens is the first to go, and its constant
    is zero.

    In a scope each layer is ranked by shares, as norms grow with depth.
    """
    owner_E = statistics.owner_E
    if keep == owner_E.numel():
        return plans.identity(keep)
    rank_E = share_within(RANKINGS[ranking](statistics, experts), owner_E)
    kept_K = top(rank_E, keep)
    plan = plans.prune(kept_K, owner_E.numel())
    pruned = plan.assignment_E < 0
    mean_ED = _mean(statistics.sums, "output") * (constant == "mean")
    assignment_E = plan.assignment_E.clone()
    assignment_E[pruned] = keep + torch.arange(int(pruned.sum()))
    constant_CD = mean_ED[pruned].to(torch.float32)
    return replace(plan, assignment_E=assignment_E, constant_CD=constant_CD, scores={"score": rank_E})


def _mean(sums: Mapping[str, Tensor], name: str) -> Tensor:
    total, count_E = sums[name], sums["count"].clamp_min(1)
    return total / count_E.view(-1, *[1] * (total.ndim - 1))


def _gate(statistics: LayerStatistics, experts: Experts) -> Tensor:
    # over all tokens of the layer: their number is the same for all experts
    return statistics.sums["gate"].double()


def _output_variances(statistics: LayerStatistics) -> Tensor:
    """``[E, D]``, unbiased; zero for an expert of fewer than two tokens."""
    mean_ED, square_ED = _mean(statistics.sums, "output"), _mean(statistics.sums, "output_squared")
    count_E1 = statistics.sums["count"].double().unsqueeze(1)
    variance_ED: Tensor = (square_ED - mean_ED.square()).clamp_min(0) * count_E1 / (count_E1 - 1).clamp_min(1)
    return torch.where(count_E1 > 1, variance_ED, 0.0)


def _output_variance(statistics: LayerStatistics, experts: Experts) -> Tensor:
    norm_E: Tensor = torch.linalg.vector_norm(_output_variances(statistics), dim=1)
    return norm_E


def _fusion(statistics: LayerStatistics, experts: Experts) -> Tensor:
    return _gate(statistics, experts) * _output_variances(statistics).sum(dim=1).sqrt()


def _input_variance(statistics: LayerStatistics, experts: Experts) -> Tensor:
    return _variance_of(statistics.sample, experts, lambda expert, x_nD: x_nD.double())


def _unit_variance(statistics: LayerStatistics, experts: Experts) -> Tensor:
    def units(expert: int, x_nD: Tensor) -> Tensor:
        norm_I: Tensor = torch.linalg.vector_norm(experts.down_EDI[expert].double(), dim=0)
        return expert_hidden(experts, expert, x_nD).double() * norm_I

    return _variance_of(statistics.sample, experts, units)


def _variance_of(sample: TokenSample, experts: Experts, value: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The norm of the variances of the components of ``value(expert, x)`` over the sample tokens of each expert."""
    if not sample.hidden_nD.shape[0]:
        raise UsageError("This ranking looks at the token sample, and there is none; calibrate with --sample.")
    found = torch.zeros(experts.gate_EID.shape[0], dtype=torch.float64)
    for expert in range(found.numel()):
        x_nD = sample.hidden_nD[(sample.index_nk == expert).any(dim=1)]
        if len(x_nD) > 1:
            found[expert] = torch.linalg.vector_norm(value(expert, x_nD).var(dim=0)).cpu()
    return found


RANKINGS: dict[str, Callable[[LayerStatistics, Experts], Tensor]] = {
    "fusion": _fusion,
    "gate": _gate,
    "output_variance": _output_variance,
    "input_variance": _input_variance,
    "unit_variance": _unit_variance,
}
