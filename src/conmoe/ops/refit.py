"""Refinement: fit what a finished plan answers to what the layer's own experts added, on the layer's token sample.

The compressed layer adds ``y'(x) = sum over slots g gain_e P(x)``, with ``P`` the prototype (or constant) that answers
for the slot's expert; the source's adds ``y(x) = sum over slots g E_e(x)``. Where the plan drops experts, the gates of
``y'`` are those that the layer's own router gives to the experts that are left. What is minimised is ``||y - y'||^2``
over the tokens of the sample, but for those held out: these choose how hard to fit, and whether to fit at all.

``n`` tokens, ``k`` slots, ``E`` experts, ``K`` prototypes, ``D`` hidden size, ``I`` intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from conmoe.ops import least_squares
from conmoe.ops.accumulate import add_at
from conmoe.ops.answers import Answers, answer, open_answers, prototype, square, tokens_of
from conmoe.ops.experts import expert_hidden
from conmoe.ops.least_squares import Gram
from conmoe.ops.similarity import BLOCK_BYTES
from conmoe.types import ConmoeError, Experts, LayerPlan, TokenSample

Kind = Literal["none", "gains", "refit"]
KINDS: tuple[Kind, ...] = ("none", "gains", "refit")

#: The share of the sample that is held out.
HELD_OUT = 0.15
#: What a gain of one counts for, as a share of the energy of an average expert.
GAIN_RIDGE = 1e-3
#: What a plan's own down projection counts for, in tokens per hidden unit: one sweep over the prototypes with each, for
#: as long as the held-out error falls.
RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03)
#: A lower relative squared error is rounding: there is nothing to refine.
EXACT = 1e-10


@torch.no_grad()
def refine(
    kind: Kind,
    sample: TokenSample,
    experts: Experts,
    plan: LayerPlan,
    *,
    frozen: Sequence[int] = (),
    ridges: Sequence[float] = RIDGES,
    gain_ridge: float = GAIN_RIDGE,
    held_out: float = HELD_OUT,
) -> LayerPlan:
    """The plan with gains (``"gains"``) or down projections (``"refit"``) that keep the layer's output.

    ``"gains"`` multiplies the gate of each logical expert: one joint least-squares problem of ``E`` unknowns, with a
    ridge towards one. ``"refit"`` solves for the down projections, one prototype after the other, each on what all
    others leave of the output: with ``h = sum over its slots g gain hidden(x)``, ``min ||r - D h||^2 + lam ||D -
    D_plan||^2``, ``lam`` counting for ``ridge`` tokens per hidden unit. For each of ``ridges`` there is a sweep over
    all prototypes, from the result of the one before, until the held-out error stops falling. Gate, up, biases stay.

    Where the held-out error (of the tokens of highest priority, which are drawn at random) is no lower than before,
    the assignment, gains and weights are those of ``plan``. ``predicted_error`` is the held-out ``||y - y'||^2 /
    ||y||^2`` in any case; a sample of one token tells nothing, and the plan stays as it is.

    Cost, in multiplications. Both: ``6 n k D I`` for the two outputs, in float32. Gains: ``3 n k D I + n k^2 D``.
    Refit, a sweep: ``3 n k D I`` in float32, ``n k I (I + D) + 2 K D I^2 + K I^3 / 6`` in float64. Beside the inputs,
    ``n D`` float32 numbers are held, and no more of a prototype's activations than its own tokens'.

    Args:
        kind: what is fitted; ``"none"`` gives the plan back.
        sample: tokens of the layer with its routing.
        experts: the source's experts; ``reroute`` is asked if the plan drops any.
        plan: of the whole answers.
        frozen: prototypes that stay as they are, with the gains of the experts that they answer for.
        ridges: decreasing; 0 is the least-squares fit of least norm, in which the plan's weights have no say.
        gain_ridge: as a share of the mean diagonal of the normal equations.
        held_out: share of the tokens.

    Raises:
        UsageError: the plan condenses the layer or stores factors, or drops experts of layers that share a pool.
        ConmoeError: activations are not finite.
    """
    if kind == "none":
        return plan
    n = sample.priority_n.numel()
    held_n = _held_out(sample, held_out).to(experts.gate_EID.device)
    if not 0 < int(held_n.sum()) < n:
        return plan
    answers = open_answers(sample, experts, plan)
    before, energy = square(answers.residual_nD[held_n]), square(answers.source_nD[held_n])
    if not isfinite(before):
        raise ConmoeError("Activations of an expert overflow on the calibration tokens; calibrate in a wider dtype.")
    refined, after = plan, before
    if before > EXACT * energy:
        refined, after = (
            _gains(answers, held_n, frozen, gain_ridge) if kind == "gains" else _refit(answers, held_n, frozen, ridges)
        )
    if not after < before:
        refined, after = plan, before
    return replace(refined, predicted_error=after / (energy or 1.0))


def _held_out(sample: TokenSample, share: float) -> Tensor:
    """Priorities are random numbers, so which tokens are held out depends neither on their order nor on a seed."""
    rank_n = sample.priority_n.argsort(stable=True).argsort(stable=True)
    n = rank_n.numel()
    return rank_n >= n - max(1, round(share * n))


def _refit(answers: Answers, held_n: Tensor, frozen: Sequence[int], ridges: Sequence[float]) -> tuple[LayerPlan, float]:
    """Block coordinate descent over prototypes; the plan of lowest held-out error, and that error."""
    K, residual_nD = answers.plan.mixing_KE.shape[0], answers.residual_nD
    first = [prototype(answers, number, rounded=True).down_EDI[0] for number in range(K)]
    down, kept, best = list(first), first, square(residual_nD[held_n])
    for ridge in ridges:
        for number in range(K):
            if number not in frozen:
                down[number] = _step(answers, ~held_n, number, down[number], first[number], ridge)
        error = square(residual_nD[held_n])
        if not error < best:
            break
        kept, best = list(down), error
    weights = dict(answers.plan.weights) | {"down_EDI": torch.stack(kept).cpu()}
    return replace(answers.plan, weights=weights), best


def _step(answers: Answers, train_n: Tensor, number: int, down_DI: Tensor, prior_DI: Tensor, ridge: float) -> Tensor:
    """The best down projection of one prototype, as it will be stored; the layer's residual is brought up to date."""
    rows, share_c = tokens_of(answers, number)
    train_c = train_n[rows]
    if not bool((share_c[train_c] != 0).any()):
        return down_DI
    D, width = down_DI.shape
    h_cI = share_c.unsqueeze(1) * expert_hidden(prototype(answers, number), 0, answers.x_nD[rows])
    gram = least_squares.zeros(width, D, intercept=False, device=down_DI.device)
    gram = least_squares.add(gram, h_cI[train_c], answers.residual_nD[rows[train_c]])
    tokens = least_squares.effective_tokens(share_c[train_c].square())
    step_DI, _ = least_squares.solve(gram, ridge * width / tokens, prior_DI.double() - down_DI.double())
    new_DI = (down_DI.double() + step_DI).to(down_DI.dtype)
    answers.residual_nD.index_add_(0, rows, h_cI @ (down_DI.float() - new_DI.float()).T)
    return new_DI


def _gains(answers: Answers, held_n: Tensor, frozen: Sequence[int], ridge: float) -> tuple[LayerPlan, float]:
    """All gains at once, from sums of products of the experts' shares of each token; and the held-out error."""
    plan = answers.plan
    train, held = (_gain_gram(answers, part_n.nonzero().flatten()) for part_n in (~held_n, held_n))
    held_back = torch.isin(plan.assignment_E, torch.tensor(list(frozen), dtype=torch.int64)).to(train.inner_II.device)
    free = ((train.inner_II.diagonal() > 0) & ~held_back).nonzero().flatten()
    part = Gram(train.inner_II[free][:, free], train.cross_DI[:, free], train.energy, False)
    step_1E = torch.zeros_like(train.cross_DI)
    if free.numel():
        step_1E[:, free] = least_squares.solve(part, ridge, part.cross_DI.new_zeros(part.cross_DI.shape))[0]
    gain_E = plan.gain_E.double() * (1 + step_1E[0].cpu())
    return replace(plan, gain_E=gain_E), least_squares.squared_error(held, step_1E)


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
