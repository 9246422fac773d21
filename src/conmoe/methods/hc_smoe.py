"""HC-SMoE: hierarchical clustering of experts by their outputs (arXiv 2410.08589)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from conmoe.ops import plans, similarity
from conmoe.ops.clustering import agglomerate_within, kmeans_by_distance
from conmoe.ops.zipit import merge_units
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics, TokenSample

Feature = Annotated[Literal["mean_output", "weight", "router_logits"], "what makes experts alike"]
Clustering = Annotated[Literal["hierarchical", "kmeans"], "merge the nearest clusters, or move experts between them"]
Linkage = Annotated[
    Literal["average", "single", "complete", "ward"], "the distance of two clusters, from those of their members"
]
Merge = Annotated[
    Literal["frequency", "average", "fix-dom", "zipit"],
    "mean of the members, by use or even; or by use and unit by unit, where units correlate",
]


@method(
    "hc-smoe",
    paper="https://arxiv.org/abs/2410.08589",
    needs=("count", "logit_gram", "sample", "weights"),
    promises_lossless_duplicates=True,
)
def hc_smoe(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    feature: Feature = "mean_output",
    clustering: Clustering = "hierarchical",
    linkage: Linkage = "average",
    merge: Merge = "frequency",
) -> LayerPlan:
    """Merge the two clusters of experts with the most similar outputs, until few enough are left.

    The feature of an expert is its mean output over all tokens of the sample, routed to it or not, and distances are
    Euclidean: agglomerative clustering with average linkage, cut at ``keep`` clusters (section 3). Each cluster becomes
    the mean of its members weighted by their use, and answers for all of them; the router is unchanged.

    From the paper's ablations: ``feature="weight"`` compares all weights in one row, ``"router_logits"`` the columns of
    router logits over all calibration tokens. ``clustering="kmeans"`` minimises squared distances to the middles of the
    clusters; the paper finds it to depend on its random start, ours is a choice of best medoids
    (:func:`conmoe.ops.clustering.kmeans`). ``--budget dominant`` is the authors' dynamic count of clusters.
    ``merge="fix-dom"`` and ``"zipit"`` first match hidden units by the correlation of their activations on the tokens
    routed to the cluster, to those of the member nearest to the middle of the cluster or among all
    (:mod:`conmoe.ops.zipit`).

    Departures. The authors' code also matches output channels, which all experts of a layer share; we leave them where
    they are. In a scope, clusters stay within their layer; the scope shares out how many each gets. Clusters of unused
    experts are averaged evenly. Known failure: many singletons beside one large cluster, and free-form text suffers
    (reported with REAP, arXiv 2510.13999).
    """
    if keep == statistics.owner_E.numel():
        return plans.identity(keep)
    distance_EE = _distance(feature, statistics, experts).cpu()
    if clustering == "kmeans":
        assignment_E = kmeans_by_distance(distance_EE, keep, statistics.owner_E)
    else:
        assignment_E = agglomerate_within(distance_EE, keep, statistics.owner_E, linkage)
    count_E = statistics.sums["count"].cpu()
    plan = plans.merge(assignment_E, torch.ones_like(count_E) if merge == "average" else count_E)
    if merge in ("frequency", "average"):
        return plan
    weights: dict[str, list[Tensor]] = defaultdict(list)
    for recipe_E in plan.mixing_KE:
        members = recipe_E.nonzero().flatten()
        x_nD = _inputs(statistics.sample, members)
        made = merge_units(experts, recipe_E, _middle(distance_EE, members), x_nD, fixed=merge == "fix-dom")
        for name, tensor in made.items():
            weights[name].append(tensor.cpu())
    return replace(plan, weights={name: torch.stack(rows) for name, rows in weights.items()})


def _distance(feature: str, statistics: LayerStatistics, experts: Experts) -> Tensor:
    if feature == "router_logits":
        return similarity.logit_distance(statistics.sums["logit_gram"])
    if feature == "weight":
        return similarity.euclidean_weight_distance(experts)
    return similarity.within_layers(
        similarity.mean_output_distance, statistics.sample, experts, statistics.owner_E.cpu()
    )


def _middle(distance_EE: Tensor, members: Tensor) -> int:
    """The member nearest to the mean of the features: the one with the least sum of squared distances."""
    square_EE = distance_EE[members][:, members].square()
    return int(members[int(square_EE.sum(dim=1).argmin())])


def _inputs(sample: TokenSample, members: Tensor) -> Tensor:
    """The tokens routed to any member, or all tokens of their layer if there are none."""
    routed_n = torch.isin(sample.index_nk.long(), members.to(sample.index_nk.device)).any(dim=1)
    own_n = ~sample.logits_nE[:, int(members[0])].isnan()
    return sample.hidden_nD[routed_n if routed_n.any() else own_n]
