"""HC-SMoE, Sub-MoE and REAM against what their papers state, written as loops over tokens and experts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from conmoe.methods.hc_smoe import hc_smoe
from conmoe.methods.sub_moe import sub_moe
from conmoe.ops import similarity, subsets
from conmoe.ops.alignment import permute
from conmoe.ops.clustering import agglomerate
from conmoe.ops.experts import tensors
from conmoe.ops.zipit import merge_units
from conmoe.types import Experts, LayerPlan, LayerStatistics, UsageError
from tests.layers import Layer, answer, layer_output, observe, prototypes, random_experts, recipes, with_rows


def run(method, layer: Layer, keep: int, **options) -> LayerPlan:
    return method(layer.statistics, layer.experts, keep, **options)


def uses(layer: Layer) -> list[int]:
    return [int((layer.routing.index_Tk == expert).sum()) for expert in range(layer.routing.experts)]


def outputs(layer: Layer) -> Tensor:
    """``[E, T, D]``: every expert on every token."""
    E = layer.routing.experts
    return torch.stack([torch.stack([answer(layer.experts, e, x_D) for x_D in layer.x_TD]) for e in range(E)]).double()


def clusters(plan: LayerPlan) -> set[frozenset[int]]:
    groups: dict[int, list[int]] = {}
    for expert, prototype in enumerate(plan.assignment_E.tolist()):
        groups.setdefault(prototype, []).append(expert)
    return set(map(frozenset, groups.values()))


def shuffled(experts: Experts) -> Experts:
    """The same functions, their hidden units in random orders."""
    generator = torch.Generator().manual_seed(7)
    parts = [
        permute({name: tensor[e] for name, tensor in tensors(experts).items()}, torch.randperm(12, generator=generator))
        for e in range(experts.gate_EID.shape[0])
    ]
    return replace(experts, **{name: torch.stack([part[name] for part in parts]) for name in parts[0]})


def two_layers(rows: list[list[int]], pool: Experts, T: int = 80) -> tuple[Layer, Layer, LayerStatistics, Experts]:
    layers = [observe(with_rows(pool, row), seed=seed, T=T) for seed, row in enumerate(rows)]
    joined, experts = subsets.join_layers([layer.statistics for layer in layers], [layer.experts for layer in layers])
    return layers[0], layers[1], joined, experts


def average_linkage(feature_EF: Tensor, keep: int) -> set[frozenset[int]]:
    groups = [[e] for e in range(feature_EF.shape[0])]

    def apart(pair: tuple[list[int], list[int]]) -> float:
        distances = [float((feature_EF[a] - feature_EF[b]).norm()) for a in pair[0] for b in pair[1]]
        return sum(distances) / len(distances)

    while len(groups) > keep:
        one, other = min(combinations(groups, 2), key=apart)
        groups = [group for group in groups if group not in (one, other)] + [one + other]
    return set(map(frozenset, groups))


@pytest.mark.parametrize("feature", ["mean_output", "weight", "router_logits"])
@pytest.mark.parametrize("seed", range(3))
def test_hc_smoe_clusters_by_the_feature_and_averages_by_use(feature: str, seed: int):
    layer = observe(random_experts(8, seed=seed, bias=seed == 2), seed=seed)
    feature_EF = {
        "mean_output": outputs(layer).mean(dim=1),
        "weight": torch.cat([tensor.double().flatten(1) for tensor in tensors(layer.experts).values()], dim=1),
        "router_logits": layer.routing.logits_TE.double().T,
    }[feature]
    plan, even = run(hc_smoe, layer, 3, feature=feature), run(hc_smoe, layer, 3, feature=feature, merge="average")
    assert clusters(plan) == clusters(even) == average_linkage(feature_EF, 3)
    count = uses(layer)
    for group in clusters(plan):
        for e in group:
            for m in range(8):
                share = count[m] / sum(count[o] for o in group) if m in group else 0.0
                assert float(recipes(plan)[e, m]) == pytest.approx(share)
                assert float(recipes(even)[e, m]) == pytest.approx(1 / len(group) if m in group else 0.0)
    assert not plan.weights


@pytest.mark.parametrize("merge", ["fix-dom", "zipit"])
def test_hc_smoe_matches_units_on_the_tokens_of_the_cluster_to_the_member_in_its_middle(merge: str):
    layer = observe(random_experts(9))
    plan, plain = run(hc_smoe, layer, 5, merge=merge), run(hc_smoe, layer, 5)
    assert torch.equal(plan.mixing_KE, plain.mixing_KE)
    mean_ED = outputs(layer).mean(dim=1)
    for prototype in range(5):
        members = (plan.assignment_E == prototype).nonzero().flatten().tolist()
        centre_D = mean_ED[members].mean(dim=0)
        middle = min(members, key=lambda e: float((mean_ED[e] - centre_D).norm()))
        routed = [any(e in members for e in chosen) for chosen in layer.routing.index_Tk.tolist()]
        assert not all(routed)
        made = merge_units(
            layer.experts, plan.mixing_KE[prototype], middle, layer.x_TD[torch.tensor(routed)], merge == "fix-dom"
        )
        for name, tensor in made.items():
            torch.testing.assert_close(plan.weights[name][prototype], tensor)


@pytest.mark.parametrize("merge", ["frequency", "average", "fix-dom", "zipit"])
def test_hc_smoe_merges_duplicates_without_loss_and_shuffled_ones_if_it_matches_units(merge: str):
    experts = with_rows(random_experts(8), [0, 1, 2, 0, 1, 2, 1, 7])
    for layer, expected in ((observe(experts), True), (observe(shuffled(experts)), merge in ("fix-dom", "zipit"))):
        plan = run(hc_smoe, layer, 4, merge=merge)
        assert clusters(plan) == {frozenset(group) for group in ({0, 3}, {1, 4, 6}, {2, 5}, {7})}
        assert torch.allclose(layer_output(layer, plan), layer_output(layer), rtol=1e-4, atol=1e-5) == expected


def test_hc_smoe_has_other_linkages():
    found: dict[str, list[set[frozenset[int]]]] = {}
    for seed in range(4):
        layer = observe(random_experts(12, seed=seed), seed=seed)
        mean_ED = outputs(layer).mean(dim=1)
        for linkage in ("average", "single", "complete", "ward"):
            groups = clusters(run(hc_smoe, layer, 4, linkage=linkage))
            label_E = agglomerate(torch.cdist(mean_ED, mean_ED), 4, linkage)
            assert groups == {frozenset((label_E == label).nonzero().flatten().tolist()) for label in range(4)}
            found.setdefault(linkage, []).append(groups)
    assert all(found[linkage] != found["average"] for linkage in ("single", "complete", "ward"))


def test_hc_smoe_gives_the_layers_of_a_scope_what_they_need_and_mixes_none():
    pool = random_experts(12)
    _, _, joined, experts = two_layers([[0, 1, 0, 1, 0, 1], [6, 7, 8, 9, 10, 11]], pool)
    for linkage in ("average", "single", "complete", "ward"):
        plan = hc_smoe(joined, experts, 7, linkage=linkage)
        assert all(len({e // 6 for e in group}) == 1 for group in clusters(plan))
        assert {frozenset({0, 2, 4}), frozenset({1, 3, 5})} < clusters(plan)


def test_hc_smoe_compares_the_layers_of_a_scope_by_their_own_measure():
    quiet = observe(random_experts(5, seed=0), seed=0)
    loud_experts = with_rows(random_experts(5, seed=0), list(range(5)))
    loud_experts.down_EDI.mul_(1000.0)
    loud = observe(loud_experts, seed=0)
    joined, experts = subsets.join_layers([quiet.statistics, loud.statistics], [quiet.experts, loud.experts])
    groups = clusters(hc_smoe(joined, experts, 6))
    # the same experts but for their size: the same clusters
    assert {frozenset(e + 5 for e in group) for group in groups if max(group) < 5} == {
        group for group in groups if min(group) >= 5
    }


def test_hc_smoe_averages_unused_clusters_evenly():
    layer = observe(with_rows(random_experts(6), [0, 0, 2, 3, 4, 5]), unused=(0, 1))
    plan = run(hc_smoe, layer, 5)
    assert recipes(plan)[0].tolist() == recipes(plan)[1].tolist() == [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def spherical_scatter(layer: Layer, groups: set[frozenset[int]]) -> float:
    """Squared distances of all outputs, as unit vectors, to their cluster's mean direction for each token."""
    y_ETD = outputs(layer)
    unit_ETD = y_ETD / y_ETD.norm(dim=-1, keepdim=True)
    return sum(float((unit_ETD[list(g)] - unit_ETD[list(g)].mean(dim=0)).square().sum()) for g in groups)


