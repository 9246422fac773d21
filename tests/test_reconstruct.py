"""Reconstruction against a naive dense layer under autograd, and what it promises: never worse on the tokens held out,
nothing that is exact, frozen or unused touched, the same plan for the same seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import conmoe
from conmoe.artifacts import plan_fingerprint, read_plan, write_plan
from conmoe.forms import without_map
from conmoe.methods.conmoe import conmoe as plan_conmoe
from conmoe.ops import plans
from conmoe.ops.answers import open_answers, prototype, square
from conmoe.ops.experts import tensors
from conmoe.ops.subsets import join_layers
from conmoe.refine import refine
from conmoe.request import check_refine_options
from conmoe.types import ConmoeError, LayerPlan, Plan, ScopePlan, TokenSample, UsageError, sample_tensors
from tests.layers import Layer, observe, prototypes, random_experts, with_rows
from tests.slots import error, first, fitted_on, held_out, wanted

MATRICES = ["down_EDI", "gate_EID", "up_EID"]
BIASES = ["down_bias_ED", "gate_bias_EI", "up_bias_EI"]
#: Enough to make these layers better: they are small, and a unit of few inputs takes a small rate.
QUICK = {"steps": 20, "rate": 0.06}


def small(seed: int = 0, *, T: int = 400, bias: bool = False, unused: tuple[int, ...] = ()) -> Layer:
    return observe(random_experts(6, seed=seed, bias=bias), T=T, seed=seed, unused=unused)


def fitted(layer: Layer, plan: LayerPlan, *, frozen: tuple[int, ...] = (), **options: Any) -> LayerPlan:
    sample = layer.statistics.sample
    return refine("reconstruct", sample, layer.experts, plan, frozen=frozen, options={**QUICK, **options})


def remapped(**changes: Any) -> LayerPlan:
    return replace(plans.remap(torch.tensor([0, 2, 4]), torch.tensor([0, 0, 1, 1, 2, 2])), **changes)


def dropping() -> LayerPlan:
    return plans.prune(torch.tensor([0, 2, 3, 5]), 6)


def sharing_and_dropping() -> LayerPlan:
    """Of six experts one is gone, two share a prototype, and gains are not one."""
    gain_E = torch.tensor([0.9, 0.7, 1.1, 1.0, 0.8, 1.3], dtype=torch.float64)
    return replace(plans.remap(torch.tensor([0, 2, 4, 5]), torch.tensor([0, 0, 1, -1, 2, 3])), gain_E=gain_E)


def with_constant() -> LayerPlan:
    constant_CD = 0.1 * torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    plan = plans.remap(torch.tensor([0, 2]), torch.tensor([0, 0, 1, 1, 0, 1]))
    gain_E = torch.tensor([1.0, 0.8, 1.0, 1.2, 0.6, 1.4], dtype=torch.float64)
    assignment_E = torch.tensor([0, 0, 1, 1, 2, 2])
    return replace(plan, assignment_E=assignment_E, constant_CD=constant_CD, gain_E=gain_E)


PLANS = {
    "remapped": remapped(),
    "merged": plans.merge(torch.tensor([0, 1, 0, 1, 2, 2]), torch.tensor([0.5, 1.0, 0.7, 1.4, 0.9, 0.6])),
    "dropping": dropping(),
    "sharing and dropping": sharing_and_dropping(),
    "constants": with_constant(),
    "gains": remapped(gain_E=torch.tensor([1.0, 0.7, 1.0, 1.2, 1.0, 0.5], dtype=torch.float64)),
    "weights": remapped(weights={"up_EID": 1.5 * random_experts(6).up_EID[[0, 2, 4]]}),
}


def values_of(layer: Layer, plan: LayerPlan) -> dict[str, Tensor]:
    """All that is fitted, in float64: the prototypes' tensors, the gains, the rows that are left of the router."""
    made = {name: value.double() for name, value in tensors(prototypes(layer.experts, plan)).items()}
    made["gain_E"] = plan.gain_E.double()
    left_E = plan.assignment_E >= 0
    if not left_E.all() and plan.constant_CD is None:
        assert layer.experts.router_ED is not None
        rows_KD = layer.experts.router_ED[left_E] if plan.router_KD is None else plan.router_KD
        made["router_KD"] = rows_KD.double()
    return made


