"""CD-MoE: condensed layers against loops written from the paper's formulas, layer search against the naive one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conmoe.methods.cd_moe import cd_moe
from conmoe.ops.divergence import jensen_shannon
from conmoe.types import LayerPlan, TokenSample, UsageError
from tests.layers import Layer, answer, observe, random_experts, with_rows


def softmax(x: list[float]) -> list[float]:
    weights = [math.exp(value - max(x)) for value in x]
    return [weight / sum(weights) for weight in weights]


def naive_js(x: list[float], y: list[float]) -> float:
    """Half of KL(p || m) and half of KL(q || m), every probability plus 1e-10, one component at a time."""
    p, q = softmax(x), softmax(y)
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2 + 1e-10
        total += (a + 1e-10) * math.log((a + 1e-10) / m) / 2 + (b + 1e-10) * math.log((b + 1e-10) / m) / 2
    return total


def test_jensen_shannon_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    x_nD, y_nD = 2 * torch.randn(2, 7, 11, generator=generator)
    expected = [naive_js(x, y) for x, y in zip(x_nD.tolist(), y_nD.tolist(), strict=True)]
    torch.testing.assert_close(jensen_shannon(x_nD, y_nD), torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(jensen_shannon(x_nD, y_nD), jensen_shannon(y_nD, x_nD), rtol=0, atol=1e-14)
    assert jensen_shannon(x_nD.double(), x_nD.double() + 3).max() < 1e-14, "softmax does not see a constant"
    far = torch.tensor([[0.0, 900.0], [900.0, 0.0]])
    torch.testing.assert_close(jensen_shannon(far[:1], far[1:]), torch.tensor([math.log(2)]).double())


def test_jensen_shannon_of_close_states_is_more_than_rounding():
    x_nD = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).double()
    step_nD = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).double()
    near, half = jensen_shannon(x_nD, x_nD + 1e-4 * step_nD), jensen_shannon(x_nD, x_nD + 5e-5 * step_nD)
    torch.testing.assert_close(near / half, torch.full_like(near, 4.0), rtol=1e-2, atol=0)


def layer_with_rest(E: int = 6, *, seed: int = 0, rest: bool = True, **observed: object) -> Layer:
    layer = observe(random_experts(E, seed=seed), seed=seed, T=40, **observed)
    if not rest:
        return layer
    rest_nD = torch.randn(layer.x_TD.shape, generator=torch.Generator().manual_seed(50 + seed))
    statistics = replace(layer.statistics, sample=replace(layer.statistics.sample, rest_nD=rest_nD))
    return replace(layer, statistics=statistics)


def naive_outputs(layer: Layer, tokens: int) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    """Per token: every expert's answer, the routed sum, the rest."""
    sample = layer.statistics.sample
    answers, routed, rest = [], [], []
    for token in range(tokens):
        x_D = sample.hidden_nD[token]
        answers.append([answer(layer.experts, e, x_D).double() for e in range(layer.routing.experts)])
        slots = zip(sample.index_nk[token].tolist(), sample.weight_nk[token].tolist(), strict=True)
        routed.append(sum((gate * answers[-1][e] for e, gate in slots if e >= 0), torch.zeros_like(x_D).double()))
        rest.append(torch.zeros_like(x_D).double() if sample.rest_nD is None else sample.rest_nD[token].double())
    return answers, routed, rest


def naive_gates(layer: Layer) -> list[float]:
    given: list[list[float]] = [[] for _ in range(layer.routing.experts)]
    for chosen, gates in zip(layer.routing.index_Tk.tolist(), layer.routing.weight_Tk.tolist(), strict=True):
        for expert, gate in zip(chosen, gates, strict=True):
            given[expert].append(gate)
    return [sum(gates) / len(gates) if gates else 0.06 for gates in given]


def naive_divergence(layer: Layer, chosen: list[int], tokens: int) -> float:
    gates = naive_gates(layer)
    total = 0.0
    for answers, routed, rest in zip(*naive_outputs(layer, tokens), strict=True):
        condensed = rest + sum((gates[e] * answers[e] for e in chosen), torch.zeros_like(rest))
        total += naive_js((routed + rest).tolist(), condensed.tolist())
    return total / tokens


def kept(plan: LayerPlan) -> list[int]:
    return plan.mixing_KE.argmax(dim=1).tolist()


