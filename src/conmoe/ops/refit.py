"""Refinement: fit what a finished plan answers to what the layer's own experts added, on the layer's token sample.

The compressed layer adds ``y'(x) = sum over slots g gain_e P(x)``, with ``P`` the prototype (or constant) that answers
for the slot's expert; the source's adds ``y(x) = sum over slots g E_e(x)``. Where the plan drops experts, the gates of
``y'`` are those that the layer's own router gives to the experts that are left. What is minimised is ``||y - y'||^2``
over the tokens of the sample, but for those held out: these choose how hard to fit, and whether to fit at all.

``n`` tokens, ``k`` slots, ``E`` experts, ``K`` prototypes, ``D`` hidden size, ``I`` intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from conmoe.ops import least_squares
from conmoe.ops.accumulate import add_at
from conmoe.ops.experts import expert_hidden, mix, tensors
from conmoe.ops.least_squares import Gram
from conmoe.ops.similarity import BLOCK_BYTES
from conmoe.types import ConmoeError, Experts, LayerPlan, TokenSample, UsageError

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


@dataclass(frozen=True, slots=True)
class _Layer:
    """A plan on the tokens of a sample: who answers, by how much."""

    experts: Experts
    plan: LayerPlan
    x_nD: Tensor
    expert_nk: Tensor  # logical experts, -1 where the slot is silent
    answer_nk: Tensor  # prototypes, constants from K on, -1 where the slot is silent
    gate_nk: Tensor  # float32, gains included
    residual_nD: Tensor  # float32, what the source's layer adds and the plan does not
    train_n: Tensor
    held_n: Tensor


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
        plan: of the whole layer.
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
    _check(kind, experts, plan)
    n = sample.priority_n.numel()
    held_n = _held_out(sample, held_out)
    if not 0 < int(held_n.sum()) < n:
        return plan
    layer, energy = _open(sample, experts, plan, held_n)
    before = _square(layer.residual_nD[held_n])
    if not isfinite(before):
        raise ConmoeError("Activations of an expert overflow on the calibration tokens; calibrate in a wider dtype.")
    refined, after = plan, before
    if before > EXACT * energy:
        refined, after = _gains(layer, frozen, gain_ridge) if kind == "gains" else _refit(layer, frozen, ridges)
    if not after < before:
        refined, after = plan, before
    return replace(refined, predicted_error=after / (energy or 1.0))


def _check(kind: Kind, experts: Experts, plan: LayerPlan) -> None:
    if plan.static_K is not None:
        raise UsageError(f"A condensed layer has no gates or shares to refine; use --refine none, not {kind}.")
    if any("." in name for name in plan.weights):
        raise UsageError(f"Experts stored as factors cannot be refined; use --refine none, not {kind}.")
    if bool((plan.assignment_E < 0).any()) and experts.reroute is None:
        raise UsageError(
            "What drops experts is refined by asking the router of a layer what it would choose; plan each layer "
            "alone (--scope 1)."
        )


def _held_out(sample: TokenSample, share: float) -> Tensor:
    """Priorities are random numbers, so which tokens are held out depends neither on their order nor on a seed."""
    rank_n = sample.priority_n.argsort(stable=True).argsort(stable=True)
    n = rank_n.numel()
    return rank_n >= n - max(1, round(share * n))


def _open(sample: TokenSample, experts: Experts, plan: LayerPlan, held_n: Tensor) -> tuple[_Layer, float]:
    """The plan on this sample, and the energy of the held-out tokens' target."""
    device = experts.gate_EID.device
    x_nD, held_n = sample.hidden_nD.to(device), held_n.to(device)
    source_nk, gate_nk = sample.index_nk.long().to(device), sample.weight_nk.float().to(device)
    y_nD = torch.zeros(x_nD.shape, device=device)
    for expert in source_nk[source_nk >= 0].unique().tolist():
        rows, slots = (source_nk == expert).nonzero(as_tuple=True)
        output_cD = _output(_row(tensors(experts), expert, experts), x_nD[rows])
        y_nD.index_add_(0, rows, gate_nk[rows, slots].unsqueeze(1) * output_cD)
    energy = _square(y_nD[held_n])

    expert_nk = source_nk
    kept_E = plan.assignment_E >= 0
    if not bool(kept_E.all()):
        assert experts.reroute is not None
        expert_nk, gate_nk = experts.reroute(x_nD, kept_E.nonzero().flatten())
        expert_nk, gate_nk = expert_nk.long(), gate_nk.float()
    if plan.skip:
        left_nk = gate_nk.masked_fill(gate_nk < plan.skip * gate_nk.amax(dim=1, keepdim=True), 0.0)
        gate_nk = left_nk * (gate_nk.sum(dim=1, keepdim=True) / left_nk.sum(dim=1, keepdim=True))
        expert_nk = expert_nk.masked_fill(left_nk == 0, -1)
    silent_nk = expert_nk < 0
    gate_nk = (gate_nk * plan.gain_E.float().to(device)[expert_nk]).masked_fill(silent_nk, 0.0)
    answer_nk = plan.assignment_E.to(device)[expert_nk].masked_fill(silent_nk, -1)
    layer = _Layer(experts, plan, x_nD, expert_nk, answer_nk, gate_nk, y_nD, ~held_n, held_n)
    for answer in answer_nk[answer_nk >= 0].unique().tolist():
        rows, share_c = _tokens(layer, answer)
        y_nD.index_add_(0, rows, -share_c.unsqueeze(1) * _answer(layer, answer, rows))
    return layer, energy