def dense(layer: Layer, plan: LayerPlan, values: Mapping[str, Tensor], tokens: list[int]) -> Tensor:
    """``y'_nD``: every prototype answers every token, most with a share of zero."""
    sample, K = layer.statistics.sample, plan.mixing_KE.shape[0]
    x_nD = sample.hidden_nD[tokens].double()
    index_nk, gate_nk = sample.index_nk[tokens].long(), sample.weight_nk[tokens].double()
    if "router_KD" in values:
        left_K = (plan.assignment_E >= 0).nonzero().flatten()
        gate_nk, slot_nk = (x_nD @ values["router_KD"].T).softmax(dim=1).topk(index_nk.shape[1])
        index_nk = left_K[slot_nk]
    share_nk = gate_nk * values["gain_E"][index_nk]
    y_nD = torch.zeros_like(x_nD)
    for number in range(K):

        def product(name: str, bias: str, h: Tensor, number: int = number) -> Tensor:
            return h @ values[name][number].T + (values[bias][number] if bias in values else 0.0)

        gate, up = product("gate_EID", "gate_bias_EI", x_nD), product("up_EID", "up_bias_EI", x_nD)
        hidden = gate * torch.sigmoid(gate) * up
        share_n = (share_nk * (plan.assignment_E[index_nk] == number)).sum(dim=1)
        y_nD = y_nD + share_n.unsqueeze(1) * product("down_EDI", "down_bias_ED", hidden)
    if plan.constant_CD is not None:
        for number, constant_D in enumerate(plan.constant_CD.double(), start=K):
            y_nD = y_nD + (share_nk * (plan.assignment_E[index_nk] == number)).sum(dim=1, keepdim=True) * constant_D
    return y_nD


def trained(layer: Layer, plan: LayerPlan, steps: int, rate: float) -> tuple[dict[str, Tensor], float, list[float]]:
    """All tokens in every step of plain Adam, at the rates that the help states; best of the looks on held-out ones."""
    sample = layer.statistics.sample
    tokens, held = fitted_on(sample), held_out(sample)
    target_nD, wanted_nD = wanted(layer, sample, tokens), wanted(layer, sample, held)
    shared = torch.bincount(plan.assignment_E[plan.assignment_E >= 0], minlength=8)[plan.assignment_E.clamp(0)] > 1
    free_E = shared & (plan.assignment_E >= 0) & (plan.assignment_E < plan.mixing_KE.shape[0])
    values = {name: value.clone().requires_grad_() for name, value in values_of(layer, plan).items()}
    groups = []
    for name, value in values.items():
        size = value.detach().square().mean().sqrt().item()
        step = {"gain_E": 0.03, "gate_bias_EI": 0.1, "up_bias_EI": 0.1, "down_bias_ED": 0.1}.get(name)
        groups.append({"params": [value], "lr": rate * size * (step or 1 / math.sqrt(value.shape[-1])), "name": name})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    full = [group["lr"] for group in optimizer.param_groups]
    best: dict[str, Tensor] = {}
    looks: list[float] = []
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            rise, fall = min(1.0, (step + 1) / (1 + steps / 20)), (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = lr * rise * fall
        optimizer.zero_grad()
        missing_nD = target_nD - dense(layer, plan, values, tokens)
        (missing_nD.square().sum() / len(tokens)).backward()
        grad_E = values["gain_E"].grad
        if grad_E is not None:
            grad_E[~free_E] = 0
        optimizer.step()
        if step + 1 in {round(steps * part / 10) for part in range(1, 11)}:
            now = {name: value.detach().clone() for name, value in values.items()}
            missing = float((wanted_nD - dense(layer, plan, now, held)).square().sum() / wanted_nD.square().sum())
            best = now if not looks or missing < min(looks) else best
            looks.append(missing)
    return best, min(looks), looks


@pytest.mark.parametrize("name", PLANS)
def test_the_predicted_error_is_that_of_a_loop_and_lower_than_before(name: str):
    layer, plan = small(bias=True), PLANS[name]
    sample = layer.statistics.sample
    made = fitted(layer, plan)
    assert made.predicted_error == pytest.approx(error(layer, made, held_out(sample)), rel=1e-4)
    assert error(layer, made, held_out(sample)) < error(layer, plan, held_out(sample))
    assert error(layer, made, fitted_on(sample)) < error(layer, plan, fitted_on(sample))
    assert torch.equal(made.assignment_E, plan.assignment_E)
    assert torch.equal(made.mixing_KE, plan.mixing_KE)
    assert sorted(made.weights) == sorted([*BIASES, *MATRICES])


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("steps", [1, 6])
def test_steps_are_those_of_plain_adam_on_a_dense_layer(name: str, steps: int):
    layer, plan = small(1, bias=True), PLANS[name]
    expected, lowest, _ = trained(layer, plan, steps, 0.02)
    made = fitted(layer, plan, steps=steps, rate=0.02, batch=1000)
    assert made.predicted_error == pytest.approx(lowest, rel=1e-4)
    before, got = values_of(layer, plan), values_of(layer, made)
    for key, value in expected.items():
        moved = (value - before[key]).norm()
        assert (got[key] - value).norm() <= 2e-3 * moved, key
        if key != "gain_E":
            assert moved > 0


def test_the_best_look_is_the_result_not_the_last():
    """Steps that go on after the best look make it worse; they must not reach what was set aside."""
    layer, plan = small(1, T=160), remapped()
    expected, lowest, looks = trained(layer, plan, 60, 0.2)
    assert lowest < looks[-1] / 1.03
    made = fitted(layer, plan, steps=60, rate=0.2, batch=1000)
    assert made.predicted_error == pytest.approx(lowest, rel=1e-3)
    got = values_of(layer, made)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-2, atol=1e-3)


