"""Refinement: fit what a finished plan answers to what the layer's own experts added, on the layer's token sample.

What is minimised is ``||y - y'||^2`` (:mod:`conmoe.ops.answers`) over the tokens of the sample, but for those held out:
these choose how hard to fit, and whether to fit at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from conmoe.ops.answers import open_answers, revised, square
from conmoe.registry import bind_options, get_refinement
from conmoe.types import ConmoeError, Experts, LayerPlan, TokenSample

#: The name of leaving a plan as it is.
NONE = "none"
#: The share of the sample that is held out.
HELD_OUT = 0.15
#: A lower relative squared error is rounding: there is nothing to refine.
EXACT = 1e-10


def refine(
    name: str,
    sample: TokenSample,
    experts: Experts,
    plan: LayerPlan,
    *,
    frozen: Sequence[int] = (),
    options: Mapping[str, Any] | None = None,
    held_out: float = HELD_OUT,
) -> LayerPlan:
    """The plan with new gains, weights or router rows that keep the layer's output, as the refinement ``name`` has it.

    Where the held-out error (of the tokens of highest priority, which are drawn at random) is no lower than before,
    the plan stays as it is. ``predicted_error`` is the held-out ``||y - y'||^2 / ||y||^2`` in any case; a sample of one
    token tells nothing, and the plan comes back untouched.

    Args:
        name: a registered refinement; ``"none"`` gives the plan back.
        sample: tokens of the layer with its routing.
        experts: the source's experts; ``reroute`` is asked if the plan drops any.
        plan: of the whole layer.
        frozen: prototypes that stay as they are, with the gains of the experts that they answer for.
        options: of the refinement.
        held_out: share of the tokens.

    Raises:
        UsageError: the plan condenses the layer or stores factors, or drops experts of layers that share a pool.
        ConmoeError: activations are not finite.
    """
    if name == NONE:
        return plan
    found = get_refinement(name)
    held_n = held_out_tokens(sample, held_out).to(experts.gate_EID.device)
    if not 0 < int(held_n.sum()) < held_n.numel():
        return plan
    with torch.no_grad():
        answers = open_answers(sample, experts, plan)
    before, energy = square(answers.residual_nD[held_n]), square(answers.source_nD[held_n])
    if not isfinite(before):
        raise ConmoeError("Activations of an expert overflow on the calibration tokens; calibrate in a wider dtype.")
    refined, after = plan, before
    if before > EXACT * energy:
        refined = found.function(answers, held_n, tuple(frozen), **bind_options(found, options or {}))
        with torch.no_grad():
            after = square(revised(answers, refined).residual_nD[held_n])
    if not after < before:
        refined, after = plan, before
    return replace(refined, predicted_error=after / (energy or 1.0))


def held_out_tokens(sample: TokenSample, share: float = HELD_OUT) -> Tensor:
    """Priorities are random numbers, so which tokens are held out depends neither on their order nor on a seed."""
    rank_n = sample.priority_n.argsort(stable=True).argsort(stable=True)
    n = rank_n.numel()
    return rank_n >= n - max(1, round(share * n))
