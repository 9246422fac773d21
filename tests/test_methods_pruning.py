"""Methods that keep some experts as they are, or nearly so, each against its own formula computed by hand."""

from __future__ import annotations

from dataclasses import replace

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
