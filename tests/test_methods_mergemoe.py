"""MergeMoE against the paper's own formula, its failure with few tokens, and what the ridge does about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conmoe.methods import merge_moe
from conmoe.methods.merge_moe import mergemoe
from conmoe.ops import plans, similarity, subsets
from conmoe.ops.experts import tensors
from conmoe.types import Experts, LayerPlan, UsageError
from tests.layers import Layer, answer, layer_output, observe, prototypes, random_experts, recipes, swiglu, with_rows


def run(layer: Layer, keep: int, **options) -> LayerPlan:
    return mergemoe(layer.statistics, layer.experts, keep, **options)


def clusters(plan: LayerPlan) -> list[list[int]]:
    return [(plan.assignment_E == prototype).nonzero().flatten().tolist() for prototype in range(len(plan.mixing_KE))]


def related(E: int, *, noise: float, width: int = 24) -> Experts:
    """One expert with its up and down scaled against each other, and noise: alike, and yet not averaged well."""
    one, other = random_experts(1, D=24, width=width, seed=1), random_experts(E, D=24, width=width, seed=2)
    scale_E11 = torch.logspace(-0.3, 0.3, E).reshape(-1, 1, 1)
    return Experts(
        one.gate_EID + noise * other.gate_EID,
        scale_E11 * (one.up_EID + noise * other.up_EID),
        (one.down_EDI + noise * other.down_EDI) / scale_E11,
        swiglu,
    )


def merged_output(layer: Layer, plan: LayerPlan, prototype: int, x_TD: Tensor) -> Tensor:
    made = prototypes(layer.experts, plan)
    return torch.stack([answer(made, prototype, x_D.double()) for x_D in x_TD])


def wanted_output(layer: Layer, share_E: Tensor, x_TD: Tensor) -> Tensor:
    """``sum b_j E_j(x)``, from the formula."""
    return torch.stack(
        [
            sum(share * answer(layer.experts, e, x_D).double() for e, share in enumerate(share_E.tolist()))
            for x_D in x_TD
        ]
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("seed", range(3))
def test_the_most_used_are_centres_and_the_others_join_the_nearest_by_cosine(seed: int):
    layer = observe(random_experts(8, seed=seed), seed=seed)
    count = layer.statistics.sums["count"].tolist()
    centres = sorted(sorted(range(8), key=lambda e: (-count[e], e))[:3])
    flat = [torch.cat([layer.experts.up_EID[e].flatten(), layer.experts.gate_EID[e].flatten()]) for e in range(8)]

    def cosine(i: int, j: int) -> float:
        return float(flat[i] @ flat[j] / (flat[i].norm() * flat[j].norm()))

    nearest = [e if e in centres else max(centres, key=lambda c: (cosine(e, c), -c)) for e in range(8)]
    plan = run(layer, 3)
    assert sorted(map(tuple, clusters(plan))) == sorted(
        tuple(e for e in range(8) if nearest[e] == centre) for centre in centres
    )
    for e in range(8):
        total = sum(count[other] for other in range(8) if nearest[other] == nearest[e])
        expected = [count[other] / total if nearest[other] == nearest[e] else 0.0 for other in range(8)]
        assert recipes(plan)[e].tolist() == pytest.approx(expected)


def test_cosine_of_experts_counts_biases_and_survives_an_expert_of_zeros():
    experts = random_experts(4, bias=True)
    parts = [part for name, part in tensors(experts).items() if "down" not in name]
    for part in parts:
        part[2] = 0
    flat_EP = torch.cat([part.flatten(1) for part in parts], dim=1).double()
    expected = torch.nn.functional.cosine_similarity(flat_EP.unsqueeze(0), flat_EP.unsqueeze(1), dim=2)
    torch.testing.assert_close(similarity.gate_up_cosine(experts), expected, rtol=1e-6, atol=1e-7)


def stacked(experts: Experts, share_E: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P, Q and D' of the paper (section 2.1 and 2.2 of the notes), in float64, a column per token."""
    members, x_DT = share_E.nonzero().flatten().tolist(), x_TD.double().T
    gate, up = (
        sum(share_E[e] * weight[e].double() for e in members).float().double()
        for weight in (experts.gate_EID, experts.up_EID)
    )
    P = swiglu(gate @ x_DT, up @ x_DT)
    Q = torch.cat([swiglu(experts.gate_EID[e].double() @ x_DT, experts.up_EID[e].double() @ x_DT) for e in members])
    return P, Q, torch.cat([share_E[e] * experts.down_EDI[e].double() for e in members], dim=1)


