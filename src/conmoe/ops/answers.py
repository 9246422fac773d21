"""What a plan leaves of a layer's output: the source's routed experts against those that answer for them, on a sample.

The source's layer adds ``y(x) = sum over slots g E_e(x)``; the compressed one adds ``y'(x) = sum over slots g gain_e
P(x)``, with ``P`` the prototype (or constant) that answers for the slot's expert. Where the plan drops experts, the
gates of ``y'`` are those that the layer's own router gives to the experts that are left. All in float32: a fit to
rounded outputs would learn their rounding.

``n`` tokens, ``k`` slots, ``E`` experts, ``K`` prototypes, ``D`` hidden size, ``I`` intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from conmoe.ops.experts import expert_hidden, mix, tensors
from conmoe.types import Experts, LayerPlan, TokenSample, UsageError


@dataclass(frozen=True, slots=True)
class Answers:
    """A plan on the tokens of a sample: who answers, by how much, and what is missing."""

    sample: TokenSample
    experts: Experts
    plan: LayerPlan
    x_nD: Tensor
    expert_nk: Tensor  # logical experts, -1 where the slot is silent
    answer_nk: Tensor  # prototypes, constants from K on, -1 where the slot is silent
    gate_nk: Tensor  # float32, gains included
    source_nD: Tensor  # float32, what the source's layer adds, and what was lost before it, if that is known
    residual_nD: Tensor  # float32, what of that the plan does not add


def open_answers(sample: TokenSample, experts: Experts, plan: LayerPlan) -> Answers:
    """The plan on this sample; where it drops experts, ``experts.reroute`` is asked.

    Cost, in multiplications: ``6 n k D I``, in float32.

    Raises:
        UsageError: the plan condenses the layer or stores factors, or drops experts of layers that share a pool.
    """
    source_nD = source_output(sample, experts)
    if sample.drift_nD is not None:
        source_nD += sample.drift_nD.float().to(source_nD.device)
    return _answers(plan, sample, experts, source_nD)


def revised(answers: Answers, plan: LayerPlan) -> Answers:
    """Another plan on the same sample."""
    return _answers(plan, answers.sample, answers.experts, answers.source_nD)


def _answers(plan: LayerPlan, sample: TokenSample, experts: Experts, source_nD: Tensor) -> Answers:
    check_answers(experts, plan)
    device = source_nD.device
    x_nD = sample.hidden_nD.to(device)
    expert_nk, gate_nk = sample.index_nk.long().to(device), sample.weight_nk.float().to(device)
    kept_E = plan.assignment_E >= 0
    if not bool(kept_E.all()):
        assert experts.reroute is not None
        expert_nk, gate_nk = experts.reroute(x_nD, kept_E.nonzero().flatten(), *router_rows(plan, device))
        expert_nk, gate_nk = expert_nk.long(), gate_nk.float()
    if plan.skip:
        left_nk = gate_nk.masked_fill(gate_nk < plan.skip * gate_nk.amax(dim=1, keepdim=True), 0.0)
        gate_nk = left_nk * (gate_nk.sum(dim=1, keepdim=True) / left_nk.sum(dim=1, keepdim=True))
        expert_nk = expert_nk.masked_fill(left_nk == 0, -1)
    silent_nk = expert_nk < 0
    gate_nk = (gate_nk * plan.gain_E.float().to(device)[expert_nk]).masked_fill(silent_nk, 0.0)
    answer_nk = plan.assignment_E.to(device)[expert_nk].masked_fill(silent_nk, -1)
    found = Answers(sample, experts, plan, x_nD, expert_nk, answer_nk, gate_nk, source_nD, source_nD.clone())
    for number in answer_nk[answer_nk >= 0].unique().tolist():
        rows, share_c = tokens_of(found, number)
        found.residual_nD.index_add_(0, rows, -share_c.unsqueeze(1) * answer(found, number, rows))
    return found


def router_rows(plan: LayerPlan, device: torch.device) -> tuple[Tensor, ...]:
    """The plan's own rows of the router, if it has any, as further arguments of ``reroute``."""
    return () if plan.router_KD is None else (plan.router_KD.float().to(device),)


def check_answers(experts: Experts, plan: LayerPlan) -> None:
    """Raise a UsageError if what the plan answers cannot be told from the sample."""
    if plan.static_K is not None:
        raise UsageError("A condensed layer has no gates or shares to refine; use --refine none.")
    if any("." in name for name in plan.weights):
        raise UsageError("Experts stored as factors cannot be refined; use --refine none.")
    if bool((plan.assignment_E < 0).any()) and experts.reroute is None:
        raise UsageError(
            "What drops experts is refined by asking the router of a layer what it would choose; plan each layer "
            "alone (--scope 1)."
        )


def source_output(sample: TokenSample, experts: Experts) -> Tensor:
    """``y_nD``: what the source's routed experts add on the sample, in float32."""
    device = experts.gate_EID.device
    x_nD = sample.hidden_nD.to(device)
    index_nk, gate_nk = sample.index_nk.long().to(device), sample.weight_nk.float().to(device)
    y_nD, named = torch.zeros(x_nD.shape, device=device), tensors(experts)
    for expert in index_nk[index_nk >= 0].unique().tolist():
        rows, slots = (index_nk == expert).nonzero(as_tuple=True)
        single = _one({name: tensor[expert] for name, tensor in named.items()}, experts)
        y_nD.index_add_(0, rows, gate_nk[rows, slots].unsqueeze(1) * output(single, x_nD[rows]))
    return y_nD


def tokens_of(found: Answers, number: int) -> tuple[Tensor, Tensor]:
    """The tokens that get this answer in any slot, and by how much in all."""
    mine_nk = found.answer_nk == number
    rows = mine_nk.any(dim=1).nonzero().flatten()
    return rows, (found.gate_nk[rows] * mine_nk[rows]).sum(dim=1)


def answer(found: Answers, number: int, rows: Tensor) -> Tensor:
    """What a prototype of the plan, or a constant, says to these tokens, in float32."""
    K, constant_CD = found.plan.mixing_KE.shape[0], found.plan.constant_CD
    if number >= K:
        assert constant_CD is not None
        return constant_CD[number - K].float().to(found.x_nD.device).expand(rows.numel(), -1)
    return output(prototype(found, number), found.x_nD[rows])


def prototype(found: Answers, number: int, *, rounded: bool = False) -> Experts:
    """One prototype, rounded as it is stored, and then in float32 unless ``rounded``."""
    plan, source = found.plan, tensors(found.experts)
    named = {
        name: plan.weights[name][number].to(tensor) if name in plan.weights else _mixed(tensor, plan, number)
        for name, tensor in source.items()
    }
    return _one(named, found.experts, rounded=rounded)


def _mixed(tensor: Tensor, plan: LayerPlan, number: int) -> Tensor:
    return mix(tensor, plan.mixing_KE[number].unsqueeze(0))[0]


def _one(named: dict[str, Tensor], experts: Experts, *, rounded: bool = False) -> Experts:
    made: dict[str, Any] = {name: (value if rounded else value.float()).unsqueeze(0) for name, value in named.items()}
    return replace(experts, **made)


def output(single: Experts, x_cD: Tensor) -> Tensor:
    """The output of one expert, all in float32: a fit to rounded outputs would learn their rounding."""
    bias_D = None if single.down_bias_ED is None else single.down_bias_ED[0]
    return linear(expert_hidden(single, 0, x_cD), single.down_EDI[0], bias_D)


def square(value_nD: Tensor) -> float:
    """The sum of squares, in float64."""
    return float(value_nD.double().square().sum())
