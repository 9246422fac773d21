"""DERN: dropping experts, recombining neurons (arXiv 2509.10377), reconstructed."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from conmoe.ops import plans, scores, units
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics, UsageError


@method("dern", paper="https://arxiv.org/abs/2509.10377", needs=("gate", "weights"), form="sliced")
def dern(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    threshold: Annotated[float, "a unit moves if its cosine with the most similar kept unit is above this"] = 0.6,
    iterations: Annotated[int, "at most so many rounds of k-means in each kept expert"] = 10,
    seed: Annotated[int, "seed of the projections by which units are looked up"] = 0,
) -> LayerPlan:
    """Keep the experts to which the router gives most; hidden units of the others move to similar ones among them.

    1. Importance = frequency times mean gate, that is the sum of gates; the highest stay, with their router rows.
    2. A unit of a dropped expert (gate row, up row, down column, end to end) moves to the kept expert with the unit of
       highest cosine, if that is above the threshold; other units are lost.
    3. Each kept expert merges its own units and those that came into as many as it had, by weighted spherical k-means;
       the weight of a unit is the importance of the expert it comes from.

    Our reconstruction from a summary; the paper's text was not at hand. What we chose: the cosine is over all three
    parts at once; every cluster holds exactly one own unit of the kept expert, for two averaged into one would do half
    of what they did; merged units are weighted means, not rescaled. Where experts were trained apart few units have a
    cosine above 0.6, and the method is nearly pruning by ``seer``: ``moved``, among the scores, tells the share of
    units that found a place. The gate of a dropped expert is lost, so duplicates are not lossless.
    """
    if not 0.0 < threshold <= 1.0 or iterations < 0:
        raise UsageError("Option 'threshold' is a cosine above 0 and up to 1, and 'iterations' is not negative.")
    importance_E = scores.score(statistics.sums, mean=False, alpha=1, beta=0)
    pruned = scores.prune_lowest(importance_E, statistics, keep)
    if keep == importance_E.numel():
        return pruned
    dropped = (pruned.assignment_E < 0).nonzero().flatten()
    kept_K = (pruned.assignment_E >= 0).nonzero().flatten()
    moves = units.matching_units(experts, dropped, kept_K, threshold, seed)
    width = experts.gate_EID.shape[1]
    moved_E = torch.bincount(moves.source_M, minlength=importance_E.numel()) / width
    pruned = replace(pruned, scores={"score": importance_E, "moved": moved_E})
    if not moves.source_M.numel():
        return pruned

    recombined = [_recombine(experts, expert, moves, importance_E, iterations) for expert in kept_K.tolist()]
    plan = plans.compose(pruned.assignment_E, torch.stack([recipe_E for recipe_E, _ in recombined]))
    order_K = plan.assignment_E[kept_K].argsort()  # recipes name dropped experts too, which may come first
    weights = {
        name: torch.stack([recombined[position][1][name] for position in order_K.tolist()]).cpu()
        for name in recombined[0][1]
    }
    if experts.down_bias_ED is not None:
        weights["down_bias_ED"] = experts.down_bias_ED[kept_K[order_K]].cpu()
    return replace(plan, weights=weights, scores=pruned.scores)


def _recombine(
    experts: Experts, expert: int, moves: units.Moves, importance_E: Tensor, iterations: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """What part of the result comes from which expert, and the tensors of one kept expert."""
    mine = moves.target_M == expert
    source_M, unit_M = moves.source_M[mine], moves.unit_M[mine]
    own_IF = units.unit_vectors(experts, expert)
    guest_MF = units.moved_vectors(experts, source_M.to(own_IF.device), unit_M.to(own_IF.device))
    merged_IF, share_M = units.absorb(own_IF, guest_MF, float(importance_E[expert]), importance_E[source_M], iterations)
    recipe_E = torch.zeros_like(importance_E).index_add(0, source_M, share_M.cpu().double() / own_IF.shape[0])
    recipe_E[expert] = 1.0 - recipe_E.sum()
    return recipe_E, units.as_tensors(experts, merged_IF)
