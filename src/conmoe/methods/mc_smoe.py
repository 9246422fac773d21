"""MC-SMoE: merge experts, guided by the router, then compress what is left (arXiv 2310.01334)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from conmoe.ops import coverage, plans, similarity
from conmoe.ops.alignment import activation_affinity, align, mix_aligned, weight_affinity
from conmoe.ops.experts import expert_hidden, mix, tensors
from conmoe.ops.factors import decompose, stable_rank, to_weights
from conmoe.ops.fusion import average
from conmoe.ops.scores import top
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics, TokenSample

NEEDS = ("count", "logit_gram", "sample", "weights")
MATRICES = ("gate_EID", "up_EID", "down_EDI")

Grouping = Annotated[
    Literal["router_logits", "weight", "mean_output", "functional"], "what makes an expert join a dominant one"
]
Align = Annotated[
    Literal["weight", "activation", "none"], "bring hidden units into one order before they are averaged, by what"
]
Reference = Annotated[Literal["dominant", "first"], "whose order of hidden units: the dominant expert's, or expert 0's"]


@method("m-smoe", paper="https://arxiv.org/abs/2310.01334", needs=NEEDS, budget="dominant")
def m_smoe(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    grouping: Grouping = "router_logits",
    align: Align = "weight",
    reference: Reference = "dominant",
) -> LayerPlan:
    """Merge each expert into the frequently used one whose router logits are most like its own.

    With ``f_e`` the uses of an expert over those of the most used one of its layer: the ``keep`` experts of highest
    ``f`` are dominant, and every other joins the dominant expert of its layer with the highest ``(cosine + 1) / 2`` of
    their columns of router logits over all calibration tokens. Hidden units are permuted to match those of the
    dominant expert, and ``W = sum f_e W_e / sum f_e`` (section 3). The router is unchanged, members are redirected.
    ``grouping`` has features of the paper's ablation instead: distance of weights, of mean outputs, of outputs on the
    tokens an expert gets.

    Departures. The paper aligns every expert to expert 0 before it groups (``reference="first"`` aligns to it, after
    grouping, so ``grouping="weight"`` compares experts as they are); two experts are closer when aligned to one
    another. Groups of one used expert are copies. The choice of dominant experts over all layers at once is the budget
    ``dominant``, the default; within a scope it is made as the paper does, and groups stay within their layer. The
    paper tunes the merged model afterwards, we do not.

    Cost: one affinity (``6 D I^2``) and one linear assignment for each merged expert.
    """
    if keep == statistics.owner_E.numel():
        return plans.identity(keep)
    plan, dominant_E = _merged(statistics, experts, keep, grouping)
    return _aligned(
        plan, statistics, experts, align, dominant_E if reference == "dominant" else _first(statistics.owner_E)
    )


@method("mc-smoe", paper="https://arxiv.org/abs/2310.01334", needs=NEEDS, budget="dominant")
def mc_smoe(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    grouping: Grouping = "router_logits",
    align: Align = "weight",
    reference: Reference = "dominant",
    rank: Annotated[int, "rank of the dense part of each matrix"] = 32,
    ratio: Annotated[float, "share of the rows (or columns) that are kept of what the low rank leaves"] = 0.1,
    structure: Annotated[Literal["rows", "columns"], "what is kept or dropped as a whole"] = "rows",
    importance: Annotated[
        Literal["energy", "output"], "a row's own size, or the output error without it on the token sample"
    ] = "energy",
) -> LayerPlan:
    """Merge as m-smoe does, then store each matrix as a low rank plus a few whole rows of the rest.

    ``W = left right + S`` (section 3): the truncated singular value decomposition, and of the residual the ``ratio``
    of rows of highest mean energy, ranked over all matrices of the layer. ``importance="output"`` takes the energy of
    a row's products with the inputs of its matrix instead, times the gates of the tokens routed to the group, as a
    share of the energy of all outputs of that kind of matrix. The stable ranks ``||W||_F^2 / ||W||_2^2`` before and
    after merging (mean over gate, up and down) are among the scores: the paper's reason why merged experts bear it.

    Departures. The paper learns importance by tuning, |s dL/ds| averaged over a row or column, while the ratio falls
    from 1 to 0.1, and tunes what is left with distillation; without tuning expect to lose more. For the paper's way,
    keep all rows here (``ratio=1.0``) and let ``conmoe tune --mode prune`` choose. With ``keep=1.0`` nothing is
    decomposed.
    """
    if keep == statistics.owner_E.numel():
        return plans.identity(keep)
    plan = m_smoe(statistics, experts, keep, grouping=grouping, align=align, reference=reference)
    prototypes = _prototypes(experts, plan)
    inputs = partial(_inputs, statistics.sample, prototypes, plan.assignment_E) if importance == "output" else None
    matrices = {name: tensors(prototypes)[name] for name in MATRICES}
    factors = to_weights(decompose(matrices, rank, ratio, structure, inputs))
    scores = {
        "stable_rank_before": _stable_ranks(experts),
        "stable_rank_after": _stable_ranks(prototypes)[plan.assignment_E],
    }
    return replace(
        plan,
        weights={name: tensor for name, tensor in plan.weights.items() if name not in MATRICES}
        | {name: tensor.cpu() for name, tensor in factors.items()},
        scores=dict(plan.scores) | scores,
    )


def _merged(statistics: LayerStatistics, experts: Experts, keep: int, grouping: str) -> tuple[LayerPlan, Tensor]:
    """The plan before alignment, and the dominant expert of each expert's group."""
    owner_E, count_E = statistics.owner_E, statistics.sums["count"].cpu()
    frequency_E = _of_maximum(count_E, owner_E)
    dominant_K = top(frequency_E, keep, owner_E, min_own=1)
    cost_EE = _dissimilarity(grouping, statistics, experts).masked_fill(owner_E != owner_E.unsqueeze(1), torch.inf)
    assignment_E = coverage.nearest(cost_EE, dominant_K)
    plan = plans.compose(assignment_E, average(assignment_E, frequency_E))
    return replace(plan, scores={"frequency": frequency_E}), dominant_K[assignment_E]