def test_the_scale_of_a_layer_changes_nothing():
    """Down projections a million times smaller, as are their steps: errors are relative."""
    layer = small(2)
    faint = replace(layer.experts, down_EDI=layer.experts.down_EDI * 1e-6)
    found = [fitted(replace(layer, experts=each), remapped(), steps=5) for each in (layer.experts, faint)]
    assert found[1].weights
    assert found[1].predicted_error == pytest.approx(found[0].predicted_error, rel=1e-3)
    torch.testing.assert_close(found[1].weights["down_EDI"] * 1e6, found[0].weights["down_EDI"], rtol=1e-3, atol=1e-4)


def test_the_seed_decides_the_order_of_the_tokens_and_nothing_else_does():
    layer = small(3)
    with torch.random.fork_rng():
        found = []
        for number, seed in enumerate((0, 0, 1)):
            torch.manual_seed(number)
            found.append(fitted(layer, remapped(), seed=seed, batch=50))
    for name in MATRICES:
        assert torch.equal(found[0].weights[name], found[1].weights[name])
        assert not torch.equal(found[0].weights[name], found[2].weights[name])
    assert found[0].predicted_error == found[1].predicted_error != found[2].predicted_error


@pytest.mark.parametrize("name", ["remapped", "merged", "dropping", "gains", "weights"])
def test_frozen_prototypes_and_their_gains_stay_bit_for_bit(name: str):
    plan = PLANS[name]
    layer = small(4, bias=True)
    made = fitted(layer, plan, frozen=(1,))
    found = open_answers(layer.statistics.sample, layer.experts, plan)
    stored = [tensors(prototype(found, number, rounded=True)) for number in range(len(plan.mixing_KE))]
    before = {name: torch.cat([each[name] for each in stored]) for name in stored[0]}
    assert made.weights
    for key, value in made.weights.items():
        assert torch.equal(value[1], before[key][1]), key
        assert not torch.equal(value[0], before[key][0]), key
        assert not torch.equal(value[2], before[key][2]), key
    behind_E = plan.assignment_E == 1
    assert torch.equal(made.gain_E[behind_E], plan.gain_E[behind_E])
    assert (made.gain_E == plan.gain_E).all() == (name == "dropping")


def test_where_everything_is_frozen_nothing_happens():
    plan = remapped()
    made = fitted(small(4), plan, frozen=(0, 1, 2))
    assert not made.weights
    assert torch.equal(made.gain_E, plan.gain_E)


def test_what_is_exact_stays_untouched():
    layer = observe(with_rows(random_experts(6), [0, 0, 2, 2, 4, 4]), T=200)
    made = fitted(layer, remapped())
    assert not made.weights
    assert torch.equal(made.gain_E, remapped().gain_E)
    assert made.router_KD is None
    assert made.predicted_error < 1e-10


@pytest.mark.parametrize("name", ["remapped", "dropping"])
def test_prototypes_without_tokens_keep_their_weights(name: str):
    """Expert 2 (and 3, which it answers for) is never chosen; cut out or not, the router does not choose it later."""
    layer, plan = small(5, unused=(2, 3)), PLANS[name]
    made = fitted(layer, plan, router=False)
    number = int(plan.assignment_E[2])
    assert made.weights
    for key, value in made.weights.items():
        assert torch.isfinite(value).all()
        assert torch.equal(value[number], tensors(layer.experts)[key][2])
        assert not torch.equal(value[0], tensors(layer.experts)[key][0])
    assert torch.equal(made.gain_E[2:4], plan.gain_E[2:4])
    assert made.predicted_error < error(layer, plan, held_out(layer.statistics.sample))