@pytest.mark.parametrize("seed", range(3))
def test_sub_moe_clusters_output_directions_as_well_as_any_partition(seed: int):
    layer = observe(random_experts(6, seed=seed), seed=seed, T=20)
    plan = run(sub_moe, layer, 3)
    partitions = {
        frozenset(frozenset(e for e in range(6) if labels[e] == label) for label in range(3))
        for labels in product(range(3), repeat=6)
        if len(set(labels)) == 3
    }
    best = min(spherical_scatter(layer, set(groups)) for groups in partitions)
    assert spherical_scatter(layer, clusters(plan)) <= 1.02 * best
    count = uses(layer)
    for group in clusters(plan):
        for e in group:
            expected = [count[m] / sum(count[o] for o in group) if m in group else 0.0 for m in range(6)]
            assert recipes(plan)[e].tolist() == pytest.approx(expected)


def union_merge(matrices: list[Tensor], shares: list[float], rank: int) -> Tensor:
    """The paper's steps: one decomposition of all matrices side by side, and a mean of their own parts of V."""
    U, S, Vh = torch.linalg.svd(torch.cat([matrix.double() for matrix in matrices], dim=1), full_matrices=False)
    parts = Vh[:rank].split(matrices[0].shape[1], dim=1)
    merged_V = sum(share * part for share, part in zip(shares, parts, strict=True))
    return U[:, :rank] @ torch.diag(S[:rank]) @ merged_V