def _refit(layer: _Layer, frozen: Sequence[int], ridges: Sequence[float]) -> tuple[LayerPlan, float]:
    """Block coordinate descent over prototypes; the plan of lowest held-out error, and that error."""
    K, residual_nD = layer.plan.mixing_KE.shape[0], layer.residual_nD
    first = [_prototype(layer, prototype, rounded=True).down_EDI[0] for prototype in range(K)]
    down, kept, best = list(first), first, _square(residual_nD[layer.held_n])
    for ridge in ridges:
        for prototype in range(K):
            if prototype not in frozen:
                down[prototype] = _step(layer, prototype, down[prototype], first[prototype], ridge)
        error = _square(residual_nD[layer.held_n])
        if not error < best:
            break
        kept, best = list(down), error
    weights = dict(layer.plan.weights) | {"down_EDI": torch.stack(kept).cpu()}
    return replace(layer.plan, weights=weights), best


def _step(layer: _Layer, prototype: int, down_DI: Tensor, prior_DI: Tensor, ridge: float) -> Tensor:
    """The best down projection of one prototype, as it will be stored; the layer's residual is brought up to date."""
    rows, share_c = _tokens(layer, prototype)
    train_c = layer.train_n[rows]
    if not bool((share_c[train_c] != 0).any()):
        return down_DI
    D, width = down_DI.shape
    h_cI = share_c.unsqueeze(1) * expert_hidden(_prototype(layer, prototype), 0, layer.x_nD[rows])
    gram = least_squares.zeros(width, D, intercept=False, device=down_DI.device)
    gram = least_squares.add(gram, h_cI[train_c], layer.residual_nD[rows[train_c]])
    tokens = least_squares.effective_tokens(share_c[train_c].square())
    step_DI, _ = least_squares.solve(gram, ridge * width / tokens, prior_DI.double() - down_DI.double())
    new_DI = (down_DI.double() + step_DI).to(down_DI.dtype)
    layer.residual_nD.index_add_(0, rows, h_cI @ (down_DI.float() - new_DI.float()).T)
    return new_DI


def _gains(layer: _Layer, frozen: Sequence[int], ridge: float) -> tuple[LayerPlan, float]:
    """All gains at once, from sums of products of the experts' shares of each token; and the held-out error."""
    plan = layer.plan
    train, held = (_gain_gram(layer, part_n.nonzero().flatten()) for part_n in (layer.train_n, layer.held_n))
    held_back = torch.isin(plan.assignment_E, torch.tensor(list(frozen), dtype=torch.int64)).to(train.inner_II.device)
    free = ((train.inner_II.diagonal() > 0) & ~held_back).nonzero().flatten()
    part = Gram(train.inner_II[free][:, free], train.cross_DI[:, free], train.energy, False)
    step_1E = torch.zeros_like(train.cross_DI)
    if free.numel():
        step_1E[:, free] = least_squares.solve(part, ridge, part.cross_DI.new_zeros(part.cross_DI.shape))[0]
    gain_E = plan.gain_E.double() * (1 + step_1E[0].cpu())
    return replace(plan, gain_E=gain_E), least_squares.squared_error(held, step_1E)