@pytest.mark.parametrize("name", ["remapped", "dropping", "constants"])
@pytest.mark.parametrize("count", [1, 2, 8, 30])
def test_few_tokens_do_no_harm_where_they_are_held_out(name: str, count: int):
    for seed in range(3):
        layer, plan = small(seed), PLANS[name]
        few = first(layer.statistics.sample, count)
        made = refine("reconstruct", few, layer.experts, plan, options=QUICK)
        tokens = few.priority_n.argsort(descending=True)[: max(1, round(0.15 * count))].tolist()
        assert error(layer, made, tokens, few) <= error(layer, plan, tokens, few) * (1 + 1e-6)
        assert all(torch.isfinite(value).all() for value in (made.gain_E, *made.weights.values()))
        if count == 1:
            assert made is plan


def wide(seed: int, T: int = 6000) -> Layer:
    """Sixteen experts, four for a token, by a softmax router."""
    E, D, k = 16, 32, 4
    experts, generator = random_experts(E, D, 24, seed=seed), torch.Generator().manual_seed(seed)
    router_ED, x_TD = torch.randn(E, D, generator=generator), torch.randn(T, D, generator=generator)

    def reroute(hidden_nD: Tensor, kept_K: Tensor, router_KD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows_KD = router_ED[kept_K] if router_KD is None else router_KD
        weight_nk, index_nk = (hidden_nD @ rows_KD.T).softmax(dim=-1).topk(k)
        return kept_K[index_nk], weight_nk / weight_nk.sum(dim=1, keepdim=True)

    index_Tk, weight_Tk = reroute(x_TD, torch.arange(E))
    sample = TokenSample(x_TD, index_Tk.int(), weight_Tk, x_TD @ router_ED.T, torch.rand(T, generator=generator))
    known = replace(observe(random_experts(E, D, 24), T=2).statistics, sample=sample)
    layer = observe(experts, T=2)
    return replace(layer, experts=replace(experts, reroute=reroute, router_ED=router_ED), statistics=known)


@torch.no_grad()
def share_lost(layer: Layer, plan: LayerPlan, sample: TokenSample) -> float:
    answers = open_answers(sample, layer.experts, plan)
    return square(answers.residual_nD) / square(answers.source_nD)


@pytest.mark.parametrize("kind", ["reconstruct", "refit"])
@pytest.mark.parametrize("drops", [False, True])
def test_a_tenth_of_the_tokens_does_no_harm_on_tokens_that_were_never_seen(kind: str, drops: bool):
    kept, options = torch.arange(0, 16, 2), {"steps": 30} if kind == "reconstruct" else {}
    plan = plans.prune(kept, 16) if drops else plans.remap(kept, torch.arange(16) // 2)
    for seed in range(3):
        layer = wide(seed)
        sample = layer.statistics.sample
        fresh = replace(sample, **{name: value[4000:] for name, value in sample_tensors(sample).items()})
        before = share_lost(layer, plan, fresh)
        errors = []
        for count in (400, 4000):
            few = first(sample, count)
            errors.append(share_lost(layer, refine(kind, few, layer.experts, plan, options=options), fresh))
        assert errors[1] < 0.9 * before
        assert errors[0] < before


def test_constants_stay_and_so_do_the_gains_of_those_they_answer_for():
    """Of ``redirect=zero`` too: several experts answered by one constant are no prototype with several experts."""
    layer, plan = small(6, bias=True), with_constant()
    made = fitted(layer, plan)
    assert made.constant_CD is plan.constant_CD
    assert torch.equal(made.gain_E[4:], plan.gain_E[4:])
    assert (made.gain_E[:4] != plan.gain_E[:4]).all()
    layer = small(3)
    silenced = plan_conmoe(layer.statistics, layer.experts, 3, redirect="zero")
    assert silenced.constant_CD is not None
    again = fitted(layer, silenced)
    assert again.weights
    assert again.constant_CD is silenced.constant_CD
    own_E = torch.bincount(silenced.assignment_E, minlength=4)[silenced.assignment_E] == 1
    stays_E = own_E | (silenced.assignment_E == 3)
    assert torch.equal(again.gain_E[stays_E], silenced.gain_E[stays_E])
    assert again.router_KD is None


def test_gains_are_fitted_where_experts_share_a_prototype_only():
    layer = small(7)
    plan = plans.remap(torch.tensor([0, 2, 3, 4]), torch.tensor([0, 0, 1, 2, 3, 3]))
    made = fitted(layer, plan)
    assert (made.gain_E[[0, 1, 4, 5]] != 1).all()
    assert (made.gain_E[[2, 3]] == 1).all()
    assert made.gain_E.dtype == torch.float64
    alone = fitted(layer, dropping())
    assert torch.equal(alone.gain_E, dropping().gain_E)
    assert alone.weights


def test_gains_of_zero_are_no_division_by_zero():
    plan = remapped(gain_E=torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    made = fitted(small(8), plan)
    assert made.weights
    assert torch.isfinite(made.gain_E).all()
    assert made.gain_E[1] == 0


def test_router_rows_are_fitted_in_plans_that_drop_experts_unless_they_are_not_to_be():
    layer, sample = small(9), small(9).statistics.sample
    assert fitted(layer, remapped()).router_KD is None
    made, without = fitted(layer, dropping()), fitted(layer, dropping(), router=False)
    assert layer.experts.router_ED is not None
    assert made.router_KD is not None
    assert made.router_KD.dtype == layer.experts.router_ED.dtype
    assert (made.router_KD != layer.experts.router_ED[[0, 2, 3, 5]]).any(dim=1).all()
    assert without.router_KD is None
    for each in (made, without):
        assert each.predicted_error == pytest.approx(error(layer, each, held_out(sample)), rel=1e-4)
        assert each.predicted_error < error(layer, dropping(), held_out(sample))
    again = fitted(layer, made, steps=5, rate=0.01)  # starts from the rows of the plan, not from the source's
    assert again.predicted_error <= made.predicted_error * (1 + 1e-6)
    skipping = fitted(layer, replace(dropping(), skip=0.3))
    assert skipping.weights
    assert skipping.router_KD is None


@pytest.mark.parametrize("name", ["remapped", "dropping"])
def test_a_rate_that_is_far_too_high_is_repeated_lower_and_never_harms(name: str):
    layer, plan, sample = small(bias=True), PLANS[name], small(bias=True).statistics.sample
    before = error(layer, plan, held_out(sample))
    low, high = fitted(layer, plan, rate=0.06), fitted(layer, plan, rate=0.96)
    assert low.predicted_error < before
    assert high.predicted_error < before
    for rate in (64.0, 1e3, 1e6):
        made = fitted(layer, plan, rate=rate)
        assert error(layer, made, held_out(sample)) <= before * (1 + 1e-6)
        assert all(torch.isfinite(value).all() for value in (made.gain_E, *made.weights.values()))


def test_a_repeat_is_a_run_at_a_fourth_of_the_rate():
    layer, plan = small(bias=True), remapped()
    given = {rate: fitted(layer, plan, rate=rate) for rate in (0.25, 1.0, 4.0)}
    assert given[0.25].weights
    for name, value in given[0.25].weights.items():
        assert torch.equal(given[1.0].weights[name], value)
        assert torch.equal(given[4.0].weights[name], value)


@pytest.mark.parametrize("name", ["remapped", "dropping", "merged"])
def test_experts_in_bfloat16_are_measured_as_they_are_stored(name: str):
    exact, plan = small(2, bias=True), PLANS[name]
    half: dict[str, Any] = {name: value.bfloat16() for name, value in tensors(exact.experts).items()}
    assert exact.experts.router_ED is not None
    half["router_ED"] = exact.experts.router_ED.bfloat16()
    layer = replace(exact, experts=replace(exact.experts, **half))
    sample = layer.statistics.sample
    made = fitted(layer, plan)
    kinds = {value.dtype for value in made.weights.values()} | {
        made.router_KD.dtype if made.router_KD is not None else torch.bfloat16
    }
    assert kinds == {torch.bfloat16}
    assert made.predicted_error == pytest.approx(error(layer, made, held_out(sample)), rel=1e-4)
    assert made.predicted_error < error(layer, plan, held_out(sample))


def test_layers_that_share_a_pool_are_fitted_together():
    """Two layers, one prototype for an expert of each; slots of the second count from six on."""
    parts = [small(seed, bias=True) for seed in (10, 11)]
    statistics, experts = join_layers([part.statistics for part in parts], [part.experts for part in parts])
    both = replace(parts[0], experts=experts, statistics=statistics)
    plan = plans.remap(torch.tensor([0, 1, 2, 6, 7]), torch.tensor([0, 1, 2, 3, 4, 0, 3, 4, 1, 2, 3, 0]))
    made = fitted(both, plan)
    tokens = held_out(statistics.sample)
    assert made.predicted_error == pytest.approx(error(both, made, tokens), rel=1e-4)
    assert made.predicted_error < error(both, plan, tokens)
    with pytest.raises(UsageError, match="--scope 1"):
        fitted(both, plans.prune(torch.arange(8), 12))


def test_tokens_that_no_prototype_answers_are_no_error():
    """Batches of one token, most of which two constants answer alone."""
    layer = small(12)
    plan = plans.remap(torch.tensor([0]), torch.zeros(6, dtype=torch.int64))
    assignment_E = torch.tensor([0, 1, 1, 1, 1, 1])
    plan = replace(plan, assignment_E=assignment_E, constant_CD=torch.zeros(1, 16))
    made = fitted(layer, plan, batch=1, steps=40, rate=0.01)
    assert torch.isfinite(made.weights.get("down_EDI", torch.zeros(1))).all()
    assert made.predicted_error <= error(layer, plan, held_out(layer.statistics.sample)) * (1 + 1e-6)


def test_it_works_where_gradients_are_switched_off():
    layer, plan = small(13), dropping()
    expected = fitted(layer, plan)
    with torch.no_grad():
        made = fitted(layer, plan)
    assert expected.router_KD is not None
    assert made.router_KD is not None
    assert torch.equal(made.router_KD, expected.router_KD)
    assert not any(value.requires_grad for value in (*made.weights.values(), made.gain_E, made.router_KD))


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"batch": 0}, {"rate": 0.0}, {"rate": -1.0}, {"rate": math.nan}, {"rate": 1e300}]
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]):
    with pytest.raises(UsageError, match="one step or more"):
        fitted(small(), remapped(), **options)


