"""Group experts into exactly ``keep`` clusters: agglomerative clustering and k-means, both without any chance.

A result is ``label_E``: the cluster of each expert, clusters numbered by their lowest member. Relabelling the experts
relabels the clusters; where distances are exactly equal the lower index decides.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from conmoe.ops import coverage, fusion
from conmoe.ops.scores import check_min_own

Linkage = Literal["average", "single", "complete", "ward"]
Array = NDArray[np.float64]

#: A move must lower the scatter by this share, so that rounding cannot make it cycle.
IMPROVEMENT = 1e-12
#: How much farther apart than any two experts of one layer those of two layers are held, so that they never merge: ward
#: linkage reaches ``sqrt(E)`` times the largest distance.
FARTHER = 1e4


def agglomerate(distance_EE: Tensor, keep: int, linkage: Linkage = "average") -> Tensor:
    """Merge the two nearest clusters until ``keep`` are left.

    How near two clusters are: the mean, smallest or largest distance of their members, or ("ward") how much merging
    them adds to the sum of squares around the means, which supposes Euclidean distances. ``O(E^2)`` (Müllner 2011).
    """
    E = distance_EE.shape[0]
    label_E = np.arange(E)
    if keep < E:
        tree = hierarchy.linkage(squareform(distance_EE.cpu().double().numpy(), checks=False), method=linkage)
        # the first merges, not a threshold: where distances are equal a threshold may give any number of clusters
        for step, (one, other) in enumerate(tree[: E - keep, :2].astype(np.int64)):
            label_E[(label_E == one) | (label_E == other)] = E + step
    return canonical(torch.from_numpy(label_E))


def agglomerate_within(distance_EE: Tensor, keep: int, owner_E: Tensor, linkage: Linkage = "average") -> Tensor:
    """:func:`agglomerate` the layers of a scope at once: the nearest two clusters of any one layer merge.

    Outputs and weights grow with depth, so each layer's distances are taken over their mean. A cluster never holds
    experts of two layers.
    """
    owner_E = owner_E.cpu()
    if owner_E.unique().numel() == 1:
        return agglomerate(distance_EE, keep, linkage)
    check_min_own(owner_E, keep, 1)
    relative_EE = torch.zeros(distance_EE.shape, dtype=torch.float64)
    for own in _members(owner_E):
        relative_EE[own.unsqueeze(1), own] = _over_mean(distance_EE[own][:, own])
    # farther than any linkage can come to be within a layer
    beyond = FARTHER * (float(relative_EE.max()) + 1)
    return agglomerate(relative_EE.masked_fill(owner_E != owner_E.unsqueeze(1), beyond), keep, linkage)


def kmeans(gram_EE: Tensor, keep: int, weight_E: Tensor | None = None) -> Tensor:
    """Minimise :func:`scatter` from the ``keep`` best medoids on, by the best move of one expert at a time.

    Only inner products of the experts' features are needed, so these may be as long as all outputs on all tokens. No
    cluster runs empty. We start from medoids (greedy addition and swaps) and not at random: k-means depends on its
    start, and a plan must not depend on a seed or on the order of the experts. Each move costs ``O(K E^2)``.
    """
    gram, weight = _prepare(gram_EE, weight_E)
    square_E = gram.diagonal()
    square_EE = torch.from_numpy((square_E[:, None] + square_E[None, :] - 2 * gram).clip(min=0))
    label_E: NDArray[np.int64] = coverage.nearest(
        square_EE, coverage.cover(square_EE, torch.from_numpy(weight), keep)
    ).numpy()
    least = IMPROVEMENT * float((weight * square_E).sum())
    while keep > 1:
        change_EK = _move_changes(gram, weight, label_E)
        expert, into = np.unravel_index(int(change_EK.argmin()), change_EK.shape)
        if change_EK[expert, into] >= -least:
            break
        label_E[expert] = into
    return canonical(torch.from_numpy(label_E))


def kmeans_within(gram_EE: Tensor, keep: int, owner_E: Tensor) -> Tensor:
    """:func:`kmeans` in each layer of a scope, its clusters shared out where they lower the scatter most.

    One after another, from one cluster a layer on; a cluster never holds experts of two layers.
    """
    owner_E = owner_E.cpu()
    check_min_own(owner_E, keep, 1)
    members = _members(owner_E)

    @cache
    def fit(layer: int, count: int) -> tuple[Tensor, float]:
        own_EE = gram_EE[members[layer]][:, members[layer]]
        label_E = kmeans(own_EE, count)
        return label_E, scatter(own_EE, label_E)

    counts = [1] * len(members)
    for _ in range(keep - len(members)):
        open_layers = [layer for layer, own in enumerate(members) if counts[layer] < own.numel()]
        gains = {layer: fit(layer, counts[layer])[1] - fit(layer, counts[layer] + 1)[1] for layer in open_layers}
        counts[max(gains, key=lambda layer: gains[layer])] += 1
    label_E = torch.empty_like(owner_E)
    for layer, own in enumerate(members):
        label_E[own] = fit(layer, counts[layer])[0] + sum(counts[:layer])
    return canonical(label_E)


def kmeans_by_distance(distance_EE: Tensor, keep: int, owner_E: Tensor) -> Tensor:
    """:func:`kmeans_within` of features of which only the Euclidean distances are known, each layer's over their mean.

    Inner products around the middle of a layer follow from its distances (Torgerson 1952).
    """
    owner_E = owner_E.cpu()
    gram_EE = torch.zeros(distance_EE.shape, dtype=torch.float64)
    for own in _members(owner_E):
        square_EE = _over_mean(distance_EE[own][:, own]).square()
        mean_E = square_EE.mean(dim=1)
        gram_EE[own.unsqueeze(1), own] = (mean_E.unsqueeze(1) + mean_E - mean_E.mean() - square_EE) / 2
    return kmeans_within(gram_EE, keep, owner_E)


def scatter(gram_EE: Tensor, label_E: Tensor, weight_E: Tensor | None = None) -> float:
    """``sum over experts of weight_i ||f_i - weighted mean of its cluster||^2``, where ``gram_ij = <f_i, f_j>``."""
    gram, weight = _prepare(gram_EE, weight_E)
    label = label_E.cpu().numpy()
    return float((weight * _to_centres(gram, weight, label)[np.arange(label.size), label]).sum())


def canonical(label_E: Tensor) -> Tensor:
    """The same clusters, numbered by their lowest member."""
    _, label_E = label_E.cpu().unique(return_inverse=True)
    member_KE = label_E == torch.arange(int(label_E.max()) + 1).unsqueeze(1)
    rank_K: Tensor = member_KE.to(torch.int8).argmax(dim=1).argsort().argsort()
    return rank_K[label_E]


def _members(owner_E: Tensor) -> list[Tensor]:
    """The experts of each layer of a scope."""
    return [(owner_E == layer).nonzero().flatten() for layer in owner_E.unique()]


def _over_mean(distance_EE: Tensor) -> Tensor:
    """Distances over the mean distance of two experts, in float64 on the CPU."""
    distance_EE = distance_EE.cpu().double()
    pairs = max(distance_EE.numel() - distance_EE.shape[0], 1)
    return distance_EE / (distance_EE.sum() / pairs).clamp_min(1e-300)


def _prepare(gram_EE: Tensor, weight_E: Tensor | None) -> tuple[Array, Array]:
    gram: Array = gram_EE.cpu().double().numpy()
    weight: Array = np.ones(gram.shape[0]) if weight_E is None else weight_E.cpu().double().numpy()
    return gram, weight


def _to_centres(gram: Array, weight: Array, label: NDArray[np.int64]) -> Array:
    """``[E, K]``: the squared distance of each expert to the weighted mean of each cluster."""
    share_KE: Array = fusion.average(torch.from_numpy(label), torch.from_numpy(weight)).numpy()
    dot_EK = gram @ share_KE.T
    square_K = (share_KE * dot_EK.T).sum(axis=1)
    squares: Array = (gram.diagonal()[:, None] - 2 * dot_EK + square_K[None, :]).clip(min=0)
    return squares


def _move_changes(gram: Array, weight: Array, label: NDArray[np.int64]) -> Array:
    """``[E, K]``: by how much the scatter changes if expert ``e`` moves into cluster ``k`` (Hartigan 1975).

    Leaving a cluster of weight ``W`` saves ``w W / (W - w)`` times the squared distance to its mean, joining one costs
    ``w W / (W + w)`` times it. A cluster's only member cannot leave.
    """
    square_EK = _to_centres(gram, weight, label)
    rows = np.arange(label.size)
    weight_E1, mass_K = weight[:, None], np.bincount(label, weight)
    joined_EK = mass_K + weight_E1
    change_EK: Array = weight_E1 * mass_K / np.where(joined_EK > 0, joined_EK, 1.0) * square_EK
    left_E = mass_K[label] - weight
    # who leaves nothing of weight behind is the mean, and saves nothing
    can_save_E = left_E > IMPROVEMENT * weight
    saved_E = weight * mass_K[label] / np.where(can_save_E, left_E, 1.0) * square_EK[rows, label]
    change_EK -= np.where(can_save_E, saved_E, 0.0)[:, None]
    change_EK[rows, label] = 0.0
    change_EK[np.bincount(label)[label] == 1] = 0.0
    return change_EK
