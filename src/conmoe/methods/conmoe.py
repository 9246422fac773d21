"""ConMoE: expert-pool consolidation by prototype reassignment (arXiv 2605.29350)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from conmoe.ops import coverage, plans
from conmoe.ops.fusion import average_own
from conmoe.ops.scores import minmax, own_by_default, score, share_within, top
from conmoe.ops.similarity import functional_distance, mean_output_distance, weight_distance
from conmoe.ops.subsets import thinned
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics, TokenSample, UsageError

Signal = Literal["both", "contribution", "replaceability"]

DISTANCES: dict[str, Callable[[TokenSample, Experts], Tensor]] = {
    "functional": functional_distance,
    "weight": weight_distance,
    "mean_output": mean_output_distance,
}
#: (mean, alpha, beta) of the score family. "mean" is the REAP score, with which the product rule is usually stated;
#: "sum" weighs an expert by all it does, as the error of the layer does, and measured better under coverage.
CONTRIBUTIONS = {"mean": (True, 1, 1), "sum": (False, 1, 1), "man": (True, 0, 1), "frequency": (False, 0, 0)}
#: What an unused expert weighs, against an average one, when experts are to be covered: it gets a prototype of its own
#: only where nothing that is used gains from it.
UNUSED = 1e-6


@method(
    "conmoe",
    paper="https://arxiv.org/abs/2605.29350",
    needs=("count", "norm", "gate_norm", "gate_norm_squared", "sample", "weights"),
    promises_lossless_duplicates=True,
    drops_if=("redirect", "drop"),
)
def conmoe(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    distance: Annotated[Literal["functional", "weight", "mean_output"], "what makes experts alike"] = "functional",
    selection: Annotated[Literal["coverage", "product"], "how prototypes are chosen"] = "coverage",
    contribution: Annotated[Literal["mean", "sum", "man", "frequency"], "what makes an expert important"] = "sum",
    signal: Annotated[Signal, "ablation: choose by one signal only"] = "both",
    redirect: Annotated[
        Literal["nearest", "zero", "random", "drop"],
        "what becomes of the others: zero silences those to which silence is nearer; random and drop are ablations",
    ] = "nearest",
    fusion: Annotated[Literal["none", "frequency", "contribution"], "ablation: average the members"] = "none",
    tokens: Annotated[int, "tokens of the sample that distances are measured on; 0: all of them"] = 16384,
    min_own: Annotated[int, "prototypes each layer of a scope keeps of its own; -1: as many as its router picks"] = -1,
    seed: Annotated[int, "seed of the random map"] = 0,
) -> LayerPlan:
    """Keep some experts unchanged as prototypes; each other expert is answered for by its nearest prototype.

    Contribution ``c_i`` says how much an expert adds to the output (normalised within each layer of a scope),
    ``cost_ij`` what it costs to let ``j`` answer for ``i``. "coverage" minimises ``sum of c_i * min over prototypes p
    of cost_ip``, by greedy addition and swaps: our reconstruction, for the paper's formulas are not published where
    we could read them. "product" is the rule of an independent implementation (there with distance=weight and
    contribution=mean): the highest ``minmax(c_i) * minmax(min over j of cost_ij)``; it can keep both of two duplicates
    and lose both of two others. Gates and router stay as they are.

    A functional cost above 1 is worse than no answer at all. ``redirect="zero"`` (ours) counts it as 1, and experts
    that are so far from every prototype answer with a vector of zeros, their gates lost to nobody.
    """
    if redirect == "zero" and distance != "functional":
        raise UsageError("Only distance=functional tells how near silence is; choose that, or another redirect.")
    if redirect == "drop" and fusion != "none":
        raise UsageError("Dropped experts are averaged into nothing; choose either fusion or redirect=drop.")
    owner_E = statistics.owner_E
    if keep == owner_E.numel():
        return plans.identity(keep)
    sample = thinned(statistics.sample, tokens) if tokens else statistics.sample
    cost_EE = DISTANCES[distance](sample, experts).cpu()
    contribution_E = share_within(score(statistics.sums, *CONTRIBUTIONS[contribution]), owner_E)
    replaceability_E = _nearest_other(cost_EE)
    own = own_by_default(statistics, keep) if min_own < 0 else min_own
    if selection == "coverage" and signal != "contribution":
        demand_E = contribution_E if signal == "both" else torch.ones_like(contribution_E)
        reach_EE = cost_EE.clamp_max(1.0) if redirect == "zero" else cost_EE
        kept_K = coverage.cover(reach_EE, demand_E.clamp_min(UNUSED * float(demand_E.mean())), keep, owner_E, own)
    else:
        kept_K = top(_product(contribution_E, replaceability_E, signal), keep, owner_E, own)

    weight_E = {"none": None, "frequency": statistics.sums["count"], "contribution": contribution_E}[fusion]
    if redirect == "drop":
        plan = plans.prune(kept_K, owner_E.numel())
    else:
        nearest_E = coverage.nearest(cost_EE, kept_K)
        assignment_E = _random_map(kept_K, owner_E, seed) if redirect == "random" else nearest_E
        own_cost_E = cost_EE[torch.arange(owner_E.numel()), kept_K[assignment_E]]
        silent_E = own_cost_E > (1.0 if redirect == "zero" else torch.inf)
        plan = _redirected(kept_K, assignment_E.masked_fill(silent_E, plans.DROPPED), weight_E, owner_E)
        if silent_E.any():
            plan = _silenced(plan, silent_E, width=experts.down_EDI.shape[1])
        if distance == "functional" and weight_E is None:
            plan = replace(plan, predicted_error=_error(own_cost_E.masked_fill(silent_E, 1.0), statistics))
    return replace(plan, scores={"contribution": contribution_E, "replaceability": replaceability_E})


def _nearest_other(cost_EE: Tensor) -> Tensor:
    """How badly the best stand-in of each expert does: large where it is hard to replace."""
    return cost_EE.clone().fill_diagonal_(torch.inf).amin(dim=1)


def _product(contribution_E: Tensor, replaceability_E: Tensor, signal: Signal) -> Tensor:
    factors = {"contribution": minmax(contribution_E), "replaceability": minmax(replaceability_E)}
    return factors["contribution"] * factors["replaceability"] if signal == "both" else factors[signal]


def _random_map(kept_K: Tensor, owner_E: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    assignment_E = torch.randint(kept_K.numel(), owner_E.shape, generator=generator)
    assignment_E[kept_K] = torch.arange(kept_K.numel())
    return assignment_E


def _redirected(kept_K: Tensor, assignment_E: Tensor, weight_E: Tensor | None, owner_E: Tensor) -> LayerPlan:
    if weight_E is None:
        return plans.remap(kept_K, assignment_E)
    return plans.compose(assignment_E, average_own(kept_K, assignment_E, weight_E, owner_E))


def _silenced(plan: LayerPlan, silent_E: Tensor, width: int) -> LayerPlan:
    """The plan with experts ``silent_E`` answering by one and the same vector of zeros."""
    zero = plan.mixing_KE.shape[0]
    return replace(plan, assignment_E=plan.assignment_E.masked_fill(silent_E, zero), constant_CD=torch.zeros(1, width))


def _error(cost_E: Tensor, statistics: LayerStatistics) -> float:
    """The layer's relative squared output error, as if the errors of different experts were uncorrelated."""
    share_E = share_within(statistics.sums["gate_norm_squared"], torch.zeros_like(statistics.owner_E))
    return float((share_E * cost_E).sum())
