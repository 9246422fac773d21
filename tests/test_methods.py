"""Each method against its own formula, computed by hand on small layers."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from conmoe.methods.conmoe import conmoe
from conmoe.methods.frequency import frequency
from conmoe.methods.random import random
from conmoe.methods.reap import reap
from conmoe.ops import similarity, subsets
from conmoe.types import LayerPlan, UsageError
from tests.layers import Layer, answer, layer_output, observe, random_experts, recipes, sources, with_rows


def kept_by(plan: LayerPlan) -> list[int]:
    return plan.mixing_KE.argmax(dim=1).tolist()


def run(method, layer: Layer, keep: int, **options) -> LayerPlan:
    return method(layer.statistics, layer.experts, keep, **options)


def slots_of(layer: Layer) -> list[list[tuple[float, float]]]:
    """(gate, norm of the output) of every slot of every expert."""
    slots = [[] for _ in range(layer.routing.experts)]
    for x_D, chosen, gates in zip(layer.x_TD, layer.routing.index_Tk, layer.routing.weight_Tk, strict=True):
        for expert, gate in zip(chosen.tolist(), gates.tolist(), strict=True):
            slots[expert].append((gate, float(answer(layer.experts, expert, x_D).norm())))
    return slots


def highest(score: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda e: (-score[e], e))[:keep])


@pytest.mark.parametrize("seed", range(3))
def test_frequency_keeps_the_most_chosen(seed: int):
    layer = observe(random_experts(8, seed=seed), seed=seed)
    assert kept_by(run(frequency, layer, 3)) == highest([len(slots) for slots in slots_of(layer)], 3)


@pytest.mark.parametrize("seed", range(3))
def test_reap_keeps_the_highest_mean_gated_norm(seed: int):
    layer = observe(random_experts(8, seed=seed), seed=seed, unused=(6,))
    score = [sum(g * y for g, y in slots) / max(len(slots), 1) for slots in slots_of(layer)]
    plan = run(reap, layer, 3)
    assert kept_by(plan) == highest(score, 3)
    assert plan.scores["score"].tolist() == pytest.approx(score, rel=1e-5)


def test_random_choice_follows_its_seed():
    layer = observe(random_experts(16))
    choices = {tuple(kept_by(run(random, layer, 5, seed=seed))) for seed in range(20)}
    assert len(choices) > 10
    assert {len(choice) for choice in choices} == {5}
    assert {expert for choice in choices for expert in choice} == set(range(16))


@pytest.mark.parametrize("seed", range(4))
def test_conmoe_minimises_the_contribution_weighted_cost(seed: int):
    layer = observe(random_experts(7, seed=seed), seed=seed)
    cost_EE = similarity.functional_distance(layer.statistics.sample, layer.experts)
    score = torch.tensor([sum(g * y for g, y in slots) for slots in slots_of(layer)]).double()

    def value(kept: tuple[int, ...]) -> float:
        return float((score * cost_EE[:, list(kept)].amin(dim=1)).sum())

    plan = run(conmoe, layer, 3)
    assert value(tuple(kept_by(plan))) == pytest.approx(min(map(value, combinations(range(7), 3))), rel=0.05)
    nearest = [min(kept_by(plan), key=lambda p: (cost_EE[e, p], p)) for e in range(7)]
    assert sources(plan) == [e if e in kept_by(plan) else nearest[e] for e in range(7)]


def test_conmoe_predicts_the_error_of_each_redirect():
    layer = observe(random_experts(6), k=1)
    plan = run(conmoe, layer, 3)
    # with one expert per token nothing can cancel, so the prediction is the error itself
    error = (layer_output(layer, plan) - layer_output(layer)).square().sum() / layer_output(layer).square().sum()
    assert plan.predicted_error == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_silence_answers_where_it_is_nearer_than_any_prototype(seed: int):
    layer = observe(random_experts(7, seed=seed), seed=seed, k=1)
    cost_EE = similarity.functional_distance(layer.statistics.sample, layer.experts)
    score = torch.tensor([sum(g * y for g, y in slots) for slots in slots_of(layer)]).double()

    def value(kept: tuple[int, ...]) -> float:
        return float((score * cost_EE[:, list(kept)].amin(dim=1).clamp_max(1)).sum())

    plan = run(conmoe, layer, 3, redirect="zero")
    kept = tuple(sorted(plan.mixing_KE.argmax(dim=1).tolist()))
    assert value(kept) == pytest.approx(min(map(value, combinations(range(7), 3))), rel=0.05)
    silent = [e for e in range(7) if min(float(cost_EE[e, p]) for p in kept) > 1]
    assert silent
    assert plan.constant_CD is not None
    assert plan.constant_CD.tolist() == [[0.0] * 16]
    assert [e for e, answer in enumerate(plan.assignment_E.tolist()) if answer == 3] == silent
    assert plan.predicted_error < run(conmoe, layer, 3).predicted_error
    error = (layer_output(layer, plan) - layer_output(layer)).square().sum() / layer_output(layer).square().sum()
    assert plan.predicted_error == pytest.approx(float(error), rel=1e-4)
    fused = run(conmoe, layer, 3, redirect="zero", fusion="frequency")
    assert not fused.mixing_KE[:, silent].any()


def test_nobody_is_silenced_whose_stand_in_is_near():
    layer = duplicate_pairs()
    plan = run(conmoe, layer, 2, redirect="zero")
    assert sources(plan) == [0, 0, 2, 2]
    assert plan.constant_CD is None


def duplicate_pairs() -> Layer:
    """{A, A', B, B'} of methods.md, section 1.4, trap 1."""
    return observe(with_rows(random_experts(4), [0, 0, 2, 2]))


def test_product_rule_loses_both_of_a_pair_of_duplicates_where_coverage_loses_nothing():
    layer = duplicate_pairs()
    lossy, lossless = (
        run(conmoe, layer, 2, selection=rule, distance="weight", contribution="mean")
        for rule in ("product", "coverage")
    )
    assert kept_by(lossy) == [0, 1]
    assert sources(lossless) == [0, 0, 2, 2]
    reference_TD = layer_output(layer)
    torch.testing.assert_close(layer_output(layer, lossless), reference_TD)
    assert (layer_output(layer, lossy) - reference_TD).norm() > 0.1 * reference_TD.norm()


def minmax(value: Tensor) -> Tensor:
    return (value - value.min()) / (value.max() - value.min() + 1e-12)


@pytest.mark.parametrize("signal", ["both", "contribution", "replaceability"])
@pytest.mark.parametrize("distance", ["functional", "weight", "mean_output"])
def test_product_rule_equals_its_definition(signal: str, distance: str):
    layer = observe(random_experts(8))
    cost_EE = getattr(similarity, f"{distance}_distance")(layer.statistics.sample, layer.experts)
    u = torch.tensor([min(float(cost_EE[i, j]) for j in range(8) if j != i) for i in range(8)])
    c = torch.tensor([sum(g * y for g, y in slots) / len(slots) for slots in slots_of(layer)])
    score = {"both": minmax(c) * minmax(u), "contribution": c, "replaceability": u}[signal]
    plan = run(conmoe, layer, 4, selection="product", distance=distance, signal=signal, contribution="mean")
    assert kept_by(plan) == highest(score.tolist(), 4)
    assert plan.scores["replaceability"].tolist() == pytest.approx(u.tolist(), rel=1e-6)
    assert (plan.predicted_error >= 0) == (distance == "functional")


@pytest.mark.parametrize(
    ("contribution", "value"),
    [
        ("mean", lambda slots: sum(g * y for g, y in slots) / len(slots)),
        ("sum", lambda slots: sum(g * y for g, y in slots)),
        ("man", lambda slots: sum(y for _, y in slots) / len(slots)),
        ("frequency", len),
    ],
)
def test_contributions_equal_their_definitions(contribution: str, value):
    layer = observe(random_experts(6))
    score = [value(slots) for slots in slots_of(layer)]
    plan = run(conmoe, layer, 3, contribution=contribution, signal="contribution")
    assert kept_by(plan) == highest(score, 3)
    assert plan.scores["contribution"].tolist() == pytest.approx([s / sum(score) for s in score], rel=1e-5)


def test_replaceability_alone_covers_all_experts_alike():
    layer = observe(random_experts(7))
    cost_EE = similarity.functional_distance(layer.statistics.sample, layer.experts)
    plan = run(conmoe, layer, 3, signal="replaceability")
    values = [float(cost_EE[:, list(kept)].amin(dim=1).sum()) for kept in combinations(range(7), 3)]
    assert float(cost_EE[:, kept_by(plan)].amin(dim=1).sum()) == pytest.approx(min(values), rel=0.05)


def test_redirect_ablations_share_the_prototypes():
    layer = observe(random_experts(8))
    nearest, dropped, one, other = (
        run(conmoe, layer, 4, redirect=redirect, seed=seed)
        for redirect, seed in (("nearest", 0), ("drop", 0), ("random", 0), ("random", 1))
    )
    assert kept_by(nearest) == kept_by(dropped) == kept_by(one) == kept_by(other)
    assert [e for e in sources(dropped) if e >= 0] == kept_by(nearest)
    assert all(sources(one)[p] == p for p in kept_by(one))
    assert sources(one) != sources(other)
    assert nearest.predicted_error < min(one.predicted_error, other.predicted_error)
    assert dropped.predicted_error != dropped.predicted_error


@pytest.mark.parametrize("weight", ["frequency", "contribution"])
def test_fusion_averages_the_members_of_each_prototype(weight: str):
    layer = observe(random_experts(8))
    plan, plain = run(conmoe, layer, 3, fusion=weight), run(conmoe, layer, 3)
    share_E = layer.statistics.sums["count"] if weight == "frequency" else plain.scores["contribution"]
    source_E = torch.tensor(sources(plain))
    for e in range(8):
        members = source_E == source_E[e]
        expected_E = torch.where(members, share_E, 0.0) / share_E[members].sum()
        torch.testing.assert_close(recipes(plan)[e], expected_E)


def test_silence_has_no_place_among_weights():
    with pytest.raises(UsageError, match="distance=functional"):
        run(conmoe, duplicate_pairs(), 2, redirect="zero", distance="weight")


def test_contradicting_ablations_are_refused():
    with pytest.raises(UsageError, match="either fusion or redirect"):
        run(conmoe, observe(random_experts(4)), 2, fusion="frequency", redirect="drop")


def scope(source_E: list[int]) -> tuple[list[Layer], LayerPlan, LayerPlan]:
    """Two layers whose experts are rows of one set; planned freely, and with the default floor."""
    pool = random_experts(12)
    halves = [observe(with_rows(pool, source_E[i : i + 4]), seed=i, T=60) for i in (0, 4)]
    joined, experts = subsets.join_layers([layer.statistics for layer in halves], [layer.experts for layer in halves])
    return halves, conmoe(joined, experts, 5, min_own=0), conmoe(joined, experts, 5)


def test_layers_of_a_scope_share_prototypes_without_loss_where_they_repeat_each_other():
    _, free, floored = scope([0, 1, 2, 3, 3, 2, 1, 7])
    assert sources(free) == [0, 1, 2, 3, 3, 2, 1, 7]
    assert free.predicted_error < 1e-6
    own = [sum(source < 4 for source in kept_by(floored)), sum(source >= 4 for source in kept_by(floored))]
    assert min(own) >= 2
    assert floored.predicted_error < 1e-6


def test_fusion_in_a_scope_does_not_mix_layers():
    pool = random_experts(8)
    layers = [observe(with_rows(pool, rows), seed=seed) for seed, rows in enumerate([[0, 1, 2, 3], [0, 1, 6, 7]])]
    joined, experts = subsets.join_layers([layer.statistics for layer in layers], [layer.experts for layer in layers])
    plan = conmoe(joined, experts, 4, fusion="contribution")
    assert all(not (row[:4].any() and row[4:].any()) for row in plan.mixing_KE)


def test_contribution_is_compared_within_layers():
    layers = [observe(random_experts(4, seed=seed), seed=seed) for seed in (0, 1)]
    loud = with_rows(layers[1].experts, [0, 1, 2, 3])
    loud.down_EDI.mul_(1000.0)
    layers[1] = observe(loud, seed=1)
    joined, experts = subsets.join_layers([layer.statistics for layer in layers], [layer.experts for layer in layers])
    shares_E = conmoe(joined, experts, 4).scores["contribution"]
    assert shares_E[:4].sum().item() == pytest.approx(1.0)
    assert shares_E[4:].sum().item() == pytest.approx(1.0)
    assert {source < 4 for source in kept_by(reap(joined, experts, 4))} == {True, False}
