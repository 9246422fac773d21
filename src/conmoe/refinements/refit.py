"""Refit: down projections solved for in closed form, so that the layer's own output is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from conmoe.ops import least_squares
from conmoe.ops.answers import Answers, prototype, square, tokens_of
from conmoe.ops.experts import expert_hidden
from conmoe.registry import refinement
from conmoe.types import LayerPlan, UsageError

#: What a plan's own down projection counts for, in tokens per hidden unit: one sweep over the prototypes with each, for
#: as long as the held-out error falls.
RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03)


def check(*, sweeps: int) -> None:
    """Raise a UsageError unless there is a sweep to make."""
    if sweeps < 1:
        raise UsageError(f"refit takes one sweep or more, not {sweeps}.")


@refinement("refit", check=check)
def refit(
    answers: Answers,
    held_n: Tensor,
    frozen: tuple[int, ...],
    *,
    sweeps: Annotated[int, "sweeps over the prototypes at most, each with a third of the ridge of the last"] = len(
        RIDGES
    ),
) -> LayerPlan:
    """Down projections by least squares, one prototype after the other, each on what all others leave of the output.

    With ``h = sum over its slots g gain hidden(x)``, a prototype's is ``min ||r - D h||^2 + lam ||D - D_plan||^2``,
    ``lam`` counting for so many tokens per hidden unit: 3 in the first sweep over all prototypes, then 1, .3, .1 and
    .03, until the error of the held-out tokens stops falling. Gate, up, biases and gains stay.

    Cost, in multiplications: ``6 n k D I`` for the two outputs in float32, and for each sweep ``3 n k D I`` in float32
    and ``n k I (I + D) + 2 K D I^2 + K I^3 / 6`` in float64. Beside the inputs ``2 n D`` float32 numbers are held, and
    no more of a prototype's activations than its own tokens'.
    """
    return fit(answers, held_n, frozen, RIDGES[:sweeps])


def fit(answers: Answers, held_n: Tensor, frozen: tuple[int, ...], ridges: tuple[float, ...]) -> LayerPlan:
    """Block coordinate descent, a sweep for each of ``ridges``; the plan of lowest held-out error.

    A ridge of 0 is the least-squares fit of least norm, in which the plan's weights have no say.
    """
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
    return replace(answers.plan, weights=weights)


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
