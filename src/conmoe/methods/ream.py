"""REAM: router-weighted expert activation merging (arXiv 2604.04356)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import normalize

from conmoe.ops import coverage, fusion, plans, scores, similarity
from conmoe.ops.alignment import align as align_units
from conmoe.ops.alignment import mix_aligned
from conmoe.ops.experts import expert_hidden
from conmoe.ops.principal import principal_units
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics, TokenSample, UsageError

#: To how many numbers the weights of a hidden unit are reduced before units are compared.
COMPONENTS = 64


@method(
    "ream",
    paper="https://arxiv.org/abs/2604.04356",
    needs=("count", "gate_norm", "logit_gram", "sample", "weights"),
    form="sliced",
)
def ream(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    group_size: Annotated[int, "most experts that merge into one; 0: each joins the nearest centroid"] = 16,
    align: Annotated[bool, "bring hidden units into one order before they are averaged"] = True,
) -> LayerPlan:
    """Merge experts into those of highest REAP score near them, and leave only these in the router.

    The ``keep`` experts of highest REAP score are centroids. From the most salient on, each takes the nearest experts
    that are still free until its group has ``group_size`` members, so most of the less salient ones stay alone.
    Similarity of two experts is the mean of ``(1 + cosine) / 2`` of their mean outputs ``mean of p_i(x) E_i(x)``,
    ``p`` the softmax over the router logits of all experts, and of ``1 - d / max d``, ``d`` the distance of their
    columns of router logits, each scaled to length 1. Hidden units are permuted to match the centroid's at the least
    sum of two distances: of activations on all tokens of the sample, and of weights reduced to 64 principal
    components, both scaled to length 1. Weights are averaged in proportion to the REAP score. The router rows of all
    but the centroids go, and with them the gates of what was merged.

    Outputs are averaged before they are compared, as in the authors' code: for a single token the gate would cancel
    out of the cosine. Departures: the REAP score has the gates that the model uses, once (the authors' code multiplies
    outputs by the softmax, and by it again); where the groups are full before all experts are taken, the rest joins the
    nearest centroid (the authors refuse); an expert that no token chose adds nothing (they give it the lowest score of
    all); groups stay within their layer. The paper recomputes the inputs of each layer through the compressed ones
    before it: ``--sequential``.

    Cost: ``n E`` expert evaluations, the principal components, and a linear assignment for each merged expert.
    """
    if group_size < 0:
        raise UsageError(f"Option 'group_size' cannot be negative, as {group_size} is.")
    owner_E = statistics.owner_E.cpu()
    if keep == owner_E.numel():
        return plans.identity(keep)
    score_E = scores.score(statistics.sums, mean=True, alpha=1, beta=1).cpu()
    share_E = scores.share_within(score_E, owner_E)
    own = max(scores.own_by_default(statistics, keep), 1)  # fewer than one is refused
    centroid_K = scores.top(share_E, keep, owner_E, own)
    distance_EE = 1 - _similarity(statistics, experts).cpu()
    distance_EE[owner_E.unsqueeze(1) != owner_E] = torch.inf
    group_E = _groups(distance_EE, centroid_K, share_E, group_size)
    kept_E = plans.prune(centroid_K, owner_E.numel()).assignment_E
    plan = replace(plans.compose(kept_E, fusion.average(group_E, score_E)), scores={"score": score_E})
    merged_E = (plan.mixing_KE != 0)[(plan.mixing_KE != 0).sum(dim=1) > 1].any(dim=0)
    if not (align and merged_E.any()):
        return plan
    reference_E = torch.where(merged_E, centroid_K[group_E], torch.arange(owner_E.numel()))
    affinity = partial(_affinity, experts, statistics.sample, principal_units(experts, COMPONENTS))
    weights = mix_aligned(experts, plan.mixing_KE, align_units(experts, reference_E, affinity))
    return replace(plan, weights={name: tensor.cpu() for name, tensor in weights.items()})


def _similarity(statistics: LayerStatistics, experts: Experts) -> Tensor:
    """``[E, E]``, between 0 and 1 within a layer; without output, or logits, an expert is neither like nor unlike."""
    logits_nE = statistics.sample.logits_nE.float()
    share_nE = logits_nE.masked_fill(logits_nE.isnan(), -torch.inf).softmax(dim=1).nan_to_num(0.0)
    output_ED = normalize(similarity.mean_outputs(statistics.sample, experts, share_nE), eps=1e-30)
    cosine_EE = similarity.logit_cosine(statistics.sums["logit_gram"].to(output_ED.device))
    owner_E = statistics.owner_E.to(output_ED.device)
    outside_EE = owner_E.unsqueeze(1) != owner_E
    distance_EE = (2 - 2 * cosine_EE).clamp_min(0).sqrt().masked_fill(outside_EE, 0.0)
    farthest_E = distance_EE.amax(dim=1).expand_as(distance_EE).masked_fill(outside_EE, 0.0).amax(dim=1)
    near_EE = 1 - distance_EE / farthest_E.clamp_min(1e-30).unsqueeze(1)
    return ((1 + output_ED @ output_ED.T) / 2 + near_EE) / 2


def _groups(distance_EE: Tensor, centroid_K: Tensor, salience_E: Tensor, group_size: int) -> Tensor:
    """The position in ``centroid_K`` of the centroid that each expert merges into."""
    group_E = torch.full_like(salience_E, -1, dtype=torch.int64)
    group_E[centroid_K] = torch.arange(centroid_K.numel())
    for position in salience_E[centroid_K].argsort(descending=True, stable=True).tolist() if group_size else ():
        near_E = distance_EE[centroid_K[position]]
        free = near_E.argsort(stable=True)
        free = free[(group_E[free] < 0) & near_E[free].isfinite()]
        group_E[free[: group_size - 1]] = position
    return torch.where(group_E < 0, coverage.nearest(distance_EE, centroid_K), group_E)


def _affinity(experts: Experts, sample: TokenSample, principal_EIC: Tensor, reference: int, expert: int) -> Tensor:
    """Minus the distance of every two hidden units, by activation and by weight."""
    x_nD = sample.hidden_nD[~sample.logits_nE[:, reference].isnan()].to(experts.gate_EID.device)
    activation = [expert_hidden(experts, e, x_nD).float().T for e in (reference, expert)]
    weight = [principal_EIC[e] for e in (reference, expert)]
    return -(_distance(*activation) + _distance(*weight))


def _distance(a_If: Tensor, b_If: Tensor) -> Tensor:
    return torch.cdist(normalize(a_If, eps=1e-30), normalize(b_If, eps=1e-30))
