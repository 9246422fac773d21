"""M-SMoE and MC-SMoE against the steps of the paper (arXiv 2310.01334, section 3), written as loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conmoe.methods.mc_smoe import m_smoe
from conmoe.ops import similarity, subsets
from conmoe.ops.alignment import permute
from conmoe.ops.experts import tensors
from conmoe.types import Experts, LayerPlan
from tests.layers import Layer, layer_output, observe, random_experts, recipes, with_rows


def run(layer: Layer, keep: int, **options) -> LayerPlan:
    return m_smoe(layer.statistics, layer.experts, keep, **options)


def uses(layer: Layer) -> list[int]:
    return [int((layer.routing.index_Tk == expert).sum()) for expert in range(layer.routing.experts)]


def permuted_copies(E: int, *, bias: bool = False) -> Experts:
    """Experts that are one expert with its hidden units in different orders."""
    experts = with_rows(random_experts(E), [0] * E)
    if bias:
        biased = random_experts(1, bias=True)
        experts = replace(
            biased, **{name: tensor.expand(E, *tensor.shape[1:]) for name, tensor in tensors(biased).items()}
        )
    generator = torch.Generator().manual_seed(5)
    shuffled = [
        permute({name: tensor[e] for name, tensor in tensors(experts).items()}, torch.randperm(12, generator=generator))
        for e in range(E)
    ]
    return replace(experts, **{name: torch.stack([part[name] for part in shuffled]) for name in shuffled[0]})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grouping", ["router_logits", "weight", "mean_output", "functional"])
def test_grouping_and_shares_follow_the_paper(seed: int, grouping: str):
    layer = observe(random_experts(8, seed=seed), seed=seed)
    count = uses(layer)
    dominant = sorted(sorted(range(8), key=lambda e: (-count[e], e))[:3])
    z_ET = layer.routing.logits_TE.double().T
    if grouping == "router_logits":
        alike_EE = torch.tensor([[float(a @ b / a.norm() / b.norm() + 1) / 2 for b in z_ET] for a in z_ET])
    else:
        alike_EE = -getattr(similarity, f"{grouping}_distance")(layer.statistics.sample, layer.experts)
    group = [e if e in dominant else max(dominant, key=lambda d: float(alike_EE[e, d])) for e in range(8)]
    expected_EE = torch.zeros(8, 8, dtype=torch.float64)
    for e in range(8):
        members = [m for m in range(8) if group[m] == group[e]]
        for member in members:
            expected_EE[e, member] = count[member] / sum(count[m] for m in members)
    plan = run(layer, 3, grouping=grouping, align="none")
    torch.testing.assert_close(recipes(plan), expected_EE)
    assert not plan.weights
    assert plan.scores["frequency"].tolist() == pytest.approx([c / max(count) for c in count])


def test_a_worked_example():
    """Four experts with logit columns along two directions: uses 5, 4, 3, 1; the first two are dominant."""
    layer = observe(random_experts(4), T=2)
    gram_EE = torch.tensor([[4.0, 0, -1, 6], [0, 1, 2, 0], [-1, 2, 9, 0], [6, 0, 0, 16]])
    sums = {**layer.statistics.sums, "count": torch.tensor([5.0, 4, 3, 1]), "logit_gram": gram_EE}
    plan = m_smoe(replace(layer.statistics, sums=sums), layer.experts, 2)
    # cosines of expert 2: -1/6 with 0, 2/3 with 1; of expert 3: 6/8 with 0, none with 1
    assert plan.assignment_E.tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(plan.mixing_KE, torch.tensor([[5 / 6, 0, 0, 1 / 6], [0, 4 / 7, 3 / 7, 0]]).double())


@pytest.mark.parametrize("align", ["weight", "activation"])
@pytest.mark.parametrize("reference", ["dominant", "first"])
@pytest.mark.parametrize("bias", [False, True])
def test_copies_in_another_order_merge_without_loss_once_aligned(align: str, reference: str, bias: bool):
    layer = observe(permuted_copies(6, bias=bias))
    aligned = run(layer, 2, align=align, reference=reference)
    torch.testing.assert_close(layer_output(layer, aligned), layer_output(layer), rtol=1e-4, atol=1e-5)
    lossy = layer_output(layer, run(layer, 2, align="none")) - layer_output(layer)
    assert lossy.norm() > 0.1 * layer_output(layer).norm()


def test_the_reference_gives_the_order_of_hidden_units():
    layer = observe(permuted_copies(5), seed=1)
    busiest = max(range(5), key=lambda e: uses(layer)[e])
    assert busiest != 0
    for reference, expert in (("dominant", busiest), ("first", 0)):
        merged = run(layer, 1, reference=reference).weights
        torch.testing.assert_close(merged["gate_EID"][0], layer.experts.gate_EID[expert])
        torch.testing.assert_close(merged["down_EDI"][0], layer.experts.down_EDI[expert])


@pytest.mark.parametrize("reference", ["dominant", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_one_are_copied_bit_for_bit(dtype: torch.dtype, reference: str):
    layer = observe(random_experts(8))
    layer = replace(layer, experts=random_experts(8, dtype=dtype))
    plan = run(layer, 6, reference=reference)
    single = [row.argmax() for row in plan.mixing_KE if int((row != 0).sum()) == 1]
    assert plan.weights
    assert len(single) >= 4
    for expert in single:
        prototype = int(plan.assignment_E[expert])
        for name, tensor in tensors(layer.experts).items():
            assert torch.equal(plan.weights[name][prototype], tensor[expert])
            assert plan.weights[name].dtype == dtype


def test_merged_weights_are_the_weighted_mean_of_permuted_members():
    layer = observe(random_experts(6, width=5), seed=2)
    plan = run(layer, 2)
    for prototype, recipe_E in enumerate(plan.mixing_KE):
        members = recipe_E.nonzero().flatten().tolist()
        dominant = max(members, key=lambda e: recipe_E[e])
        for name in ("gate_EID", "up_EID"):  # whatever the order of units, their sum is that of the members
            mean_D = sum(recipe_E[e] * getattr(layer.experts, name)[e].double().sum(dim=0) for e in members)
            torch.testing.assert_close(plan.weights[name][prototype].double().sum(dim=0), mean_D, rtol=1e-5, atol=1e-6)

        def spread(gate_ID: Tensor, dominant: int = dominant) -> float:
            return float((gate_ID - layer.experts.gate_EID[dominant]).norm())

        plain_ID = sum(recipe_E[e] * layer.experts.gate_EID[e] for e in members)
        assert len(members) == 1 or spread(plan.weights["gate_EID"][prototype]) < spread(plain_ID)


def test_experts_already_in_order_are_a_mere_mixture():
    assert run(observe(with_rows(random_experts(6), [0, 0, 0, 3, 3, 3])), 1).weights
    assert not run(observe(with_rows(random_experts(6), [0] * 6)), 2).weights


def test_a_layer_nobody_used_keeps_the_first_experts_and_averages_evenly():
    layer = observe(random_experts(5), T=8)
    silent = {name: torch.zeros_like(tensor) for name, tensor in layer.statistics.sums.items()}
    plan = m_smoe(replace(layer.statistics, sums=silent), layer.experts, 2)
    assert plan.assignment_E.tolist() == [0, 1, 0, 0, 0]
    torch.testing.assert_close(plan.mixing_KE, torch.tensor([[1, 0, 1, 1, 1], [0, 4, 0, 0, 0]]).double() / 4)
    assert plan.scores["frequency"].tolist() == [0.0] * 5


def test_unused_members_weigh_nothing():
    layer = observe(random_experts(6), unused=(1, 4))
    plan = run(layer, 2)
    assert not plan.mixing_KE[:, [1, 4]].any()
    assert (plan.assignment_E >= 0).all()


def test_a_scope_chooses_by_uses_over_those_of_the_most_used_and_stays_within_layers():
    layers = [observe(random_experts(4, seed=seed), seed=seed, T=tokens) for seed, tokens in ((1, 60), (2, 20))]
    frequency = [count / max(uses(layer)) for layer in layers for count in uses(layer)]
    statistics = [replace(layer.statistics, tokens=80) for layer in layers]
    joined, pool = subsets.join_layers(statistics, [layer.experts for layer in layers])
    for keep in (2, 3, 5):
        for align in ("none", "weight", "activation"):
            plan = m_smoe(joined, pool, keep, align=align)
            dominant = sorted(sorted(range(8), key=lambda e: (-frequency[e], e))[:keep])
            assert sorted(int(row.argmax()) for row in plan.mixing_KE) == dominant
            recipe_EE = recipes(plan)
            assert not recipe_EE[:4, 4:].any()
            assert not recipe_EE[4:, :4].any()


def test_a_layer_of_a_scope_that_nobody_used_keeps_one_expert():
    layers = [observe(random_experts(4, seed=seed), seed=seed) for seed in (1, 2)]
    joined, pool = subsets.join_layers([layer.statistics for layer in layers], [layer.experts for layer in layers])
    count_E = joined.sums["count"].clone()
    count_E[4:] = 0
    plan = m_smoe(replace(joined, sums={**joined.sums, "count": count_E}), pool, 3)
    assert [int(row.argmax()) >= 4 for row in plan.mixing_KE] == [False, False, True]
    assert plan.assignment_E[4:].tolist() == [2] * 4
