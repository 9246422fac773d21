"""HC-SMoE, Sub-MoE and REAM against what their papers state, written as loops over tokens and experts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from typing import Any, Literal

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from conmoe.methods.hc_smoe import hc_smoe
from conmoe.methods.ream import ream
from conmoe.methods.sub_moe import sub_moe
from conmoe.ops import similarity, subsets
from conmoe.ops.alignment import permute
from conmoe.ops.clustering import agglomerate
from conmoe.ops.experts import tensors
from conmoe.ops.principal import principal_units
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


@pytest.mark.parametrize("seed", range(3))
def test_hc_smoe_has_kmeans(seed: int):
    layer = observe(random_experts(8, seed=seed), seed=seed)
    mean_ED = outputs(layer).mean(dim=1)

    def scatter(groups: set[frozenset[int]]) -> float:
        members = [mean_ED[list(group)] for group in groups]
        return sum(float((part - part.mean(dim=0)).square().sum()) for part in members)

    found = clusters(run(hc_smoe, layer, 3, clustering="kmeans"))
    assert len(found) == 3
    labels = [label for label in product((0,), *[range(3)] * 7) if len(set(label)) == 3]
    every = [{frozenset(e for e in range(8) if label[e] == group) for group in range(3)} for label in labels]
    assert scatter(found) <= 1.05 * min(map(scatter, every))


def test_hc_smoe_gives_the_layers_of_a_scope_what_they_need_and_mixes_none():
    pool = random_experts(12)
    _, _, joined, experts = two_layers([[0, 1, 0, 1, 0, 1], [6, 7, 8, 9, 10, 11]], pool)
    how: list[dict[str, Any]] = [{"linkage": linkage} for linkage in ("average", "single", "complete", "ward")]
    for options in [*how, {"clustering": "kmeans"}]:
        plan = hc_smoe(joined, experts, 7, **options)
        assert all(len({e // 6 for e in group}) == 1 for group in clusters(plan))
        assert {frozenset({0, 2, 4}), frozenset({1, 3, 5})} < clusters(plan)


@pytest.mark.parametrize("clustering", ["hierarchical", "kmeans"])
def test_hc_smoe_compares_the_layers_of_a_scope_by_their_own_measure(clustering: Literal["hierarchical", "kmeans"]):
    quiet = observe(random_experts(5, seed=0), seed=0)
    loud_experts = with_rows(random_experts(5, seed=0), list(range(5)))
    loud_experts.down_EDI.mul_(1000.0)
    loud = observe(loud_experts, seed=0)
    joined, experts = subsets.join_layers([quiet.statistics, loud.statistics], [quiet.experts, loud.experts])
    groups = clusters(hc_smoe(joined, experts, 6, clustering=clustering))
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


def reap_score(layer: Layer) -> list[float]:
    slots: list[list[float]] = [[] for _ in range(layer.routing.experts)]
    for x_D, chosen, gates in zip(layer.x_TD, layer.routing.index_Tk, layer.routing.weight_Tk, strict=True):
        for e, gate in zip(chosen.tolist(), gates.tolist(), strict=True):
            slots[e].append(gate * float(answer(layer.experts, e, x_D).norm()))
    return [sum(values) / max(len(values), 1) for values in slots]


def ream_distance(layer: Layer) -> Tensor:
    E = layer.routing.experts
    p_TE = layer.routing.logits_TE.double().softmax(dim=-1)
    gated = [(p_TE[:, e : e + 1] * y_TD).mean(dim=0) for e, y_TD in enumerate(outputs(layer))]
    column = [z_T / z_T.norm() for z_T in layer.routing.logits_TE.double().T]
    apart = [[float((column[i] - column[j]).norm()) for j in range(E)] for i in range(E)]
    farthest = max(map(max, apart))
    return torch.tensor(
        [
            [
                1
                - 0.5 * (1 + float(gated[i] @ gated[j] / gated[i].norm() / gated[j].norm())) / 2
                # half the weight of the outputs, half that of the router
                - 0.5 * (1 - apart[i][j] / farthest)
                for j in range(E)
            ]
            for i in range(E)
        ]
    )


def ream_groups(layer: Layer, keep: int, group_size: int) -> dict[int, list[int]]:
    """Centroid -> its group, from the most salient on; who is left joins the nearest."""
    E, score, distance = layer.routing.experts, reap_score(layer), ream_distance(layer)
    centroids = sorted(range(E), key=lambda e: (-score[e], e))[:keep]
    groups = {centroid: [centroid] for centroid in centroids}
    free = [e for e in range(E) if e not in centroids]
    for centroid in centroids if group_size else []:
        for e in sorted(free, key=lambda e: (float(distance[centroid, e]), e))[: group_size - 1]:
            groups[centroid].append(e)
            free.remove(e)
    for e in free:
        groups[min(sorted(centroids), key=lambda c: float(distance[e, c]))].append(e)
    return groups


@pytest.mark.parametrize("group_size", [0, 1, 2, 3, 16])
@pytest.mark.parametrize("seed", range(3))
def test_ream_groups_experts_around_salient_ones_and_drops_the_others_from_the_router(group_size: int, seed: int):
    layer = observe(random_experts(10, seed=seed), seed=seed, T=200)
    plan, score = run(ream, layer, 4, group_size=group_size, align=False), reap_score(layer)
    groups = ream_groups(layer, 4, group_size)
    assert plan.scores["score"].tolist() == pytest.approx(score, rel=1e-5)
    for e in range(10):
        if e in groups:
            members = groups[e]
            expected = [score[m] / sum(score[o] for o in members) if m in members else 0.0 for m in range(10)]
            assert recipes(plan)[e].tolist() == pytest.approx(expected, rel=1e-4)
        else:
            assert plan.assignment_E[e] == -1
    assert not plan.weights


def unit_rows(experts: Experts) -> Tensor:
    """``[E, I, F]`` of unit length: gate, up and down of each hidden unit, and its biases."""
    parts = {name: tensor.double() for name, tensor in tensors(experts).items() if name != "down_bias_ED"}
    parts["down_EDI"] = parts["down_EDI"].mT
    rows = torch.cat([part if part.ndim == 3 else part.unsqueeze(-1) for part in parts.values()], dim=-1)
    return rows / rows.norm(dim=-1, keepdim=True)


def components(experts: Experts, count: int) -> Tensor:
    """By one singular value decomposition of all units."""
    rows_EIF = unit_rows(experts)
    flat_NF = rows_EIF.flatten(0, 1) - rows_EIF.flatten(0, 1).mean(dim=0)
    _, S, Vh = torch.linalg.svd(flat_NF, full_matrices=False)
    return (flat_NF @ Vh[:count].T * S[:count]).reshape(*rows_EIF.shape[:2], -1)


@pytest.mark.parametrize("bias", [False, True])
def test_principal_components_are_those_of_all_units_at_once(bias: bool):
    experts = random_experts(5, bias=bias)
    # with 48 or 50 numbers to a unit all directions are iterated, so nothing is approximate
    found, expected = principal_units(experts, 40).double(), components(experts, 40)
    for i, j in combinations(range(5), 2):
        torch.testing.assert_close(
            torch.cdist(found[i], found[j]), torch.cdist(expected[i], expected[j]), atol=1e-3, rtol=1e-3
        )


def test_principal_components_are_near_where_units_are_long():
    experts = random_experts(6, D=60, width=20)
    experts.gate_EID[..., :3].mul_(torch.tensor([9.0, 6.0, 4.0]))  # directions that stand out
    found, expected = principal_units(experts, 3).double(), components(experts, 3)
    exact = torch.cdist(expected.flatten(0, 1), expected.flatten(0, 1))
    error = torch.cdist(found.flatten(0, 1), found.flatten(0, 1)) - exact
    assert float(error.abs().max()) < 0.02 * float(exact.max())


@pytest.mark.parametrize("bias", [False, True])
def test_ream_aligns_units_at_the_least_sum_of_both_distances(bias: bool):
    layer = observe(random_experts(8, bias=bias))
    plan = run(ream, layer, 3)
    reduced_EIC = components(layer.experts, 64)
    reduced_EIC = reduced_EIC / reduced_EIC.norm(dim=-1, keepdim=True)
    made, score = prototypes(layer.experts, plan), reap_score(layer)
    for prototype, members in enumerate((plan.mixing_KE != 0).unbind()):
        group = members.nonzero().flatten().tolist()
        centroid = int((plan.assignment_E == prototype).nonzero())
        expected = {name: torch.zeros_like(tensor[prototype]) for name, tensor in tensors(made).items()}
        for e in group:
            order = torch.arange(12)
            if e != centroid:
                active = [hidden(layer, m) for m in (centroid, e)]
                active = [a_IT / a_IT.norm(dim=1, keepdim=True) for a_IT in active]
                cost_II = torch.cdist(*active) + torch.cdist(reduced_EIC[centroid], reduced_EIC[e])
                order = torch.from_numpy(linear_sum_assignment(cost_II.numpy())[1])
                assert order.tolist() != list(range(12))
            share = score[e] / sum(score[m] for m in group)
            for name, part in permute({n: t[e] for n, t in tensors(layer.experts).items()}, order).items():
                expected[name] += share * part.double()
        for name, tensor in expected.items():
            torch.testing.assert_close(getattr(made, name)[prototype], tensor, rtol=1e-4, atol=1e-5)


def hidden(layer: Layer, expert: int) -> Tensor:
    """``[I, T]``: the hidden activations of an expert on all tokens."""
    gate_IT = layer.experts.gate_EID[expert] @ layer.x_TD.T
    up_IT = layer.experts.up_EID[expert] @ layer.x_TD.T
    if layer.experts.gate_bias_EI is not None and layer.experts.up_bias_EI is not None:
        gate_IT, up_IT = (
            gate_IT + layer.experts.gate_bias_EI[expert, :, None],
            up_IT + layer.experts.up_bias_EI[expert, :, None],
        )
    return (gate_IT.double().sigmoid() * gate_IT * up_IT).double()


def test_ream_undoes_the_order_of_hidden_units():
    layer = observe(shuffled(with_rows(random_experts(6), [0] * 6)))
    plan = run(ream, layer, 2)
    made = prototypes(layer.experts, plan)
    for prototype in range(2):
        for x_D in layer.x_TD[:10]:
            torch.testing.assert_close(answer(made, prototype, x_D.double()).float(), answer(layer.experts, 0, x_D))
    unaligned = prototypes(layer.experts, run(ream, layer, 2, align=False))
    x_D, expected_D = layer.x_TD[0].double(), answer(layer.experts, 0, layer.x_TD[0])
    assert not all(torch.allclose(answer(unaligned, prototype, x_D).float(), expected_D) for prototype in range(2))


def test_ream_adds_nothing_of_experts_that_nobody_chose():
    layer = observe(random_experts(8), unused=(1, 4))
    plan = run(ream, layer, 3)
    assert not plan.mixing_KE[:, [1, 4]].any()
    assert plan.assignment_E[[1, 4]].tolist() == [-1, -1]


def test_ream_keeps_the_layers_of_a_scope_apart():
    _, _, joined, experts = two_layers([[0, 1, 2, 3], [4, 5, 6, 7]], random_experts(8))
    plan = ream(joined, experts, 3)
    assert all(not (row[:4].any() and row[4:].any()) for row in plan.mixing_KE)
    assert torch.isfinite(plan.mixing_KE).all()


@pytest.mark.parametrize("seed", range(3))
def test_ream_groups_a_layer_of_a_scope_as_it_does_alone(seed: int):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for place in range(2):
        layer = observe(random_experts(8, seed=seed + place), seed=seed + place, T=200)
        # columns of logits that are all nearly alike, so that those of another layer are farther than any of them
        column_ET = 3 + torch.randn(8, 50, generator=generator).double()
        sums = {**layer.statistics.sums, "logit_gram": column_ET @ column_ET.T}
        layers.append(replace(layer, statistics=replace(layer.statistics, sums=sums)))
    joined, experts = subsets.join_layers([layer.statistics for layer in layers], [layer.experts for layer in layers])
    together = recipes(ream(joined, experts, 6, align=False, group_size=3))
    for place, layer in enumerate(layers):
        own = slice(8 * place, 8 * place + 8)
        kept = int((together[own] != 0).any(dim=1).sum())
        alone = ream(layer.statistics, layer.experts, kept, align=False, group_size=3)
        torch.testing.assert_close(recipes(alone), together[own, own])


def test_ream_refuses_groups_of_less_than_nobody():
    with pytest.raises(UsageError, match="group_size"):
        run(ream, observe(random_experts(4)), 2, group_size=-1)