@pytest.mark.parametrize(
    ("refinement", "options", "sentence"),
    [
        ("reconstruct", {"steps": "0"}, "one step or more"),
        ("gains", {"ridge": "-1"}, "a ridge of 0 or more, not -1"),
        ("gains", {"ridge": "nan"}, "a ridge of 0 or more, not nan"),
        ("refit", {"sweeps": "0"}, "one sweep or more, not 0"),
    ],
)
def test_values_that_mean_nothing_are_refused_before_any_work(refinement: str, options: Mapping[str, str], sentence):
    request = conmoe.Request(refine=refinement, refine_options=options)
    with pytest.raises(UsageError, match=sentence):
        check_refine_options(request)


def named(layer_plan: LayerPlan) -> Plan:
    scopes = (ScopePlan((0,), layer_plan),)
    return Plan(scopes, "reap", {}, "0.5", "sliced", {}, "a", "b", conmoe.__version__, refine="reconstruct")


def test_router_rows_are_written_read_and_named_by_the_fingerprint(tmp_path: Path):
    rows_KD = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with_router = named(replace(dropping(), router_KD=rows_KD))
    write_plan(tmp_path, with_router)
    found = read_plan(tmp_path)
    router_KD = found.scopes[0].plan.router_KD
    assert router_KD is not None
    assert router_KD.dtype == torch.bfloat16
    assert torch.equal(router_KD, rows_KD)
    other = rows_KD.clone()
    other[2, 3] += 1
    names = [plan_fingerprint(named(replace(dropping(), router_KD=rows))) for rows in (rows_KD, other, None)]
    assert len(set(names)) == 3
    assert plan_fingerprint(found) == names[0]


def test_a_plan_refuses_router_rows_that_do_not_fit_it():
    rows_KD = torch.ones(4, 16)
    with pytest.raises(ConmoeError, match="drops no expert"):
        remapped(router_KD=torch.ones(6, 16))
    with pytest.raises(ConmoeError, match="one row of the router"):
        replace(dropping(), router_KD=rows_KD[:3])
    with pytest.raises(ConmoeError, match="not finite"):
        replace(dropping(), router_KD=rows_KD / 0)


def test_what_the_sliced_form_leaves_of_a_plan_keeps_the_rows_that_stay():
    """Experts 1 and 5 have rows, but only 0, 2 and 4 speak for the prototypes."""
    rows_KD = torch.arange(5.0).unsqueeze(1).expand(5, 16)
    plan = plans.remap(torch.tensor([0, 2, 4]), torch.tensor([0, 0, 1, -1, 2, 2]))
    left = without_map(replace(plan, router_KD=rows_KD))
    assert left.router_KD is not None
    assert left.router_KD[:, 0].tolist() == [0.0, 2.0, 3.0]
