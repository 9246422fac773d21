"""MoNE: what is pruned, and which constant answers for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conmoe.ops import plans
from conmoe.registry import bind_options, get_method
from conmoe.types import LayerPlan
from tests.layers import Layer, answer, layer_output, observe, random_experts


def run(layer: Layer, keep: int, **options: object) -> LayerPlan:
    method = get_method("mone")
    return method.function(layer.statistics, layer.experts, keep, **bind_options(method, options))


def seen(layer: Layer, expert: int) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Gates, inputs and outputs of the tokens of one expert, from the routing, token by token."""
    tokens = [
        (gates[chosen.tolist().index(expert)], x_D)
        for x_D, chosen, gates in zip(layer.x_TD, layer.routing.index_Tk, layer.routing.weight_Tk, strict=True)
        if expert in chosen.tolist()
    ]
    inputs = torch.stack([x_D for _, x_D in tokens]).double()
    outputs = torch.stack([answer(layer.experts, expert, x_D) for _, x_D in tokens]).double()
    return [float(gate) for gate, _ in tokens], inputs, outputs


def variances(value_nD: torch.Tensor) -> torch.Tensor:
    """The unbiased variance of each column."""
    return ((value_nD - value_nD.mean(0)) ** 2).sum(0) / (len(value_nD) - 1)


def units(layer: Layer, expert: int, x_nD: torch.Tensor) -> torch.Tensor:
    gate = x_nD @ layer.experts.gate_EID[expert].double().T
    hidden = gate / (1 + torch.exp(-gate)) * (x_nD @ layer.experts.up_EID[expert].double().T)
    return hidden * layer.experts.down_EDI[expert].double().norm(dim=0)


def rank(layer: Layer, expert: int, ranking: str) -> float:
    gates, inputs, outputs = seen(layer, expert)
    gate = sum(gates) / len(layer.x_TD)
    return {
        "fusion": gate * float(variances(outputs).sqrt().norm()),
        "gate": gate,
        "output_variance": float(variances(outputs).norm()),
        "input_variance": float(variances(inputs).norm()),
        "unit_variance": float(variances(units(layer, expert, inputs)).norm()),
    }[ranking]


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("ranking", ["fusion", "gate", "output_variance", "input_variance", "unit_variance"])
def test_experts_of_highest_rank_stay_and_the_others_are_their_mean_output(ranking: str, seed: int):
    layer = observe(random_experts(6, seed=seed), T=60, seed=seed)
    plan = run(layer, 3, ranking=ranking)
    order = sorted(range(6), key=lambda expert: -rank(layer, expert, ranking))
    assert plan.mixing_KE.argmax(1).tolist() == sorted(order[:3])
    assert plan.constant_CD is not None
    for expert in order[3:]:
        constant = plan.constant_CD[plan.assignment_E[expert] - 3]
        torch.testing.assert_close(constant.double(), seen(layer, expert)[2].mean(0), rtol=1e-5, atol=1e-6)


def test_a_constant_is_better_than_silence_on_average():
    layer = observe(random_experts(6, bias=True), T=300)
    whole = layer_output(layer)

    def error(plan: LayerPlan) -> float:
        return float((layer_output(layer, plan) - whole).square().sum())

    assert error(run(layer, 3)) < error(run(layer, 3, constant="zero"))


def test_an_expert_that_is_seldom_asked_goes_though_it_is_heeded_then():
    layer = observe(random_experts(6), T=400)
    sums = dict(layer.statistics.sums)
    rare = int(sums["gate"].argmax())
    for name in ("count", "gate", "output", "output_squared"):  # a fortieth of the tokens, each as it was
        sums[name] = sums[name].clone()
        sums[name][rare] /= 40
    assert sums["count"][rare] > 2
    rarely = replace(layer, statistics=replace(layer.statistics, sums=sums))
    assert run(layer, 5).assignment_E[rare] < 5
    assert run(rarely, 5).assignment_E[rare] == 5


def test_an_expert_without_tokens_becomes_zero():
    layer = observe(random_experts(6), unused=(2,))
    plan = run(layer, 5)
    assert plan.constant_CD is not None
    assert plan.assignment_E[2] == 5
    assert not plan.constant_CD.any()


def test_constants_follow_their_experts_when_parts_are_joined():
    layer = observe(random_experts(6), T=100)
    part = torch.tensor([5, 1, 3, 0])
    from conmoe.ops import experts, subsets

    inner = Layer(
        experts.select(layer.experts, part), layer.x_TD, layer.routing, subsets.restrict(layer.statistics, part)
    )
    joined = plans.embed([run(inner, 2), plans.identity(2)], [part, torch.tensor([2, 4])], 6, experts=layer.experts)
    assert joined.constant_CD is not None
    answers = {expert: int(joined.assignment_E[expert]) for expert in range(6)}
    constants = [expert for expert, place in answers.items() if place >= 4]
    assert len(constants) == 2
    for expert in constants:
        mean = seen(layer, expert)[2].mean(0)
        torch.testing.assert_close(joined.constant_CD[answers[expert] - 4].double(), mean, rtol=1e-5, atol=1e-6)