def _gain_gram(layer: _Layer, rows_n: Tensor) -> Gram:
    """Sums over these tokens: what each logical expert adds now (responses: what is missing of the output)."""
    D, k = layer.x_nD.shape[1], layer.expert_nk.shape[1]
    E = layer.plan.assignment_E.numel()
    gram = least_squares.zeros(E, 1, intercept=False, device=layer.x_nD.device)
    inner, cross = gram.inner_II.view(-1), gram.cross_DI.view(-1)
    for rows_c in rows_n.split(max(1, BLOCK_BYTES // (8 * k * D))):
        answer_ck, expert_ck = layer.answer_nk[rows_c], layer.expert_nk[rows_c].clamp_min(0)
        added_ckD = torch.zeros(*answer_ck.shape, D, device=layer.x_nD.device)
        for answer in answer_ck[answer_ck >= 0].unique().tolist():
            rows, slots = (answer_ck == answer).nonzero(as_tuple=True)
            gate_s = layer.gate_nk[rows_c[rows], slots]
            added_ckD[rows, slots] = gate_s.unsqueeze(1) * _answer(layer, answer, rows_c[rows])
        product_ckk = added_ckD @ added_ckD.transpose(1, 2)
        pair_ckk = expert_ck.unsqueeze(2) * E + expert_ck.unsqueeze(1)
        add_at(inner, 0, pair_ckk.flatten(), product_ckk.flatten().double())
        missing_ck = (added_ckD @ layer.residual_nD[rows_c].unsqueeze(2)).squeeze(2)
        add_at(cross, 0, expert_ck.flatten(), missing_ck.flatten().double())
    return replace(gram, energy=layer.residual_nD[rows_n].double().square().sum())


def _tokens(layer: _Layer, answer: int) -> tuple[Tensor, Tensor]:
    """The tokens that get this answer in any slot, and by how much in all."""
    mine_nk = layer.answer_nk == answer
    rows = mine_nk.any(dim=1).nonzero().flatten()
    return rows, (layer.gate_nk[rows] * mine_nk[rows]).sum(dim=1)


def _answer(layer: _Layer, answer: int, rows: Tensor) -> Tensor:
    """What a prototype of the plan, or a constant, says to these tokens, in float32."""
    K, constant_CD = layer.plan.mixing_KE.shape[0], layer.plan.constant_CD
    if answer >= K:
        assert constant_CD is not None
        return constant_CD[answer - K].float().to(layer.x_nD.device).expand(rows.numel(), -1)
    return _output(_prototype(layer, answer), layer.x_nD[rows])


def _prototype(layer: _Layer, prototype: int, *, rounded: bool = False) -> Experts:
    """One prototype, rounded as it is stored, and then in float32 unless ``rounded``."""
    plan, source = layer.plan, tensors(layer.experts)
    found = {
        name: plan.weights[name][prototype].to(tensor) if name in plan.weights else _mixed(tensor, plan, prototype)
        for name, tensor in source.items()
    }
    return _one(found, layer.experts, rounded=rounded)


def _mixed(tensor: Tensor, plan: LayerPlan, prototype: int) -> Tensor:
    return mix(tensor, plan.mixing_KE[prototype].unsqueeze(0))[0]


def _row(named: dict[str, Tensor], expert: int, experts: Experts) -> Experts:
    return _one({name: tensor[expert] for name, tensor in named.items()}, experts)


def _one(named: dict[str, Tensor], experts: Experts, *, rounded: bool = False) -> Experts:
    made: dict[str, Any] = {name: (value if rounded else value.float()).unsqueeze(0) for name, value in named.items()}
    return replace(experts, **made)


def _output(single: Experts, x_cD: Tensor) -> Tensor:
    """The output of one expert, all in float32: a fit to rounded outputs would learn their rounding."""
    bias_D = None if single.down_bias_ED is None else single.down_bias_ED[0]
    return linear(expert_hidden(single, 0, x_cD), single.down_EDI[0], bias_D)


def _square(value_nD: Tensor) -> float:
    return float(value_nD.double().square().sum())