def order_of(plan: LayerPlan) -> list[int]:
    """The experts in the order in which they were added."""
    return sorted(kept(plan), key=lambda expert: float(plan.scores["step"][expert]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rest", [False, True])
def test_each_step_adds_the_expert_of_least_divergence(seed: int, rest: bool):
    layer = layer_with_rest(seed=seed, rest=rest)
    chosen: list[int] = []
    for step in range(1, 4):
        every = {e: naive_divergence(layer, [*chosen, e], 40) for e in range(6) if e not in chosen}
        best = min(every, key=lambda expert: every[expert])
        plan = cd_moe(layer.statistics, layer.experts, step)
        assert sorted([*chosen, best]) == kept(plan)
        assert float(plan.scores["divergence"][best]) == pytest.approx(every[best], rel=1e-4)
        chosen.append(best)


def test_rest_of_the_layer_has_a_say():
    alone, beside = layer_with_rest(seed=2, rest=False), layer_with_rest(seed=2)
    plans_ = [cd_moe(layer.statistics, layer.experts, 3) for layer in (alone, beside)]
    assert not torch.allclose(plans_[0].scores["divergence"], plans_[1].scores["divergence"])


@pytest.mark.parametrize("unused", [(), (1, 4)])
def test_static_gates_are_the_mean_gates_of_the_tokens_that_chose_an_expert(unused: tuple[int, ...]):
    layer = layer_with_rest(unused=unused)
    plan = cd_moe(layer.statistics, layer.experts, 5)
    expected = naive_gates(layer)
    assert plan.static_K is not None
    assert plan.static_K.tolist() == pytest.approx([expected[expert] for expert in kept(plan)], rel=1e-5)
    assert plan.scores["mean_gate"].tolist() == pytest.approx(expected, rel=1e-5)
    if unused:
        assert expected[1] == expected[4] == 0.06


def squared_errors(layer: Layer, plan: LayerPlan) -> float:
    """``||sum w_e E_e - y||^2 / ||y||^2`` with the plan's gates, one token at a time."""
    assert plan.static_K is not None
    gates = dict(zip(kept(plan), plan.static_K.tolist(), strict=True))
    error = energy = 0.0
    for answers, routed, _ in zip(*naive_outputs(layer, 40), strict=True):
        condensed = sum((gate * answers[e] for e, gate in gates.items()), torch.zeros_like(routed))
        error += float((condensed - routed).square().sum())
        energy += float(routed.square().sum())
    return error / energy


@pytest.mark.parametrize("seed", range(3))
def test_fitted_gates_leave_less_squared_error_than_mean_gates(seed: int):
    layer = layer_with_rest(seed=seed)
    mean = cd_moe(layer.statistics, layer.experts, 3)
    fitted = cd_moe(layer.statistics, layer.experts, 3, gates="least_squares")
    assert kept(mean) == kept(fitted)
    errors = squared_errors(layer, mean), squared_errors(layer, fitted)
    assert errors[1] < 0.99 * errors[0]
    assert (mean.predicted_error, fitted.predicted_error) == pytest.approx(errors, rel=1e-4)
    for plan in (mean, fitted):
        assert float(plan.scores["error_mean_gates"].min()) <= mean.predicted_error
        assert float(plan.scores["error_least_squares"][order_of(plan)[-1]]) == pytest.approx(errors[1], rel=1e-4)

    answers, routed, _ = naive_outputs(layer, 40)
    regressors = torch.stack([torch.cat([token[e] for token in answers]) for e in kept(fitted)], dim=1)
    exact = torch.linalg.lstsq(regressors, torch.cat(routed)[:, None]).solution[:, 0]
    assert fitted.static_K is not None
    torch.testing.assert_close(fitted.static_K.double(), exact, rtol=1e-2, atol=1e-3)


def test_no_expert_may_stay_and_then_nothing_is_needed():
    layer = layer_with_rest()
    sample = layer.statistics.sample
    empty = TokenSample(*(getattr(sample, name)[:0] for name in TokenSample.__dataclass_fields__))
    statistics = replace(layer.statistics, sample=empty)
    plan = cd_moe(statistics, layer.experts, 0)
    assert plan.static_K is not None
    assert plan.mixing_KE.shape == (0, 6)
    assert plan.static_K.shape == (0,)
    assert plan.predicted_error == 1.0
    with pytest.raises(UsageError, match="--sample"):
        cd_moe(statistics, layer.experts, 2)


def test_ties_go_to_the_lower_index():
    layer = layer_with_rest()
    experts = with_rows(layer.experts, [3, 1, 2, 3, 4, 3])
    sums = dict(layer.statistics.sums)
    for name in ("count", "gate"):
        sums[name] = sums[name].clone()
        sums[name][[0, 5]] = float(sums[name][3])
    statistics = replace(layer.statistics, sums=sums)
    same = [e for e in kept(cd_moe(statistics, experts, 4)) if e in (0, 3, 5)]
    assert same
    assert same == [0, 3, 5][: len(same)]


def test_only_so_many_tokens_are_looked_at():
    layer = layer_with_rest(seed=1)
    few = cd_moe(layer.statistics, layer.experts, 2, tokens=5)
    first = min(range(6), key=lambda e: naive_divergence(layer, [e], 5))
    assert first in kept(few)
    assert float(few.scores["divergence"][order_of(few)[0]]) == pytest.approx(naive_divergence(layer, [first], 5))


def test_layers_of_a_scope_are_not_condensed_together():
    layer = layer_with_rest()
    statistics = replace(layer.statistics, owner_E=torch.tensor([0, 0, 0, 1, 1, 1]))
    with pytest.raises(UsageError, match="--scope 1"):
        cd_moe(statistics, layer.experts, 2)
