"""The distances of ``ops.similarity`` against naive double loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conmoe.ops import similarity, subsets
from conmoe.ops.experts import select
from conmoe.types import Experts, TokenSample
from tests.layers import answer, observe, random_experts, with_rows

DISTANCES = (similarity.weight_distance, similarity.mean_output_distance, similarity.functional_distance)


def naive_weight_distance(experts: Experts) -> Tensor:
    E = experts.gate_EID.shape[0]
    groups = [("gate_EID", "gate_bias_EI"), ("up_EID", "up_bias_EI"), ("down_EDI", "down_bias_ED")]
    flat = []
    for weight, bias in groups:
        parts = [getattr(experts, name) for name in (weight, bias) if getattr(experts, name) is not None]
        flat.append([torch.cat([part[e].double().flatten() for part in parts]) for e in range(E)])
    cost_EE = torch.zeros(E, E, dtype=torch.float64)
    for i in range(E):
        for j in range(E):
            terms = [2 * (w[i] - w[j]).norm() / (w[i].norm() + w[j].norm() + 2e-12) for w in flat]
            cost_EE[i, j] = sum(terms) / 3
    return cost_EE


def naive_functional_distance(sample: TokenSample, experts: Experts) -> Tensor:
    E = experts.gate_EID.shape[0]
    error_EE, energy_E = torch.zeros(E, E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for x_D, chosen, gates in zip(sample.hidden_nD, sample.index_nk.tolist(), sample.weight_nk.tolist(), strict=True):
        for i, gate in zip(chosen, gates, strict=True):
            if i >= 0:
                y_D = answer(experts, i, x_D).double()
                energy_E[i] += gate**2 * y_D.square().sum()
                for j in range(E):
                    error_EE[i, j] += gate**2 * (y_D - answer(experts, j, x_D).double()).square().sum()
    return error_EE / energy_E.unsqueeze(1)


@pytest.mark.parametrize("bias", [False, True])
def test_weight_distance_equals_the_double_loop(bias: bool):
    experts = random_experts(5, bias=bias)
    sample = observe(experts).statistics.sample
    torch.testing.assert_close(
        similarity.weight_distance(sample, experts), naive_weight_distance(experts), rtol=1e-5, atol=0
    )


def test_mean_output_distance_equals_the_double_loop():
    experts = random_experts(4, bias=True)
    sample = observe(experts, T=30).statistics.sample
    mean_ED = torch.stack(
        [torch.stack([answer(experts, e, x) for x in sample.hidden_nD]).mean(dim=0) for e in range(4)]
    )
    naive_EE = torch.stack([torch.stack([(a - b).norm() for b in mean_ED]) for a in mean_ED]).double()
    torch.testing.assert_close(similarity.mean_output_distance(sample, experts), naive_EE, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_functional_distance_equals_the_double_loop(bias: bool):
    experts = random_experts(5, bias=bias)
    sample = observe(experts, k=3, T=40).statistics.sample
    naive_EE = naive_functional_distance(sample, experts)
    torch.testing.assert_close(similarity.functional_distance(sample, experts), naive_EE, rtol=1e-5, atol=1e-6)


def test_functional_distance_of_a_scope_feeds_strangers_the_inputs_of_the_expert_they_replace():
    layers = [observe(random_experts(3, seed=seed), seed=seed, T=25) for seed in (1, 2)]
    joined, pool = subsets.join_layers([layer.statistics for layer in layers], [layer.experts for layer in layers])
    naive_EE = naive_functional_distance(joined.sample, pool)
    torch.testing.assert_close(similarity.functional_distance(joined.sample, pool), naive_EE, rtol=1e-5, atol=1e-6)


def test_functional_distance_ignores_slots_outside_the_subset():
    layer = observe(random_experts(5), k=3, T=40)
    part = subsets.restrict(layer.statistics, torch.tensor([0, 1, 2, 3]))
    experts = select(layer.experts, torch.arange(4))
    whole_EE = naive_functional_distance(layer.statistics.sample, layer.experts)
    cost_EE = similarity.functional_distance(part.sample, experts)
    torch.testing.assert_close(cost_EE, whole_EE[:4, :4], rtol=1e-5, atol=1e-6)


def test_an_unseen_expert_is_judged_on_the_tokens_that_came_nearest_to_choosing_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(similarity, "STAND_INS", 7)
    layer = observe(random_experts(5), T=40, unused=(3,))
    sample = layer.statistics.sample
    nearest = sample.logits_nE[:, 3].topk(7).indices
    as_if = replace(
        sample,
        hidden_nD=torch.cat([sample.hidden_nD, sample.hidden_nD[nearest]]),
        index_nk=torch.cat([sample.index_nk, torch.tensor([[3, -1]] * 7)]),
        weight_nk=torch.cat([sample.weight_nk, torch.ones(7, 2)]),
        logits_nE=torch.cat([sample.logits_nE, sample.logits_nE[nearest]]),
        priority_n=torch.cat([sample.priority_n, sample.priority_n[nearest]]),
    )
    naive_EE = naive_functional_distance(as_if, layer.experts)
    torch.testing.assert_close(similarity.functional_distance(sample, layer.experts), naive_EE, rtol=1e-5, atol=1e-6)


def test_slots_outside_the_subset_do_not_count_as_tokens_of_the_first_expert():
    layer = observe(random_experts(5), T=40, unused=(0,))
    part = subsets.restrict(layer.statistics, torch.tensor([0, 2, 3]))
    experts = select(layer.experts, torch.tensor([0, 2, 3]))
    whole_EE = similarity.functional_distance(layer.statistics.sample, layer.experts)
    cost_EE = similarity.functional_distance(part.sample, experts)
    torch.testing.assert_close(cost_EE, whole_EE[[0, 2, 3]][:, [0, 2, 3]], rtol=1e-5, atol=1e-6)


def test_stand_ins_of_a_scope_come_from_the_layer_of_the_unseen_expert():
    layers = [observe(random_experts(3, seed=seed), seed=seed, T=5, unused=(0,)) for seed in (1, 2)]
    joined, _ = subsets.join_layers([layer.statistics for layer in layers], [layer.experts for layer in layers])
    ((x_nD, index_n1),) = similarity._stand_ins(joined.sample, torch.tensor([3]))
    assert index_n1.unique().tolist() == [3]
    assert sorted(x_nD[:, 0].tolist()) == sorted(layers[1].x_TD[:, 0].tolist())


def test_without_any_token_every_stranger_is_as_wrong_as_silence():
    experts = random_experts(3)
    sample = observe(experts, T=4).statistics.sample
    empty = TokenSample(
        *(getattr(sample, name)[:0] for name in ("hidden_nD", "index_nk", "weight_nk", "logits_nE", "priority_n"))
    )
    assert torch.equal(similarity.functional_distance(empty, experts), 1 - torch.eye(3, dtype=torch.float64))
    assert not similarity.mean_output_distance(empty, experts).any()


def test_silent_experts_are_defined():
    experts = random_experts(4)
    experts.down_EDI[[1, 2]] = 0.0
    cost_EE = similarity.functional_distance(observe(experts).statistics.sample, experts)
    assert cost_EE[1].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert cost_EE[0, 1] == pytest.approx(1.0)
    assert torch.isfinite(similarity.weight_distance(observe(experts).statistics.sample, experts)).all()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_duplicates_are_at_distance_zero(distance, dtype: torch.dtype):
    experts = with_rows(random_experts(7, dtype=dtype), [0, 1, 2, 0, 4, 1, 6])
    layer = observe(with_rows(random_experts(7), [0, 1, 2, 0, 4, 1, 6]))
    cost_EE = distance(layer.statistics.sample, experts)
    assert max(cost_EE[0, 3], cost_EE[3, 0], cost_EE[1, 5], cost_EE[5, 1]) < 1e-6
    assert cost_EE[0, 1] > 0.01
    assert not cost_EE.diagonal().any()


@pytest.mark.parametrize("distance", DISTANCES)
def test_distance_does_not_depend_on_the_size_of_blocks(distance, monkeypatch: pytest.MonkeyPatch):
    layer = observe(random_experts(6, bias=True), unused=(5,))
    whole_EE = distance(layer.statistics.sample, layer.experts)
    monkeypatch.setattr(similarity, "BLOCK_BYTES", 4 * 6 * 16 * 7)
    monkeypatch.setattr(similarity, "LEAST_ROWS", 1)
    torch.testing.assert_close(distance(layer.statistics.sample, layer.experts), whole_EE, rtol=1e-5, atol=1e-6)


def test_nearly_equal_weights_are_told_apart():
    experts = random_experts(2)
    nearly = with_rows(experts, [0, 0])
    nearly.gate_EID[1, 0, 0] += 1e-4
    cost_EE = similarity.weight_distance(observe(experts, T=4).statistics.sample, nearly)
    assert cost_EE[0, 1].item() == pytest.approx(naive_weight_distance(nearly)[0, 1].item(), rel=1e-5)


def test_permuted_hidden_units_change_weights_but_not_the_function():
    experts = with_rows(random_experts(3), [0, 0, 2])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for tensor in (experts.gate_EID, experts.up_EID):
        tensor[1] = tensor[0][order]
    experts.down_EDI[1] = experts.down_EDI[0][:, order]
    sample = observe(experts).statistics.sample
    assert similarity.functional_distance(sample, experts)[0, 1] < 1e-6
    assert similarity.weight_distance(sample, experts)[0, 1] > 1
