"""Methods that keep some experts as they are, or nearly so, each against its own formula computed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from conmoe.methods.aimer import aimer
from conmoe.registry import get_method
from conmoe.types import Experts, LayerPlan, LayerStatistics, UsageError
from tests.layers import Layer, answer, observe, random_experts, with_rows


def kept_by(plan: LayerPlan) -> list[int]:
    return plan.mixing_KE.argmax(dim=1).tolist()


def run(name: str, layer: Layer, keep: int, **options) -> LayerPlan:
    return get_method(name).function(layer.statistics, layer.experts, keep, **options)


def highest(score: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda e: (-score[e], e))[:keep])


def scores_of(layer: Layer, mean: bool, alpha: float, beta: float) -> list[float]:
    """The score family from its formula, one token and one slot at a time."""
    total, tokens = [0.0] * layer.routing.experts, [0] * layer.routing.experts
    for x_D, chosen, gates in zip(layer.x_TD, layer.routing.index_Tk, layer.routing.weight_Tk, strict=True):
        for expert, gate in zip(chosen.tolist(), gates.tolist(), strict=True):
            total[expert] += gate**alpha * float(answer(layer.experts, expert, x_D).norm()) ** beta
            tokens[expert] += 1
    return [t / max(n, 1) if mean else t for t, n in zip(total, tokens, strict=True)]


# The score family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mean", "alpha", "beta"),
    [
        ("frequency", False, 0, 0),
        ("seer", False, 1, 0),
        ("ean", False, 0, 1),
        ("reap", True, 1, 1),
        ("man", True, 0, 1),
        ("msan", True, 0, 2),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_members_of_the_score_family_equal_their_formula(name: str, mean: bool, alpha: int, beta: int, seed: int):
    layer = observe(random_experts(8, seed=seed), seed=seed, unused=(6,))
    score = scores_of(layer, mean, alpha, beta)
    plan = run(name, layer, 3)
    assert kept_by(plan) == highest(score, 3)
    assert plan.scores["score"].tolist() == pytest.approx(score, rel=1e-5)
    chosen = run("score", layer, 3, mean=mean, alpha=float(alpha), beta=float(beta))
    assert torch.equal(chosen.assignment_E, plan.assignment_E)
    assert torch.equal(chosen.scores["score"], plan.scores["score"])


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 1.0), (-1.0, 0.0), (1.0, 2.0), (3.0, 0.0)])
def test_exponents_that_were_not_summed_are_refused(alpha: float, beta: float):
    with pytest.raises(UsageError, match=rf"No statistic sums g\^{alpha:g} .* known exponents"):
        run("score", observe(random_experts(4)), 2, alpha=alpha, beta=beta)


@pytest.mark.parametrize("name", ["frequency", "reap", "seer", "ean", "man", "msan", "score"])
def test_scores_read_only_the_sums_they_declare(name: str):
    layer, method = observe(random_experts(6)), get_method(name)
    sums = {needed: layer.statistics.sums[needed] for needed in method.needs}
    little = LayerStatistics(80, sums, layer.statistics.sample, layer.statistics.owner_E)
    options = {option.name: option.default for option in method.options.values()}
    plan = method.function(little, layer.experts, 3, **options)
    assert torch.equal(plan.assignment_E, run(name, layer, 3, **options).assignment_E)


# AIMER ---------------------------------------------------------------------------------------------------------------


def flatness(experts: Experts, expert: int) -> float:
    weights = [
        weight
        for matrix in (experts.gate_EID, experts.up_EID, experts.down_EDI)
        for weight in matrix[expert].double().flatten().tolist()
    ]
    mean = sum(map(abs, weights)) / len(weights)
    return mean / (sum(weight**2 for weight in weights) / len(weights)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aimer_drops_the_experts_with_the_flattest_weights(dtype: torch.dtype):
    layer = observe(random_experts(8))
    layer = replace(layer, experts=random_experts(8, seed=3, dtype=dtype))
    flat = [flatness(layer.experts, expert) for expert in range(8)]
    plan = run("aimer", layer, 3)
    assert plan.scores["mean_over_rms"].tolist() == pytest.approx(flat, rel=1e-6)
    assert kept_by(plan) == highest([-a for a in flat], 3)


def test_aimer_reads_three_matrices_as_one_whatever_their_scale():
    experts = random_experts(4, D=64, width=48)
    assert aimer(observe(experts).statistics, experts, 2).scores["mean_over_rms"].tolist() == pytest.approx(
        [(2 / torch.pi) ** 0.5] * 4, abs=0.02
    ), "Gaussian weights"
    tail = with_rows(experts, [0, 1, 2, 3])
    tail.down_EDI[2] *= 10.0  # one loud matrix is a heavy tail of the whole, though each matrix is as flat as before
    tail.gate_EID[1] *= 7.0
    tail.up_EID[1] *= 7.0
    tail.down_EDI[1] *= 7.0
    plan, before = (aimer(observe(each).statistics, each, 1) for each in (tail, experts))
    assert kept_by(plan) == [2]
    assert plan.scores["mean_over_rms"][1] == pytest.approx(float(before.scores["mean_over_rms"][1]), rel=1e-6)


def test_aimer_drops_an_expert_of_zeros_first():
    experts = with_rows(random_experts(4), [0, 1, 2, 3])
    for matrix in (experts.gate_EID, experts.up_EID, experts.down_EDI):
        matrix[1] = 0.0
    plan = aimer(observe(experts).statistics, experts, 3)
    assert kept_by(plan) == [0, 2, 3]
    assert plan.scores["mean_over_rms"][1] == 1.0


# DERN ----------------------------------------------------------------------------------------------------------------


def relatives(order_EI: list[list[int]], noise: float) -> Layer:
    """Experts that hold the units of expert 0 in another order, each unit with noise of its own."""
    base, own = random_experts(1, D=24, width=6), random_experts(len(order_EI), D=24, width=6, seed=1)
    pick = torch.tensor(order_EI)
    related = {
        "gate_EID": base.gate_EID[0][pick] + noise * own.gate_EID,
        "up_EID": base.up_EID[0][pick] + noise * own.up_EID,
        "down_EDI": base.down_EDI[0].T[pick].mT + noise * own.down_EDI,
    }
    return observe(replace(own, **related))


def units_of(tensors: Mapping[str, torch.Tensor], expert: int) -> torch.Tensor:
    gate_ID, up_ID, down_DI = (tensors[name][expert] for name in ("gate_EID", "up_EID", "down_EDI"))
    return torch.cat([gate_ID, up_ID, down_DI.T], dim=1).double()


def test_dern_merges_the_units_of_dropped_experts_into_the_most_similar_kept_ones():
    layer = relatives([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 3, 4, 5, 0, 1], [1, 0, 3, 2, 5, 4]], noise=0.3)
    source = {name: getattr(layer.experts, name) for name in ("gate_EID", "up_EID", "down_EDI")}
    gate_E = scores_of(layer, False, 1, 0)
    kept = highest(gate_E, 2)
    threshold = 0.9
    plan = run("dern", layer, 2, threshold=threshold, iterations=0)
    assert [e for e in range(4) if plan.assignment_E[e] >= 0] == kept

    members: dict[tuple[int, int], list[tuple[float, torch.Tensor, int]]] = {
        (e, row): [(gate_E[e], units_of(source, e)[row], e)] for e in kept for row in range(6)
    }
    moved = [0] * 4
    for dropped in set(range(4)) - set(kept):
        for vector in units_of(source, dropped):
            cosines = {
                place: float(torch.cosine_similarity(vector, units_of(source, place[0])[place[1]], dim=0))
                for place in members
            }
            place = max(cosines, key=lambda place: cosines[place])
            if cosines[place] > threshold:
                members[place].append((gate_E[dropped], vector, dropped))
                moved[dropped] += 1
    assert 0 < sum(moved) < 12
    assert plan.scores["moved"].tolist() == pytest.approx([count / 6 for count in moved])
    recipe_EE = torch.zeros(4, 4).double()
    for (e, row), parts in members.items():
        total = sum(weight for weight, _, _ in parts)
        mean_F = sum(weight * vector for weight, vector, _ in parts) / total
        torch.testing.assert_close(units_of(plan.weights, int(plan.assignment_E[e]))[row], mean_F, rtol=1e-5, atol=1e-6)
        for weight, _, origin in parts:
            recipe_EE[e, origin] += weight / total / 6
    torch.testing.assert_close(plan.mixing_KE[plan.assignment_E[kept]], recipe_EE[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_dern_leaves_an_expert_as_it_is_when_it_absorbs_itself(bias: bool):
    experts = random_experts(1, bias=bias)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    twins = {"gate_EID": experts.gate_EID[0][order], "up_EID": experts.up_EID[0][order]}
    twins["down_EDI"] = experts.down_EDI[0][:, order]
    if experts.gate_bias_EI is not None and experts.up_bias_EI is not None and experts.down_bias_ED is not None:
        twins |= {"gate_bias_EI": experts.gate_bias_EI[0][order], "up_bias_EI": experts.up_bias_EI[0][order]}
        twins["down_bias_ED"] = experts.down_bias_ED[0]
    pair = replace(experts, **{name: torch.stack([getattr(experts, name)[0], twin]) for name, twin in twins.items()})
    plan = run("dern", observe(pair, k=1), 1)
    assert plan.scores["moved"].max() == 1.0
    kept = int((plan.assignment_E >= 0).nonzero())
    for name, tensor in plan.weights.items():
        torch.testing.assert_close(tensor[0], getattr(pair, name)[kept])


def test_dern_gives_each_prototype_its_own_weights_whatever_their_order():
    experts = with_rows(random_experts(5, D=64), [3, 4, 2, 3, 4])
    layer = observe(experts)
    sums = {"gate": torch.tensor([1.0, 1.0, 5.0, 5.0, 5.0]).double()}
    plan = run("dern", replace(layer, statistics=replace(layer.statistics, sums=sums)), 3)
    assert plan.assignment_E.tolist() == [-1, -1, 2, 0, 1], "prototypes go by the lowest expert in them"
    for expert in (2, 3, 4):
        torch.testing.assert_close(plan.weights["up_EID"][plan.assignment_E[expert]], experts.up_EID[expert])
    assert plan.scores["moved"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_dern_is_pruning_where_no_unit_is_alike():
    layer = observe(random_experts(6, D=64))
    plan, pruned = run("dern", layer, 3), run("seer", layer, 3)
    assert torch.equal(plan.assignment_E, pruned.assignment_E)
    assert torch.equal(plan.mixing_KE, pruned.mixing_KE)
    assert not plan.weights
    assert plan.scores["moved"].tolist() == [0.0] * 6


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1.1}, {"iterations": -1}])
def test_dern_refuses_what_is_no_cosine(options: dict):
    with pytest.raises(UsageError, match="cosine above 0"):
        run("dern", observe(random_experts(4)), 2, **options)


# NAEE ----------------------------------------------------------------------------------------------------------------


def changes(layer: Layer, kept: tuple[int, ...], tokens: list[int]) -> float:
    """``||F - F_kept||^2 / ||F||^2``, the softmax over the rows of the kept experts only."""
    before, after = 0.0, 0.0
    for t in tokens:
        probability = layer.routing.logits_TE[t, list(kept)].softmax(dim=0)
        chosen = [(kept[i], float(probability[i])) for i in probability.argsort(descending=True)[:2].tolist()]
        observed = zip(layer.routing.index_Tk[t].tolist(), layer.routing.weight_Tk[t].tolist(), strict=True)
        full_D, left_D = (
            sum(gate * answer(layer.experts, expert, layer.x_TD[t]).double() for expert, gate in slots)
            for slots in (observed, chosen)
        )
        before, after = before + float(full_D.square().sum()), after + float((full_D - left_D).square().sum())
    return after / before


@pytest.mark.parametrize(("keep", "tokens"), [(3, 512), (2, 9), (5, 1)])
def test_naee_keeps_the_set_that_changes_the_output_least(keep: int, tokens: int):
    layer = observe(random_experts(6), T=30)
    drawn = layer.statistics.sample.priority_n.argsort()[:tokens].tolist()
    loss = {kept: changes(layer, kept, drawn) for kept in combinations(range(6), keep)}
    plan = run("naee", layer, keep, tokens=tokens)
    assert plan.predicted_error == pytest.approx(min(loss.values()), rel=1e-4)
    assert loss[tuple(kept_by(plan))] == pytest.approx(min(loss.values()), rel=1e-4)
    assert not plan.scores


def test_naee_exchanges_experts_where_sets_are_many():
    greedy, exchanged, best = (
        [
            run("naee", observe(random_experts(9, seed=seed), seed=seed), 4, limit=limit).predicted_error
            for seed in seeds
        ]
        for limit, seeds in ((0, range(8)), (125, range(8)), (126, range(8)))
    )
    assert all(a >= b >= c for a, b, c in zip(greedy, exchanged, best, strict=True))
    assert exchanged != greedy
    assert sum(b == c for b, c in zip(exchanged, best, strict=True)) >= 6


def test_naee_skips_by_the_gates_that_are_left():
    layer = observe(random_experts(6), k=3)
    plain, skipping = run("naee", layer, 4), run("naee", layer, 4, skip=True)
    assert torch.equal(plain.assignment_E, skipping.assignment_E)
    assert plain.skip == 0.0
    ratios = []
    for z_E in layer.routing.logits_TE:
        gates = sorted(z_E[kept_by(plain)].softmax(dim=0).tolist(), reverse=True)[:3]
        ratios.append(gates[2] / gates[0])
    ratios.sort()
    assert skipping.skip == pytest.approx((ratios[39] + ratios[40]) / 2, rel=1e-5)


def test_naee_has_to_ask_the_router():
    layer = observe(random_experts(4))
    with pytest.raises(UsageError, match="plan each layer alone"):
        run("naee", replace(layer, experts=replace(layer.experts, reroute=None)), 2)


@pytest.mark.parametrize("options", [{"tokens": 0}, {"limit": -1}])
def test_naee_refuses_a_search_without_tokens(options: dict):
    with pytest.raises(UsageError, match="at least 1"):
        run("naee", observe(random_experts(4)), 2, **options)
