"""What a layer and a plan of it add to each token, slot by slot in float64, and the tokens a refinement holds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conmoe.ops.experts import tensors
from conmoe.refine import HELD_OUT
from conmoe.types import LayerPlan, TokenSample, sample_tensors
from tests.layers import Layer, answer, prototypes


def held_out(sample: TokenSample, share: float = HELD_OUT) -> list[int]:
    """The tokens of highest priority."""
    n = sample.priority_n.numel()
    return sample.priority_n.argsort(descending=True)[: round(share * n)].tolist()


def fitted_on(sample: TokenSample) -> list[int]:
    return sorted(set(range(sample.priority_n.numel())) - set(held_out(sample)))


def wanted(layer: Layer, sample: TokenSample, tokens: Sequence[int]) -> Tensor:
    """``y_nD``, what the source's layer adds to these tokens, slot by slot in float64."""
    precise = {name: value.double() for name, value in tensors(layer.experts).items()}
    y_nD = torch.zeros(len(tokens), sample.hidden_nD.shape[1], dtype=torch.float64)
    for y_D, token in zip(y_nD, tokens, strict=True):
        for expert, gate in zip(sample.index_nk[token].tolist(), sample.weight_nk[token].tolist(), strict=True):
            y_D += gate * answer(replace(layer.experts, **precise), expert, sample.hidden_nD[token].double())
    return y_nD


def given(layer: Layer, plan: LayerPlan, sample: TokenSample, tokens: Sequence[int]) -> Tensor:
    """``y'_nD``, what the layer of a plan adds: its router among what is left, slot by slot in float64.

    New rows of the router are those of the softmax router of :func:`tests.layers.observe`.
    """
    made, K = prototypes(layer.experts, plan), plan.mixing_KE.shape[0]
    left = [expert for expert, prototype in enumerate(plan.assignment_E.tolist()) if prototype >= 0]
    index_nk, weight_nk = sample.index_nk, sample.weight_nk
    if plan.router_KD is not None:
        logits_nK = sample.hidden_nD.double() @ plan.router_KD.double().T
        weight_nk, slot_nk = logits_nK.softmax(dim=1).topk(sample.index_nk.shape[1])
        index_nk = torch.tensor(left)[slot_nk]
    elif len(left) < plan.assignment_E.numel():
        assert layer.experts.reroute is not None
        index_nk, weight_nk = layer.experts.reroute(sample.hidden_nD, torch.tensor(left))
    y_nD = torch.zeros(len(tokens), sample.hidden_nD.shape[1], dtype=torch.float64)
    for y_D, token in zip(y_nD, tokens, strict=True):
        for expert, gate in zip(index_nk[token].tolist(), weight_nk[token].tolist(), strict=True):
            prototype, share = int(plan.assignment_E[expert]), gate * float(plan.gain_E[expert])
            if prototype >= K:
                assert plan.constant_CD is not None
                y_D += share * plan.constant_CD[prototype - K].double()
            else:
                y_D += share * answer(made, prototype, sample.hidden_nD[token].double())
    return y_nD


def error(layer: Layer, plan: LayerPlan, tokens: Sequence[int], sample: TokenSample | None = None) -> float:
    """``||y - y'||^2 / ||y||^2`` over these tokens."""
    sample = sample or layer.statistics.sample
    y_nD = wanted(layer, sample, tokens)
    return float((y_nD - given(layer, plan, sample, tokens)).square().sum() / y_nD.square().sum())


def first(sample: TokenSample, count: int) -> TokenSample:
    return replace(sample, **{name: value[:count] for name, value in sample_tensors(sample).items()})