@pytest.mark.parametrize(("rank", "kept"), [(1.0, {"gate_EID": 12, "up_EID": 12, "down_EDI": 16}), (0.5, None)])
def test_sub_moe_merges_as_the_decomposition_of_the_union_says(rank: float, kept: dict[str, int] | None):
    kept = kept or {"gate_EID": 6, "up_EID": 6, "down_EDI": 8}
    layer = observe(random_experts(7, bias=True))
    plan = run(sub_moe, layer, 5, rank=rank)
    assert bool(plan.weights) == (rank < 1)
    made = prototypes(layer.experts, plan)
    for prototype, recipe_E in enumerate(plan.mixing_KE):
        members = recipe_E.nonzero().flatten().tolist()
        for name, tensor in tensors(layer.experts).items():
            found = getattr(made, name)[prototype]
            if len(members) == 1:
                assert torch.equal(found, tensor[members[0]].double())
            elif "bias" in name:
                torch.testing.assert_close(found, (recipe_E @ tensor.double()).to(found), rtol=1e-5, atol=1e-6)
            else:
                merged = union_merge([tensor[m] for m in members], recipe_E[members].tolist(), kept[name])
                torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-5)
    assert {len(group) for group in clusters(plan)} > {1}


def test_sub_moe_asks_for_a_rank_that_there_is():
    for rank in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(UsageError, match="rank"):
            run(sub_moe, observe(random_experts(4)), 2, rank=rank)


@pytest.mark.parametrize("method", [hc_smoe, sub_moe])
@pytest.mark.parametrize("seed", range(4))
def test_layers_of_a_scope_are_clustered_on_their_own_tokens(method, seed: int):
    pool = random_experts(12, seed=seed)
    # so few tokens that other tokens would give other clusters
    first, second, joined, experts = two_layers([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], pool, T=3)
    plan = method(joined, experts, 6)
    own = [{frozenset(e - 6 * w for e in g) for g in clusters(plan) if min(g) // 6 == w} for w in (0, 1)]
    for layer, groups in zip((first, second), own, strict=True):
        assert groups == clusters(run(method, layer, len(groups)))
    assert sum(map(len, own)) == 6


@pytest.mark.parametrize("bias", [False, True])
def test_similarities_of_outputs_equal_their_definitions(monkeypatch: pytest.MonkeyPatch, bias: bool):
    layer = observe(random_experts(5, bias=bias), T=30)
    y_ETD = outputs(layer)
    unit_ETD = y_ETD / y_ETD.norm(dim=-1, keepdim=True)
    expected_EE = torch.tensor([[float((a * b).sum(dim=-1).mean()) for b in unit_ETD] for a in unit_ETD])
    share_TE = torch.rand(30, 5, generator=torch.Generator().manual_seed(0))
    for block in (similarity.BLOCK_BYTES, 4 * 1024):
        monkeypatch.setattr(similarity, "BLOCK_BYTES", block)
        found_EE = similarity.output_cosine(layer.statistics.sample, layer.experts)
        torch.testing.assert_close(found_EE.float(), expected_EE, atol=1e-5, rtol=1e-5)
        mean_ED = similarity.mean_outputs(layer.statistics.sample, layer.experts, share_TE)
        shared = (share_TE.T.unsqueeze(-1) * y_ETD).mean(dim=1)
        torch.testing.assert_close(mean_ED.float(), shared.float(), atol=1e-6, rtol=1e-5)


def test_silent_experts_are_like_no_other():
    experts = random_experts(4)
    experts.down_EDI[2] = 0.0
    cosine_EE = similarity.output_cosine(observe(experts).statistics.sample, experts)
    assert cosine_EE[2].tolist() == [0.0, 0.0, 1.0, 0.0]
