"""Clustering against loops written from the definitions, and against every partition where there are few."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch
from torch import Tensor

from conmoe.ops import clustering
from conmoe.types import UsageError


def points(E: int, F: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(E, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def partition(label_E: Tensor) -> set[frozenset[int]]:
    return {frozenset((label_E == label).nonzero().flatten().tolist()) for label in label_E.unique()}


def partitions(E: int, K: int) -> Iterator[list[int]]:
    """All ways to put ``E`` things into ``K`` non-empty clusters numbered by their lowest member."""

    def extend(labels: list[int], used: int) -> Iterator[list[int]]:
        if len(labels) == E:
            if used == K:
                yield labels
            return
        for label in range(min(used + 1, K)):
            yield from extend([*labels, label], max(used, label + 1))

    yield from extend([], 0)


def spread(point_EF: Tensor, label_E: list[int], weight_E: list[float]) -> float:
    total = 0.0
    for label in set(label_E):
        members = [e for e, other in enumerate(label_E) if other == label]
        mass = sum(weight_E[e] for e in members)
        mean = sum(weight_E[e] * point_EF[e] for e in members) / mass
        total += sum(weight_E[e] * float((point_EF[e] - mean).square().sum()) for e in members)
    return total


def apart(point_EF: Tensor, one: list[int], other: list[int], linkage: str) -> float:
    """How far apart two clusters are, from the definition of each linkage."""
    distances = [float((point_EF[a] - point_EF[b]).norm()) for a in one for b in other]
    if linkage == "ward":
        means = [point_EF[cluster].mean(dim=0) for cluster in (one, other)]
        return len(one) * len(other) / (len(one) + len(other)) * float((means[0] - means[1]).square().sum())
    return {"average": sum(distances) / len(distances), "single": min(distances), "complete": max(distances)}[linkage]


@pytest.mark.parametrize("linkage", ["average", "single", "complete", "ward"])
@pytest.mark.parametrize("seed", range(4))
def test_agglomeration_merges_the_nearest_clusters_one_after_another(linkage: str, seed: int):
    point_EF = points(6, seed=seed)
    distance_EE = torch.cdist(point_EF, point_EF)
    clusters = [[e] for e in range(6)]
    for keep in (5, 4, 3, 2, 1):
        one, other = min(combinations(clusters, 2), key=lambda pair: apart(point_EF, pair[0], pair[1], linkage))
        clusters = [cluster for cluster in clusters if cluster not in (one, other)] + [one + other]
        found = clustering.agglomerate(distance_EE, keep, linkage)
        assert partition(found) == {frozenset(cluster) for cluster in clusters}


def test_agglomeration_makes_as_many_clusters_as_asked_where_all_distances_are_equal():
    distance_EE = 1 - torch.eye(7)
    for keep in range(1, 8):
        assert clustering.agglomerate(distance_EE, keep).unique().numel() == keep


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("seed", range(3))
def test_kmeans_is_near_the_best_of_all_partitions(keep: int, seed: int):
    point_EF = points(7, seed=seed)
    weight_E = torch.rand(7, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    for weights in (None, weight_E):
        weight = [1.0] * 7 if weights is None else weights.tolist()
        best = min(spread(point_EF, labels, weight) for labels in partitions(7, keep))
        label_E = clustering.kmeans(point_EF @ point_EF.T, keep, weights)
        assert label_E.unique().numel() == keep
        assert spread(point_EF, label_E.tolist(), weight) <= 1.02 * best + 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_no_single_move_improves_kmeans(seed: int):
    point_EF = points(20, seed=seed)
    weight_E = (torch.arange(20) + 1.0).tolist()
    found = clustering.kmeans(point_EF @ point_EF.T, 6, torch.tensor(weight_E)).tolist()
    value = spread(point_EF, found, weight_E)
    for expert in range(20):
        if found.count(found[expert]) > 1:
            for label in range(6):
                moved = [label if e == expert else found[e] for e in range(20)]
                assert spread(point_EF, moved, weight_E) >= value * (1 - 1e-9)


def test_scatter_is_the_weighted_sum_of_squares_around_the_means():
    point_EF, label_E = points(8), torch.tensor([0, 1, 0, 2, 1, 1, 0, 2])
    weight_E = torch.arange(1, 9).double()
    value = clustering.scatter(point_EF @ point_EF.T, label_E, weight_E)
    assert value == pytest.approx(spread(point_EF, label_E.tolist(), weight_E.tolist()))


def test_kmeans_with_experts_of_no_weight_is_defined():
    point_EF = points(9)
    for weight_E in (torch.zeros(9), torch.tensor([0.0, 1, 0, 0, 2, 0, 0, 0, 0])):
        label_E = clustering.kmeans(point_EF @ point_EF.T, 4, weight_E)
        assert label_E.unique().tolist() == [0, 1, 2, 3]


def test_duplicates_end_up_together():
    point_EF = points(4)[[0, 1, 2, 0, 1, 3, 3, 3, 2]]
    expected = {frozenset(group) for group in ({0, 3}, {1, 4}, {2, 8}, {5, 6, 7})}
    assert partition(clustering.kmeans(point_EF @ point_EF.T, 4)) == expected
    assert partition(clustering.agglomerate(torch.cdist(point_EF, point_EF), 4)) == expected


@pytest.mark.parametrize("seed", range(3))
def test_renaming_experts_renames_clusters_and_they_are_numbered_by_their_lowest_member(seed: int):
    point_EF = points(15, seed=seed)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(seed))
    for cluster in (
        lambda x: clustering.kmeans(x @ x.T, 6),
        lambda x: clustering.agglomerate(torch.cdist(x, x), 6),
    ):
        label_E, renamed_E = cluster(point_EF), cluster(point_EF[order])
        assert torch.equal(renamed_E, clustering.canonical(label_E[order]))
        lowest = [label_E.tolist().index(label) for label in range(6)]
        assert lowest == sorted(lowest)


def test_layers_of_a_scope_share_clusters_where_they_need_them():
    # the first layer has two kinds of experts, the second six
    point_EF = torch.cat([points(2)[[0, 1, 0, 1, 0, 1]], points(6, seed=1)])
    owner_E = torch.arange(12) // 6
    label_E = clustering.kmeans_within(point_EF @ point_EF.T, 7, owner_E)
    assert label_E.unique().numel() == 7
    assert label_E[:6].tolist() == [0, 1, 0, 1, 0, 1]
    assert label_E[6:].unique().numel() == 5


@pytest.mark.parametrize("keep", [3, 5, 8])
def test_sharing_clusters_among_layers_is_near_the_best_way(keep: int):
    point_EF, owner_E = points(10), torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0, 0])
    gram_EE = point_EF @ point_EF.T
    values = []
    for first in range(1, keep):
        counts = (first, keep - first)
        if counts[0] <= 6 and counts[1] <= 4:
            label_E = torch.empty(10, dtype=torch.int64)
            for layer, count in enumerate(counts):
                own = (owner_E == layer).nonzero().flatten()
                label_E[own] = clustering.kmeans(gram_EE[own][:, own], count) + 100 * layer
            values.append(spread(point_EF, label_E.tolist(), [1.0] * 10))
    found = clustering.kmeans_within(gram_EE, keep, owner_E)
    assert spread(point_EF, found.tolist(), [1.0] * 10) <= 1.05 * min(values)
    assert all(len({int(owner_E[e]) for e in cluster}) == 1 for cluster in partition(found))


def test_fewer_clusters_than_layers_are_refused():
    with pytest.raises(UsageError, match="2 layers"):
        clustering.kmeans_within(torch.eye(4), 1, torch.tensor([0, 0, 1, 1]))
