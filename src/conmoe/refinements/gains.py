"""Gains: the multiplier of each logical expert's gate, by least squares."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Annotated

import torch
from torch import Tensor

from conmoe.ops import least_squares
from conmoe.ops.accumulate import add_at
from conmoe.ops.answers import Answers, answer
from conmoe.ops.least_squares import Gram
from conmoe.ops.similarity import BLOCK_BYTES
from conmoe.registry import refinement
from conmoe.types import LayerPlan, UsageError


def check(*, ridge: float) -> None:
    """Raise a UsageError if the ridge is none: below 0 the problem has no least point to find."""
    if not 0 <= ridge < inf:
        raise UsageError(f"gains takes a ridge of 0 or more, not {ridge:g}.")


@refinement("gains", check=check)
def gains(
    answers: Answers,
    held_n: Tensor,
    frozen: tuple[int, ...],
    *,
    ridge: Annotated[float, "what a gain of one counts for, as a share of the energy of an average expert"] = 1e-3,
) -> LayerPlan:
    """The gates' multipliers by which the layer's output is kept best: one joint problem of ``E`` unknowns.

    Cost, in multiplications: ``9 n k D I + n k^2 D``.
    """
    plan = answers.plan
    train = _gain_gram(answers, (~held_n).nonzero().flatten())
    held_back = torch.isin(plan.assignment_E, torch.tensor(list(frozen), dtype=torch.int64)).to(train.inner_II.device)
    free = ((train.inner_II.diagonal() > 0) & ~held_back).nonzero().flatten()
    part = Gram(train.inner_II[free][:, free], train.cross_DI[:, free], train.energy, False)
    step_1E = torch.zeros_like(train.cross_DI)
    if free.numel():
        step_1E[:, free] = least_squares.solve(part, ridge, part.cross_DI.new_zeros(part.cross_DI.shape))[0]
    gain_E = plan.gain_E.double() * (1 + step_1E[0].cpu())
    return replace(plan, gain_E=gain_E)


def _gain_gram(answers: Answers, rows_n: Tensor) -> Gram:
    """Sums over these tokens: what each logical expert adds now (responses: what is missing of the output)."""
    D, k = answers.x_nD.shape[1], answers.expert_nk.shape[1]
    E = answers.plan.assignment_E.numel()
    gram = least_squares.zeros(E, 1, intercept=False, device=answers.x_nD.device)
    inner, cross = gram.inner_II.view(-1), gram.cross_DI.view(-1)
    for rows_c in rows_n.split(max(1, BLOCK_BYTES // (8 * k * D))):
        answer_ck, expert_ck = answers.answer_nk[rows_c], answers.expert_nk[rows_c].clamp_min(0)
        added_ckD = torch.zeros(*answer_ck.shape, D, device=answers.x_nD.device)
        for number in answer_ck[answer_ck >= 0].unique().tolist():
            rows, slots = (answer_ck == number).nonzero(as_tuple=True)
            gate_s = answers.gate_nk[rows_c[rows], slots]
            added_ckD[rows, slots] = gate_s.unsqueeze(1) * answer(answers, number, rows_c[rows])
        product_ckk = added_ckD @ added_ckD.transpose(1, 2)
        pair_ckk = expert_ck.unsqueeze(2) * E + expert_ck.unsqueeze(1)
        add_at(inner, 0, pair_ckk.flatten(), product_ckk.flatten().double())
        missing_ck = (added_ckD @ answers.residual_nD[rows_c].unsqueeze(2)).squeeze(2)
        add_at(cross, 0, expert_ck.flatten(), missing_ck.flatten().double())
    return replace(gram, energy=answers.residual_nD[rows_n].double().square().sum())
