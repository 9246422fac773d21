"""Experts, plans, subsets, scores and recipes; distances and coverage have files of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conmoe.ops import experts as expert_ops
from conmoe.ops import fusion, plans, scores, subsets
from conmoe.ops.outliers import super_experts
from conmoe.types import ConmoeError, Experts, LayerPlan, LayerStatistics, UsageError
from tests.layers import answer, observe, random_experts, recipes, sources


@pytest.mark.parametrize("bias", [False, True])
def test_expert_output_follows_the_formula(bias: bool):
    experts = random_experts(3, bias=bias)
    x_nD = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    naive_nD = torch.stack([answer(experts, 1, x_D) for x_D in x_nD])
    torch.testing.assert_close(expert_ops.expert_output(experts, 1, x_nD), naive_nD)


def test_expert_output_is_computed_in_the_dtype_of_the_experts():
    experts = random_experts(2, dtype=torch.bfloat16)
    assert expert_ops.expert_output(experts, 0, torch.randn(3, 16)).dtype == torch.bfloat16


def test_neighbouring_experts_are_selected_without_a_copy():
    experts = random_experts(6, bias=True)
    neighbours = expert_ops.select(experts, torch.tensor([2, 3, 4]))
    scattered = expert_ops.select(experts, torch.tensor([4, 2]))
    assert neighbours.up_EID.data_ptr() == experts.up_EID[2].data_ptr()
    assert torch.equal(scattered.down_EDI, experts.down_EDI[[4, 2]])
    assert scattered.gate_bias_EI is not None
    assert torch.equal(scattered.gate_bias_EI, experts.gate_bias_EI[[4, 2]])  # type: ignore[index]


def test_mixing_copies_single_experts_bit_for_bit_and_averages_in_single_precision():
    tensor_E = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    mixed_K = expert_ops.mix(tensor_E, torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 2.0, 0.0]]))
    assert torch.equal(mixed_K[0], tensor_E[1])
    assert torch.equal(mixed_K[1], ((tensor_E[0].float() + tensor_E[2].float()) / 2).bfloat16())
    assert torch.equal(mixed_K[2], (2 * tensor_E[1].float()).bfloat16())


def test_prototypes_come_in_the_order_of_their_experts():
    plan = plans.remap(torch.tensor([4, 1]), torch.tensor([1, 1, 0, 0, 0]))
    assert sources(plan) == [1, 1, 4, 4, 4]
    assert plan.mixing_KE.argmax(dim=1).tolist() == [1, 4]
    assert torch.equal(plan.gain_E, torch.ones(5, dtype=torch.float64))


def test_pruned_experts_are_nobody():
    assert sources(plans.prune(torch.tensor([3, 0]), 4)) == [0, -1, -1, 3]


def test_identity_changes_nothing():
    plan = plans.identity(3)
    assert plan.assignment_E.tolist() == [0, 1, 2]
    assert torch.equal(plan.mixing_KE, torch.eye(3, dtype=torch.float64))
    assert plan.predicted_error == 0


def test_merging_averages_by_weight():
    plan = plans.merge(torch.tensor([1, 0, 1, 0, 2]), torch.tensor([1, 0, 3, 0, 7]))
    assert plan.assignment_E.tolist() == [0, 1, 0, 1, 2]
    # the second cluster has no weight at all and is averaged evenly; a single member is exactly itself
    assert plan.mixing_KE.tolist() == [[0.25, 0, 0.75, 0, 0], [0, 0.5, 0, 0.5, 0], [0, 0, 0, 0, 1.0]]


def test_fusion_leaves_members_of_other_layers_out():
    recipe_KE = fusion.average_own(
        torch.tensor([0, 2]), torch.tensor([0, 0, 1, 0]), torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([0, 0, 1, 1])
    )
    assert recipe_KE.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 1, 0]]


def test_embedding_joins_plans_of_scattered_subsets():
    middle = plans.remap(torch.tensor([0, 2]), torch.tensor([0, 1, 1]))
    middle = replace(middle, predicted_error=0.5, scores={"c": torch.tensor([1.0, 2.0, 3.0])})
    joined = plans.embed(
        [middle, plans.identity(2), plans.prune(torch.tensor([1]), 2)],
        [torch.tensor([5, 1, 3]), torch.tensor([0, 6]), torch.tensor([2, 4])],
        7,
        energy_E=torch.tensor([1.0, 1, 0, 1, 0, 1, 0]),
    )
    assert sources(joined) == [0, 3, -1, 3, 4, 5, 6]
    assert joined.mixing_KE.argmax(dim=1).tolist() == [0, 3, 4, 5, 6]
    assert torch.isnan(torch.tensor(joined.predicted_error))
    assert joined.scores["c"].nan_to_num(-1).tolist() == [-1, 2, -1, 3, -1, 1, -1]


def test_embedding_averages_predicted_errors_by_energy():
    half = replace(plans.prune(torch.tensor([0]), 2), predicted_error=0.4)
    parts = [half, plans.identity(1)], [torch.tensor([0, 1]), torch.tensor([2])]
    assert plans.embed(*parts, 3, energy_E=torch.tensor([2.0, 1.0, 9.0])).predicted_error == pytest.approx(0.1)
    assert plans.embed(*parts, 3, energy_E=torch.zeros(3)).predicted_error == 0
    assert plans.embed(*parts, 3).predicted_error == pytest.approx(0.4 * 2 / 3)


def test_embedding_fills_new_weights_from_the_experts():
    experts = random_experts(4)
    new_KDI = torch.randn(2, 16, 12)
    refitted = replace(plans.prune(torch.tensor([0, 1]), 2), weights={"down_EDI": new_KDI})
    parts = [refitted, plans.identity(2)], [torch.tensor([3, 1]), torch.tensor([0, 2])]
    joined = plans.embed(*parts, 4, experts=experts)
    expected = torch.stack([experts.down_EDI[0], new_KDI[1], experts.down_EDI[2], new_KDI[0]])
    assert torch.equal(joined.weights["down_EDI"], expected)
    with pytest.raises(ConmoeError, match="experts are at hand"):
        plans.embed(*parts, 4)


def test_embedding_refuses_parts_that_overlap():
    with pytest.raises(ConmoeError, match="exactly once"):
        plans.embed([plans.identity(2), plans.identity(1)], [torch.tensor([0, 1]), torch.tensor([1])], 3)


def test_embedding_keeps_gains():
    part = replace(plans.identity(2), gain_E=torch.tensor([2.0, 3.0]))
    joined = plans.embed([part, plans.identity(1)], [torch.tensor([2, 0]), torch.tensor([1])], 3)
    assert joined.gain_E.tolist() == [3.0, 1.0, 2.0]


def test_restricting_takes_experts_out_of_sums_and_sample():
    statistics = observe(random_experts(5), k=2).statistics
    subset = torch.tensor([4, 1, 2])
    part = subsets.restrict(statistics, subset)
    assert torch.equal(part.sums["output"], statistics.sums["output"][subset])
    assert torch.equal(part.sums["pair"], statistics.sums["pair"][subset][:, subset])
    assert torch.equal(part.sample.logits_nE, statistics.sample.logits_nE[:, subset])
    renumbered = {4: 0, 1: 1, 2: 2, 0: -1, 3: -1}
    expected = [[renumbered[e] for e in slots] for slots in statistics.sample.index_nk.tolist()]
    assert part.sample.index_nk.tolist() == expected
    again = subsets.restrict(part, torch.tensor([2]))
    assert set(again.sample.index_nk.unique().tolist()) == {-1, 0}


def two_layers() -> tuple[list[LayerStatistics], list[Experts]]:
    layers = [observe(random_experts(4, seed=seed), seed=seed, T=40) for seed in (1, 2)]
    return [layer.statistics for layer in layers], [layer.experts for layer in layers]


def test_layers_of_a_scope_become_one_layer():
    parts, experts = two_layers()
    joined, pool = subsets.join_layers(parts, experts)
    assert joined.owner_E.tolist() == [0] * 4 + [1] * 4
    assert joined.tokens == 40
    assert torch.equal(pool.down_EDI[6], experts[1].down_EDI[2])
    assert not joined.sums["pair"][:4, 4:].any()
    assert torch.isnan(joined.sample.logits_nE[:40, 4:]).all()
    for first, part in zip((0, 4), parts, strict=True):
        back = subsets.restrict(joined, torch.arange(first, first + 4))
        rows = slice(10 * first, 10 * first + 40)
        assert all(torch.equal(back.sums[name], part.sums[name]) for name in part.sums)
        assert torch.equal(back.sample.index_nk[rows], part.sample.index_nk)
        assert torch.equal(back.sample.logits_nE[rows], part.sample.logits_nE)


def test_joining_respects_slots_outside_and_refuses_unequal_layers():
    parts, experts = two_layers()
    cut = [subsets.restrict(part, torch.tensor([0, 1])) for part in parts]
    joined, _ = subsets.join_layers(cut, [expert_ops.select(layer, torch.tensor([0, 1])) for layer in experts])
    assert set(joined.sample.index_nk[40:].unique().tolist()) == {-1, 2, 3}
    with pytest.raises(ConmoeError, match="different numbers of tokens"):
        subsets.join_layers([parts[0], replace(parts[1], tokens=7)], experts)


def test_a_scope_of_one_layer_is_that_layer():
    parts, experts = two_layers()
    assert subsets.join_layers(parts[:1], experts[:1]) == (parts[0], experts[0])


def test_score_family_follows_its_definition():
    layer = observe(random_experts(5), unused=(2,))
    outputs = [[] for _ in range(5)]
    for x_D, chosen, gates in zip(layer.x_TD, layer.routing.index_Tk, layer.routing.weight_Tk, strict=True):
        for expert, gate in zip(chosen.tolist(), gates.tolist(), strict=True):
            outputs[expert].append((gate, float(answer(layer.experts, expert, x_D).norm())))
    for alpha, beta in scores.SUMS:
        total = [sum(gate**alpha * norm**beta for gate, norm in slots) for slots in outputs]
        mean = [value / max(len(slots), 1) for value, slots in zip(total, outputs, strict=True)]
        assert scores.score(layer.statistics.sums, False, alpha, beta).tolist() == pytest.approx(total, rel=1e-5)
        assert scores.score(layer.statistics.sums, True, alpha, beta).tolist() == pytest.approx(mean, rel=1e-5)
    with pytest.raises(UsageError, match="known exponents"):
        scores.score(layer.statistics.sums, True, 3, 1)


def test_highest_scores_win_and_ties_go_to_the_lower_index():
    assert scores.top(torch.tensor([1.0, 2, 2, 2, 0]), 2).tolist() == [1, 2]
    assert scores.top(torch.zeros(100), 60).tolist() == list(range(60))


def test_every_layer_of_a_scope_gets_its_own():
    score_E, owner_E = torch.tensor([9.0, 8, 7, 1, 2, 3]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert scores.top(score_E, 3, owner_E).tolist() == [0, 1, 2]
    assert scores.top(score_E, 3, owner_E, min_own=1).tolist() == [0, 1, 5]
    with pytest.raises(UsageError, match="lower min_own"):
        scores.top(score_E, 3, owner_E, min_own=2)


def test_normalisation_is_defined_for_equal_and_for_zero_values():
    assert scores.minmax(torch.tensor([2.0, 2.0])).tolist() == [0, 0]
    assert scores.minmax(torch.tensor([1.0, 3.0, 2.0])).tolist() == pytest.approx([0, 1, 0.5])
    shares = scores.share_within(torch.tensor([1.0, 3.0, 0.0, 0.0]), torch.tensor([0, 0, 2, 2]))
    assert shares.tolist() == [0.25, 0.75, 0.5, 0.5]


def test_super_experts_are_found():
    peak_LE = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) + 1
    peak_LE[1, 5], peak_LE[2, 7], peak_LE[7, 3] = 500.0, 90.0, 600.0
    # the last one is as large, but lies in the last quarter of the layers
    assert super_experts(peak_LE).nonzero().tolist() == [[1, 5], [2, 7]]


def test_ordinary_experts_of_small_models_are_not_super():
    peak_LE = torch.rand(4, 32, generator=torch.Generator().manual_seed(0)) * 3 + 0.5
    assert not super_experts(peak_LE).any()
    assert not super_experts(torch.zeros(2, 8)).any()


def test_super_experts_ignore_padding_and_unused_experts():
    peak_LE = torch.ones(4, 16)
    peak_LE[:, 8:] = torch.nan
    peak_LE[0, :6] = 0.0
    peak_LE[0, 6] = 300.0
    assert super_experts(peak_LE).nonzero().tolist() == [[0, 6]]


def test_equal_plans_are_equal_whatever_the_order_of_their_parts():
    a, b = plans.identity(2), plans.remap(torch.tensor([1]), torch.tensor([0, 0]))
    subset_a, subset_b = torch.tensor([0, 2]), torch.tensor([1, 3])
    one, other = plans.embed([a, b], [subset_a, subset_b], 4), plans.embed([b, a], [subset_b, subset_a], 4)
    assert torch.equal(one.assignment_E, other.assignment_E)
    assert torch.equal(one.mixing_KE, other.mixing_KE)
    assert torch.equal(recipes(one).argmax(dim=1), torch.tensor([0, 3, 2, 3]))


def test_a_bad_plan_is_refused():
    with pytest.raises(ConmoeError):
        plans.prune(torch.tensor([], dtype=torch.int64), 3)
    with pytest.raises(ConmoeError):
        LayerPlan(torch.tensor([0, 5]), torch.eye(2), torch.ones(2))