def _of_maximum(count_E: Tensor, owner_E: Tensor) -> Tensor:
    """Uses over those of the most used expert of the layer (section 3): 1 for that one, all zero without any use."""
    most_W = torch.zeros(int(owner_E.max()) + 1, dtype=torch.float64)
    most_W.scatter_reduce_(0, owner_E, count_E.double(), "amax")
    return count_E.double() / most_W[owner_E].clamp_min(1)


def _dissimilarity(grouping: str, statistics: LayerStatistics, experts: Experts) -> Tensor:
    if grouping == "router_logits":
        return (1 - similarity.logit_cosine(statistics.sums["logit_gram"].cpu())) / 2
    distance = {
        "weight": similarity.weight_distance,
        "mean_output": similarity.mean_output_distance,
        "functional": similarity.functional_distance,
    }[grouping]
    return distance(statistics.sample, experts).cpu()


def _aligned(
    plan: LayerPlan, statistics: LayerStatistics, experts: Experts, align_by: str, reference_E: Tensor
) -> LayerPlan:
    """The plan with prototypes averaged from permuted members; as it is where no permutation gains anything."""
    if align_by == "none":
        return plan
    hidden_nD, known_nE = statistics.sample.hidden_nD, ~statistics.sample.logits_nE.isnan()
    affinity = {
        "weight": lambda reference, expert: weight_affinity(experts, reference, expert),
        "activation": lambda reference, expert: activation_affinity(
            experts, hidden_nD[known_nE[:, reference]], reference, expert
        ),
    }[align_by]
    mixed_E = (plan.mixing_KE != 0)[(plan.mixing_KE != 0).sum(dim=1) > 1].any(dim=0)
    own_E = torch.arange(mixed_E.numel())
    permutation_EI = align(experts, torch.where(mixed_E, reference_E, own_E), affinity)
    if not (permutation_EI != torch.arange(permutation_EI.shape[1])).any():
        return plan
    weights = mix_aligned(experts, plan.mixing_KE, permutation_EI)
    return replace(plan, weights={name: tensor.cpu() for name, tensor in weights.items()})


def _first(owner_E: Tensor) -> Tensor:
    """The first expert of each expert's own layer."""
    first_W = torch.stack([(owner_E == layer).int().argmax() for layer in range(int(owner_E.max()) + 1)])
    return first_W[owner_E]


def _prototypes(experts: Experts, plan: LayerPlan) -> Experts:
    made: dict[str, Any] = {
        name: plan.weights[name].to(tensor.device) if name in plan.weights else mix(tensor, plan.mixing_KE)
        for name, tensor in tensors(experts).items()
    }
    return replace(experts, **made, reroute=None)


def _inputs(sample: TokenSample, prototypes: Experts, assignment_E: Tensor, name: str, prototype: int) -> Tensor:
    """What one matrix of a prototype is multiplied by, on the tokens that choose it, times their gates."""
    # a slot of -1, outside, reads the last element
    answers_E = torch.cat([assignment_E == prototype, torch.zeros(1, dtype=torch.bool)])
    answers_nk = answers_E.to(sample.index_nk.device)[sample.index_nk.long()]
    gate_n = (sample.weight_nk.float() * answers_nk).sum(dim=1)
    routed_n = gate_n != 0
    x_nI = sample.hidden_nD[routed_n].to(prototypes.gate_EID.device)
    if name == "down_EDI":
        x_nI = expert_hidden(prototypes, prototype, x_nI)
    return x_nI.float() * gate_n[routed_n].unsqueeze(1).to(x_nI.device)


def _stable_ranks(experts: Experts) -> Tensor:
    """The mean over gate, up and down of each expert."""
    ranks = [[stable_rank(matrix) for matrix in tensors(experts)[name]] for name in MATRICES]
    return torch.tensor(ranks, dtype=torch.float64).mean(dim=0)
