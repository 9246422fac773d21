"""Refinement against loops over tokens and slots, numpy's least squares, and what it promises: never worse, never
touching what is exact or frozen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import conmoe
from conmoe.artifacts import read_layer
from conmoe.ops import plans
from conmoe.ops.answers import open_answers
from conmoe.refine import HELD_OUT, held_out_tokens, refine
from conmoe.refinements.refit import fit
from conmoe.registry import get_method, methods
from conmoe.source import open_source, read_experts
from conmoe.trial import group
from conmoe.types import LayerPlan, TokenSample, UsageError, sample_tensors
from tests.conftest import Checkpoint
from tests.layers import Layer, observe, prototypes, random_experts, with_rows
from tests.slots import error, first, fitted_on, given, held_out, wanted

FITTED: tuple[str, ...] = ("gains", "refit")
MAP = torch.tensor([0, 0, 1, 1, 2, 2])
KEPT = torch.tensor([0, 2, 4])


def small(seed: int = 0, *, T: int = 200, bias: bool = False, unused: tuple[int, ...] = ()) -> Layer:
    return observe(random_experts(6, seed=seed, bias=bias), T=T, seed=seed, unused=unused)


def fitted(layer: Layer, sample: TokenSample, plan: LayerPlan, ridges: tuple[float, ...]) -> LayerPlan:
    return fit(open_answers(sample, layer.experts, plan), held_out_tokens(sample), (), ridges)


def remapped() -> LayerPlan:
    return plans.remap(KEPT, MAP)


def mixed(assignment: list[int], E: int) -> LayerPlan:
    return plans.merge(torch.tensor(assignment), torch.rand(E, generator=torch.Generator().manual_seed(5)) + 0.5)


def with_constant() -> LayerPlan:
    constant_CD = 0.1 * torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    plan = plans.remap(torch.tensor([0, 2]), torch.tensor([0, 0, 1, 1, 0, 1]))
    return replace(plan, assignment_E=torch.tensor([0, 0, 1, 1, 2, 2]), constant_CD=constant_CD)


PLANS = {
    "remapped": remapped(),
    "merged": mixed([0, 1, 0, 1, 2, 2], 6),
    "dropping": plans.prune(torch.tensor([0, 2, 3, 5]), 6),
    "constants": with_constant(),
    "gains": replace(remapped(), gain_E=torch.tensor([1.0, 0.7, 1.0, 1.2, 1.0, 0.5], dtype=torch.float64)),
}


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("name", PLANS)
def test_the_predicted_error_is_that_of_a_loop_and_lower_than_before(kind: str, name: str):
    layer, plan = small(bias=True, T=400), PLANS[name]
    sample = layer.statistics.sample
    refined = refine(kind, sample, layer.experts, plan)
    assert refined.predicted_error == pytest.approx(error(layer, refined, held_out(sample)), rel=1e-4)
    assert error(layer, refined, held_out(sample)) < error(layer, plan, held_out(sample))
    assert error(layer, refined, fitted_on(sample)) < error(layer, plan, fitted_on(sample))
    torch.testing.assert_close(refined.assignment_E, plan.assignment_E)
    assert set(refined.weights) == ({"down_EDI"} if kind == "refit" else set())
    assert torch.equal(refined.gain_E, plan.gain_E) == (kind == "refit")


def test_the_gains_are_those_of_numpy():
    """One unknown for each expert that any fitted token chose; the ridge is one more equation for each of them."""
    layer, plan = small(1, unused=(3,)), remapped()
    sample = layer.statistics.sample
    tokens, alone_EE = fitted_on(sample), torch.eye(6, dtype=torch.float64)
    parts = [given(layer, replace(plan, gain_E=gain_E), sample, tokens).flatten().numpy() for gain_E in alone_EE]
    columns, target = np.stack(parts, axis=1), wanted(layer, sample, tokens).flatten().numpy()
    used = [0, 1, 2, 4, 5]
    ridge = 1e-3 * (columns[:, used] ** 2).sum() / len(used)
    system = np.concatenate([columns[:, used], np.sqrt(ridge) * np.eye(len(used))])
    expected, *_ = np.linalg.lstsq(system, np.concatenate([target, np.full(len(used), np.sqrt(ridge))]), rcond=None)
    refined = refine("gains", sample, layer.experts, plan)
    np.testing.assert_allclose(refined.gain_E[used], expected, rtol=1e-4)
    assert refined.gain_E[3] == 1
    assert not refined.weights


def test_without_a_ridge_the_gradient_of_the_last_prototype_vanishes():
    """``sum over fitted tokens of r h^T`` of the prototype that was solved last: nothing linear in ``h`` is left."""
    layer = small(2)
    sample, plan = layer.statistics.sample, remapped()
    refined = fitted(layer, sample, plan, (0.0,))
    made = prototypes(layer.experts, refined)

    def gradient(plan: LayerPlan) -> Tensor:
        total_DI, tokens = torch.zeros(16, 12, dtype=torch.float64), fitted_on(sample)
        missing_nD = wanted(layer, sample, tokens) - given(layer, plan, sample, tokens)
        for missing_D, token in zip(missing_nD, tokens, strict=True):
            x_D = sample.hidden_nD[token].double()
            gate, up = made.gate_EID[2] @ x_D, made.up_EID[2] @ x_D
            for expert, weight in zip(sample.index_nk[token].tolist(), sample.weight_nk[token].tolist(), strict=True):
                if plan.assignment_E[expert] == 2:
                    total_DI += torch.outer(missing_D, weight * gate / (1 + torch.exp(-gate)) * up)
        return total_DI

    assert gradient(refined).norm() < 1e-5 * gradient(plan).norm()


def test_a_ridge_minimises_fit_and_distance_from_the_plan_together():
    """One prototype, whatever ridge came before: any other down projection is worse by the stated objective."""
    layer = small(3)
    sample = layer.statistics.sample
    plan = plans.remap(torch.tensor([1]), torch.zeros(6, dtype=torch.int64))
    refined = fitted(layer, sample, plan, (3.0, 0.5))
    tokens = fitted_on(sample)
    target_nD = wanted(layer, sample, tokens)
    share_n = sample.weight_nk[tokens].double().sum(dim=1)
    hidden_nI = torch.stack([_hidden(layer, 1, sample.hidden_nD[token]) for token in tokens])
    h_nI = share_n.unsqueeze(1) * hidden_nI
    # half a token's energy for each of the 12 hidden units, tokens counted by what they weigh
    weight_n = share_n.square()
    lam = 0.5 * 12 * h_nI.square().sum() / 12 / (weight_n.sum() ** 2 / weight_n.square().sum())
    before_DI = layer.experts.down_EDI[1].double()

    def objective(down_DI: Tensor) -> Tensor:
        return (target_nD - h_nI @ down_DI.T).square().sum() + lam * (down_DI - before_DI).square().sum()

    down_DI = refined.weights["down_EDI"][0].double().requires_grad_()
    start_DI = before_DI.clone().requires_grad_()
    (left,) = torch.autograd.grad(objective(down_DI), down_DI)
    (start,) = torch.autograd.grad(objective(start_DI), start_DI)
    assert left.norm() < 1e-5 * start.norm()


def _hidden(layer: Layer, expert: int, x_D: Tensor) -> Tensor:
    gate, up = (weight[expert].double() @ x_D.double() for weight in (layer.experts.gate_EID, layer.experts.up_EID))
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("kind", FITTED)
def test_what_is_exact_stays_bit_for_bit(kind: str):
    layer = observe(with_rows(random_experts(6), [0, 0, 2, 2, 4, 4]), T=200)
    plan = remapped()
    refined = refine(kind, layer.statistics.sample, layer.experts, plan)
    assert torch.equal(refined.gain_E, plan.gain_E)
    assert not refined.weights
    assert refined.predicted_error < 1e-10


@pytest.mark.parametrize("kind", FITTED)
def test_frozen_prototypes_and_the_experts_they_answer_for_stay(kind: str):
    layer, plan = small(4), remapped()
    refined = refine(kind, layer.statistics.sample, layer.experts, plan, frozen=[1])
    if kind == "gains":
        assert (refined.gain_E[2:4] == 1).all()
        assert (refined.gain_E[[1, 5]] != 1).all()
    else:
        down_KDI = refined.weights["down_EDI"]
        assert torch.equal(down_KDI[1], layer.experts.down_EDI[2])
        assert not torch.equal(down_KDI[0], layer.experts.down_EDI[0])


@pytest.mark.parametrize("kind", FITTED)
def test_dead_experts_and_prototypes_stay_as_they_are(kind: str):
    layer, plan = small(5, unused=(2, 3)), remapped()
    refined = refine(kind, layer.statistics.sample, layer.experts, plan)
    assert refined.predicted_error < error(layer, plan, held_out(layer.statistics.sample))
    if kind == "gains":
        assert refined.gain_E[2:4].tolist() == [1, 1]
        assert torch.isfinite(refined.gain_E).all()
    else:
        assert torch.equal(refined.weights["down_EDI"][1], layer.experts.down_EDI[2])
        assert torch.isfinite(refined.weights["down_EDI"]).all()


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("count", [1, 2, 8, 20, 60])
def test_few_tokens_do_no_harm_where_they_are_held_out(kind: str, count: int):
    """With fewer tokens than hidden units the fit is held back by the plan, or given up."""
    for seed in range(2):
        layer, plan = small(seed), remapped()
        few = first(layer.statistics.sample, count)
        refined = refine(kind, few, layer.experts, plan)
        tokens = few.priority_n.argsort(descending=True)[: max(1, round(HELD_OUT * count))].tolist()
        assert error(layer, refined, tokens, few) <= error(layer, plan, tokens, few) * (1 + 1e-6)
        assert all(torch.isfinite(value).all() for value in (refined.gain_E, *refined.weights.values()))


def test_a_tenth_of_the_tokens_helps_on_tokens_that_were_never_seen():
    layer, plan = small(6, T=400), remapped()
    few = first(layer.statistics.sample, 200)
    for kind in FITTED:
        refined = refine(kind, few, layer.experts, plan)
        assert error(layer, refined, range(200, 400)) < error(layer, plan, range(200, 400))


def test_the_order_of_the_tokens_changes_nothing_but_rounding():
    layer, plan = small(7), remapped()
    sample = layer.statistics.sample
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shuffled = replace(sample, **{name: value[order] for name, value in sample_tensors(sample).items()})
    found = [refine("refit", each, layer.experts, plan).weights["down_EDI"] for each in (sample, shuffled)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_plan_that_drops_asks_the_router_and_leaves_the_gains_of_the_dropped():
    layer, plan = small(1), PLANS["dropping"]
    refined = refine("gains", layer.statistics.sample, layer.experts, plan)
    assert (refined.gain_E[[1, 4]] == 1).all()
    assert (refined.gain_E[[0, 2, 3, 5]] != 1).all()
    with pytest.raises(UsageError, match="--scope 1"):
        refine("gains", layer.statistics.sample, replace(layer.experts, reroute=None), plan)


def test_skipped_slots_are_silent_and_the_others_take_over_their_share():
    layer, plan = small(9), replace(PLANS["dropping"], skip=0.5)
    sample = layer.statistics.sample
    left = torch.tensor([0, 2, 3, 5])
    assert layer.experts.reroute is not None
    index_nk, weight_nk = layer.experts.reroute(sample.hidden_nD, left)
    gate_nk = torch.where(weight_nk < 0.5 * weight_nk.amax(dim=1, keepdim=True), 0.0, weight_nk)
    assert (gate_nk == 0).any()
    gate_nk *= weight_nk.sum(dim=1, keepdim=True) / gate_nk.sum(dim=1, keepdim=True)
    tokens = held_out(sample)
    left_nD = wanted(layer, replace(sample, index_nk=index_nk, weight_nk=gate_nk), tokens)
    y_nD = wanted(layer, sample, tokens)
    expected = (y_nD - left_nD).square().sum() / y_nD.square().sum()
    frozen = refine("refit", sample, layer.experts, plan, frozen=range(4))
    assert frozen.predicted_error == pytest.approx(float(expected), rel=1e-4)


def test_new_weights_of_the_plan_are_what_is_refined():
    """A plan whose up projections are not those of its recipe: these stay, and the loop sees them."""
    layer = small(3, T=400)
    up_KID = 2 * layer.experts.up_EID[KEPT]
    plan = replace(remapped(), weights={"up_EID": up_KID})
    refined = refine("refit", layer.statistics.sample, layer.experts, plan)
    assert torch.equal(refined.weights["up_EID"], up_KID)
    tokens = held_out(layer.statistics.sample)
    assert refined.predicted_error == pytest.approx(error(layer, refined, tokens), rel=1e-4)
    assert refined.predicted_error < error(layer, plan, tokens)


def test_condensed_layers_and_factors_are_refused():
    layer = small()
    sample = layer.statistics.sample
    condensed = plans.condense(torch.tensor([0, 1]), torch.ones(2), 6)
    factored = replace(remapped(), weights={"down_EDI.left": torch.zeros(3, 16, 2)})
    for plan in (condensed, factored):
        with pytest.raises(UsageError, match="--refine none"):
            refine("refit", sample, layer.experts, plan)


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_can_be_refined_or_says_why_not(name: str, checkpoint: Checkpoint, calibrated: Checkpoint):
    """On a real tiny model, its protected expert among the kept: no worse on the held-out tokens, by a loop."""
    request = conmoe.Request(method=name, refine="refit", protect=("0:1",))
    method = get_method(name)
    if method.condenses or name == "mc-smoe":
        with pytest.raises(UsageError, match=r"--refine none|protected"):
            conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), request=request)
        return
    made = conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), request=request)
    plain = conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), request=replace(request, refine="none"))
    assert (made.refine, plain.refine) == ("refit", "none")
    source = open_source(checkpoint("olmoe"))
    for layer, scope, before in zip(source.layers, made.scopes, plain.scopes, strict=True):
        assert torch.equal(scope.plan.assignment_E, before.plan.assignment_E)
        experts = read_experts(source, layer)
        sample = read_layer(calibrated("olmoe"), layer.index).sample
        expected = refine("refit", sample, experts, before.plan, frozen=range(before.plan.mixing_KE.shape[0]))
        assert scope.plan.predicted_error <= expected.predicted_error
    protected = made.scopes[0].plan
    if "down_EDI" in protected.weights:
        kept = protected.weights["down_EDI"][int(protected.assignment_E[1])]
        assert torch.equal(kept, read_experts(source, source.layers[0]).down_EDI[1])
        assert group(made) == "closed form"


def test_a_refitted_weight_that_was_altered_is_found(checkpoint, calibrated, tmp_path):
    folder, out = checkpoint("olmoe"), tmp_path / "out"
    plan = conmoe.plan(folder, calibrated("olmoe"), request=conmoe.Request(refine="refit"))
    applied = conmoe.apply(folder, plan, out)
    conmoe.verify(out, folder, plan, applied.form)
    file = out / "model.safetensors"
    tensors_of_file = load_file(file)
    name = next(name for name in tensors_of_file if "experts" in name and "down_proj" in name)
    tensors_of_file[name].view(-1)[0] += 1
    save_file(tensors_of_file, file, metadata={"format": "pt"})
    with pytest.raises(conmoe.ConmoeError, match="damaged"):
        conmoe.verify(out, folder, plan, applied.form)