@pytest.mark.parametrize("T", [7, 60])
def test_without_ridge_it_is_the_paper_s_compression_matrix(T: int):
    """T1 = Q pinv(P), down' = D' T1, with fewer and with more tokens than hidden units."""
    layer = observe(random_experts(6, width=10), T=T)
    plan = run(layer, 2, ridge=0.0)
    for prototype, share_E in enumerate(plan.mixing_KE):
        P, Q, down = stacked(layer.experts, share_E, layer.x_TD)
        expected = down @ (Q @ torch.linalg.pinv(P))
        torch.testing.assert_close(plan.weights["down_EDI"][prototype].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.05, 2.0])
def test_the_average_counts_for_some_tokens_per_hidden_unit(ridge: float):
    """Literally: ``ridge`` tokens for each hidden unit, where all others are silent and the average is right."""
    layer = observe(random_experts(6, width=10), T=60)
    plan = run(layer, 2, ridge=ridge)
    for prototype, share_E in enumerate(plan.mixing_KE):
        P, Q, down = stacked(layer.experts, share_E, layer.x_TD)
        average = torch.einsum("E,EDI->DI", share_E, layer.experts.down_EDI.double())
        token = P.square().mean().sqrt() * torch.eye(10, dtype=torch.float64)
        more = (ridge * 10) ** 0.5 * token
        wide_P, wide_Y = torch.cat([P, more], dim=1), torch.cat([down @ Q, average @ more], dim=1)
        expected = torch.linalg.lstsq(wide_P.T, wide_Y.T).solution.T
        torch.testing.assert_close(plan.weights["down_EDI"][prototype].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighting", ["uniform", "gated"])
def test_no_other_down_projection_fits_better(weighting: str, bias: bool):
    """Random steps away from the solution raise the objective, written as a loop over tokens."""
    layer = observe(random_experts(5, D=6, width=4, bias=bias), T=50)
    plan = run(layer, 2, ridge=0.0, weighting=weighting)
    prototype, members = next((p, c) for p, c in enumerate(clusters(plan)) if len(c) > 1)
    generator = torch.Generator().manual_seed(0)

    def objective(candidate: LayerPlan) -> float:
        made, total = prototypes(layer.experts, candidate), 0.0
        for x_D, chosen, gates in zip(layer.x_TD, layer.routing.index_Tk, layer.routing.weight_Tk, strict=True):
            if weighting == "uniform":
                share = {e: float(plan.mixing_KE[prototype, e]) for e in members}
            else:
                share = {e: g for e, g in zip(chosen.tolist(), gates.tolist(), strict=True) if e in members}
            wanted = sum(g * answer(layer.experts, e, x_D).double() for e, g in share.items())
            found = sum(share.values()) * answer(made, prototype, x_D.double())
            total += float((wanted - found).square().sum()) if share else 0.0
        return total

    best = objective(plan)
    for name, value in plan.weights.items():
        for scale in (1e-1, 1e-2):
            step = torch.zeros_like(value)
            step[prototype] = scale * torch.randn(value.shape[1:], generator=generator)
            for sign in (1, -1):
                assert objective(replace(plan, weights={**plan.weights, name: value + sign * step})) > best


def held_out_errors(T: int, noise: float) -> tuple[float, ...]:
    """On tokens that were not fitted, against the wanted output: the paper's fit, ours, and the average."""
    layer, errors = observe(related(4, noise=noise), T=T), []
    x_TD = observe(layer.experts, T=200, seed=7).x_TD
    for options in ({"ridge": 0.0}, {}, {"ridge": 1e12}):
        plan = run(layer, 1, **options)
        errors.append(relative(merged_output(layer, plan, 0, x_TD), wanted_output(layer, plan.mixing_KE[0], x_TD)))
    return tuple(errors)


def test_too_few_tokens_break_the_paper_s_fit_and_the_ridge_mends_it():
    """Section 2.6 of the notes: P is rank deficient when there are fewer tokens than hidden units (24)."""
    paper, ours, average = held_out_errors(T=16, noise=0.1)
    assert paper > 2 * average
    assert ours < average
    paper, ours, average = held_out_errors(T=24, noise=0.3)
    assert paper > 5 * average
    assert ours < average
    paper, ours, average = held_out_errors(T=600, noise=0.1)
    assert paper < 0.1 * average
    assert ours < 0.1 * average


@pytest.mark.parametrize("bias", [False, True])
def test_a_large_ridge_is_the_average(bias: bool):
    layer = observe(random_experts(6, bias=bias))
    plan = run(layer, 2, ridge=1e9)
    average = plans.merge(plan.assignment_E, layer.statistics.sums["count"])
    torch.testing.assert_close(layer_output(layer, plan), layer_output(layer, average), rtol=1e-4, atol=1e-5)
    assert set(plan.weights) == ({"down_EDI", "down_bias_ED"} if bias else {"down_EDI"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighting", ["uniform", "gated"])
def test_lone_experts_are_copies(weighting: str, dtype: torch.dtype):
    layer, experts = observe(random_experts(6, bias=True), unused=(1,)), random_experts(6, bias=True, dtype=dtype)
    plan = mergemoe(layer.statistics, experts, 5, weighting=weighting, ridge=0.0)
    for prototype, recipe in enumerate(plan.mixing_KE.tolist()):
        for name, value in plan.weights.items():
            assert torch.equal(value[prototype], getattr(experts, name)[recipe.index(1.0)])
    assert plan.predicted_error == 0.0


@pytest.mark.parametrize("T", [9, 80])
@pytest.mark.parametrize("weighting", ["uniform", "gated"])
def test_copies_of_an_expert_merge_into_it_from_any_number_of_tokens(weighting: str, T: int):
    """With centres that differ; the most used may be copies of each other, which is why nothing is promised."""
    layer = observe(with_rows(random_experts(6), [0, 0, 0, 3, 3, 3]), T=T)
    # 1 and 4 are the most used, so that each group has one centre
    layer.statistics.sums["count"][[1, 4]] += 100
    plan = run(layer, 2, weighting=weighting)
    assert clusters(plan) == [[0, 1, 2], [3, 4, 5]]
    torch.testing.assert_close(layer_output(layer, plan), layer_output(layer), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plan.weights["down_EDI"], layer.experts.down_EDI[[0, 3]], rtol=1e-4, atol=1e-5)
    assert plan.predicted_error < 1e-9


@pytest.mark.parametrize("weighting", ["uniform", "gated"])
@pytest.mark.parametrize("bias", [False, True])
def test_predicted_error_is_that_of_the_layer_on_its_sample(weighting: str, bias: bool):
    layer = observe(random_experts(6, bias=bias))
    plan = run(layer, 3, weighting=weighting)
    expected = relative(layer_output(layer, plan), layer_output(layer).double())
    assert plan.predicted_error == pytest.approx(expected, rel=1e-4)


def test_fitting_what_the_layer_adds_lowers_its_error():
    layer = observe(random_experts(6), T=2000)
    uniform, gated = (run(layer, 2, weighting=weighting) for weighting in ("uniform", "gated"))
    average = plans.merge(uniform.assignment_E, layer.statistics.sums["count"])
    average_error = relative(layer_output(layer, average), layer_output(layer).double())
    assert gated.predicted_error < uniform.predicted_error < average_error


@pytest.mark.parametrize("weighting", ["uniform", "gated"])
def test_tokens_come_in_blocks(weighting: str, monkeypatch):
    layer = observe(random_experts(6, bias=True))
    whole = run(layer, 2, weighting=weighting)
    monkeypatch.setattr(merge_moe, "BLOCK_BYTES", 16 * 28 * 7)
    parts = run(layer, 2, weighting=weighting)
    for name in whole.weights:
        torch.testing.assert_close(parts.weights[name], whole.weights[name], rtol=1e-4, atol=1e-5)
    assert parts.predicted_error == pytest.approx(whole.predicted_error, rel=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("weighting", ["uniform", "gated"])
def test_without_a_sample_the_average_is_all_there_is(weighting: str, ridge: float):
    layer = observe(random_experts(6))
    statistics = layer.statistics
    nobody = replace(
        statistics.sample,
        **{
            name: getattr(statistics.sample, name)[:0]
            for name in statistics.sample.__dataclass_fields__
            if getattr(statistics.sample, name) is not None
        },
    )
    plan = mergemoe(replace(statistics, sample=nobody), layer.experts, 2, weighting=weighting, ridge=ridge)
    torch.testing.assert_close(
        plan.weights["down_EDI"].double(),
        torch.einsum("KE,EDI->KDI", plan.mixing_KE, layer.experts.down_EDI.double()),
        rtol=1e-6,
        atol=1e-6,
    )
    assert plan.predicted_error == 0.0


def test_a_scope_merges_within_layers_and_fits_on_their_own_tokens():
    pool = random_experts(8)
    layers = [observe(with_rows(pool, rows), seed=seed) for seed, rows in enumerate([[0, 1, 2, 3], [4, 5, 0, 7]])]
    joined, experts = subsets.join_layers([layer.statistics for layer in layers], [layer.experts for layer in layers])
    plan = mergemoe(joined, experts, 3, ridge=0.0)
    merged = [share_E for share_E in plan.mixing_KE if share_E.count_nonzero() > 1]
    assert merged
    for prototype, share_E in enumerate(plan.mixing_KE):
        owners = {int(expert) // 4 for expert in share_E.nonzero()}
        assert len(owners) == 1
        P, Q, down = stacked(experts, share_E, layers[owners.pop()].x_TD)
        expected = down @ (Q @ torch.linalg.pinv(P))
        torch.testing.assert_close(plan.weights["down_EDI"][prototype].double(), expected, rtol=1e-3, atol=1e-4)


def test_a_negative_ridge_is_refused():
    with pytest.raises(UsageError, match="negative"):
        run(observe(random_experts(4)), 2, ridge=-1.0)
