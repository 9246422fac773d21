"""What every registered method promises, on the day it arrives (design, section 8)."""

from __future__ import annotations

import pytest
import torch

from conmoe.ops import experts as expert_ops
from conmoe.ops import plans, subsets
from conmoe.registry import Method, bind_options, methods
from conmoe.types import ConmoeError, LayerPlan
from tests.layers import Layer, layer_output, observe, prototypes, random_experts, recipes, with_rows

REGISTERED = list(methods().values())
#: Methods that do not look at the experts cannot follow their labels.
BLIND = {"random"}
#: Methods that look at what experts are, not at how often they are asked: an unused one may stay.
BLIND_TO_USE = BLIND | {"aimer", "cd-moe", "hc-smoe", "sub-moe"}

every_method = pytest.mark.parametrize("method", REGISTERED, ids=lambda method: method.name)


def static_gates(plan: LayerPlan) -> torch.Tensor:
    """The constant gate of each source expert in a condensed layer; zero where it does not stay, or routers do."""
    return torch.zeros(8) if plan.static_K is None else plan.static_K @ plan.mixing_KE.float()


def run(method: Method, layer: Layer, keep: int) -> LayerPlan:
    return method.function(layer.statistics, layer.experts, keep, **bind_options(method, {}))


@every_method
@pytest.mark.parametrize("keep", [1, 3, 7, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_plan_is_valid_and_deterministic(method: Method, keep: int, bias: bool):
    layer = observe(random_experts(8, bias=bias))
    plan, again = run(method, layer, keep), run(method, layer, keep)
    assert plan.mixing_KE.shape == (keep, 8)
    assert torch.equal(plan.assignment_E, again.assignment_E)
    assert torch.equal(plan.mixing_KE, again.mixing_KE)
    answers = keep + (0 if plan.constant_CD is None else len(plan.constant_CD))
    if method.condenses and keep < 8:
        assert plan.static_K is not None
        assert torch.equal(plan.static_K, again.static_K)
        answers = 0  # whom the router could choose, if there were one
    assert set(plan.assignment_E.tolist()) - {plans.DROPPED} == set(range(answers)), "a prototype that nobody uses"
    assert all(score.shape == (8,) and torch.isfinite(score).all() for score in plan.scores.values())


@every_method
def test_keeping_everything_is_the_identity(method: Method):
    plan = run(method, observe(random_experts(6)), 6)
    assert plan.assignment_E.tolist() == list(range(6))
    assert torch.equal(plan.mixing_KE, torch.eye(6, dtype=plan.mixing_KE.dtype))
    assert torch.equal(plan.gain_E, torch.ones(6, dtype=plan.gain_E.dtype))
    assert not plan.weights


@every_method
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_relabelling_experts_relabels_the_plan(method: Method, seed: int):
    if method.name in BLIND:
        pytest.skip("does not look at the experts")
    layer = observe(random_experts(8, seed=seed), seed=seed, T=200)
    assert layer.statistics.sums["count"].unique().numel() == 8, "ties go to the lower label; pick another seed"
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    renamed = Layer(
        expert_ops.select(layer.experts, order),
        layer.x_TD,
        layer.routing,
        subsets.restrict(layer.statistics, order),
    )
    plan, again = run(method, layer, 4), run(method, renamed, 4)
    torch.testing.assert_close(recipes(again), recipes(plan)[order][:, order], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(again.gain_E, plan.gain_E[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(static_gates(again), static_gates(plan)[order], rtol=1e-6, atol=1e-9)
    now, before = prototypes(renamed.experts, again), prototypes(layer.experts, plan)
    for now_expert, expert in enumerate(order.tolist()):
        here, there = int(again.assignment_E[now_expert]), int(plan.assignment_E[expert])
        assert (here < 0) == (there < 0)
        if here >= len(now.gate_EID):
            assert again.constant_CD is not None
            assert plan.constant_CD is not None
            assert torch.equal(again.constant_CD[here - 4], plan.constant_CD[there - 4])
        elif here >= 0:
            for name, tensor in expert_ops.tensors(now).items():
                expected = getattr(before, name)[there]
                torch.testing.assert_close(tensor[here], expected, rtol=1e-4, atol=1e-5)


@every_method
def test_unused_experts_survive(method: Method):
    layer = observe(random_experts(8), unused=(0, 3, 5))
    for keep in (2, 5, 6):
        plan = run(method, layer, keep)
        assert all(torch.isfinite(score).all() for score in plan.scores.values())
        assert torch.isfinite(recipes(plan)).all()
    kept = run(method, layer, 5).mixing_KE.argmax(dim=1).tolist()
    if method.name not in BLIND_TO_USE:
        assert kept == [1, 2, 4, 6, 7], "an unused expert took the place of a used one"


@every_method
def test_a_layer_without_any_tokens_is_still_planned(method: Method):
    layer = observe(random_experts(6), T=8)
    silent = {name: torch.zeros_like(tensor) for name, tensor in layer.statistics.sums.items()}
    statistics = type(layer.statistics)(0, silent, layer.statistics.sample, layer.statistics.owner_E)
    plan = run(method, Layer(layer.experts, layer.x_TD, layer.routing, statistics), 3)
    assert torch.isfinite(recipes(plan)).all()


@every_method
@pytest.mark.parametrize("seed", range(3))
def test_duplicated_experts_are_lossless_where_promised(method: Method, seed: int):
    if not method.promises_lossless_duplicates:
        pytest.skip("not promised")
    layer = observe(with_rows(random_experts(8, seed=seed), [0, 1, 2, 0, 1, 2, 6, 6]), seed=seed)
    plan = run(method, layer, 4)
    # fitted weights are solved for in the sample's precision; copies and averages are closer by far
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if plan.weights else {}
    torch.testing.assert_close(layer_output(layer, plan), layer_output(layer), **tolerance)


@every_method
def test_parts_of_a_layer_are_planned_and_joined(method: Method):
    layer = observe(random_experts(9), k=3)
    parts = [torch.tensor([0, 2, 4, 6]), torch.tensor([1, 3, 5, 7])]
    planned = []
    for subset in parts:
        statistics = subsets.restrict(layer.statistics, subset)
        planned.append(
            run(method, Layer(expert_ops.select(layer.experts, subset), layer.x_TD, layer.routing, statistics), 2)
        )
    if method.condenses:  # a layer has one router or none
        with pytest.raises(ConmoeError, match="condensed as a whole"):
            plans.embed([*planned, plans.identity(1)], [*parts, torch.tensor([8])], 9, experts=layer.experts)
        return
    joined = plans.embed([*planned, plans.identity(1)], [*parts, torch.tensor([8])], 9, experts=layer.experts)
    recipe_EE = recipes(joined)
    assert joined.mixing_KE.shape == (5, 9)
    assert recipe_EE[8].tolist() == [0.0] * 8 + [1.0]
    assert not recipe_EE[parts[0]][:, parts[1]].any()
    assert not recipe_EE[parts[1]][:, parts[0]].any()


@every_method
def test_where_a_scope_drops_experts_every_router_has_as_many_left_as_it_picks(method: Method):
    if method.form_with(bind_options(method, {})) != "sliced" or method.name == "naee":
        pytest.skip("drops nothing, or no scope")
    layers = [
        observe(random_experts(8, seed=0), k=3, unused=(0, 1, 2)),
        observe(random_experts(8, seed=1), k=3, seed=1),
    ]
    statistics, experts = subsets.join_layers(
        [layer.statistics for layer in layers], [layer.experts for layer in layers]
    )
    plan = method.function(statistics, experts, 6, **bind_options(method, {}))
    left = (plan.assignment_E >= 0).view(2, 8).sum(dim=1)
    assert left.tolist() == [3, 3]


@every_method
def test_methods_explain_themselves(method: Method):
    assert method.help
    assert method.paper
    assert all(option.help for option in method.options.values())
