"""Sub-MoE: merge experts in a subspace that they share (arXiv 2506.23266)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor

from conmoe.ops import plans
from conmoe.ops.clustering import kmeans_within
from conmoe.ops.experts import mix, tensors
from conmoe.ops.similarity import output_cosine, within_layers
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics, UsageError


@method(
    "sub-moe",
    paper="https://arxiv.org/abs/2506.23266",
    needs=("count", "sample", "weights"),
    promises_lossless_duplicates=True,
)
def sub_moe(
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    *,
    rank: Annotated[float, "share of the shared directions of each matrix that is kept; 1: all, a plain mean"] = 1.0,
) -> LayerPlan:
    """Cluster experts by the cosine of their outputs, and merge each cluster in its members' shared subspace.

    Similarity is the mean cosine of two experts' outputs for the same token, over all tokens of the sample, and
    clusters are those of k-means. For each of gate, up and down, the members' matrices side by side are decomposed,
    ``[W_1 ... W_n] = U S [V_1 ... V_n]^T``; they share ``U`` and ``S``, and the merged matrix is
    ``U S (sum b_j V_j)^T`` with ``b_j`` the member's share of the cluster's use. Router unchanged, members redirected.

    ``U S V_j^T`` is ``W_j``, so with all of ``U`` the merged matrix is the mean ``sum b_j W_j`` exactly, and that is
    what we compute. Only a truncated ``U`` makes a difference: ``rank`` below 1 projects the mean on that share of the
    leading directions, ``U_r U_r^T sum b_j W_j``, found from ``sum W_j W_j^T`` without the wide matrix.

    A reconstruction: the authors' code is not public, and the formulas are known from the abstract and from two
    independent implementations, neither of which truncates. The paper's random start of k-means is a choice of best
    medoids here. Its joint clustering of two adjacent layers (``--scope 2``) shares out the number of clusters, as one
    of these implementations has it; clusters stay within their layer. Biases are averaged.
    """
    if not 0 < rank <= 1:
        raise UsageError(f"Option 'rank' takes a share above 0 and up to 1, not {rank:g}.")
    if keep == statistics.owner_E.numel():
        return plans.identity(keep)
    owner_E = statistics.owner_E.cpu()
    cosine_EE = within_layers(output_cosine, statistics.sample, experts, owner_E)
    plan = plans.merge(kmeans_within(cosine_EE, keep, owner_E), statistics.sums["count"])
    if rank == 1:
        return plan
    weights = {name: mix(tensor, plan.mixing_KE, rounded=False) for name, tensor in tensors(experts).items()}
    for prototype, recipe_E in enumerate(plan.mixing_KE):
        members = recipe_E.nonzero().flatten().tolist()
        if len(members) > 1:
            for name in ("gate_EID", "up_EID", "down_EDI"):
                union = [getattr(experts, name)[member] for member in members]
                weights[name][prototype] = _project(weights[name][prototype], union, rank)
    return replace(plan, weights={name: made.to(getattr(experts, name).dtype).cpu() for name, made in weights.items()})


def _project(mean_ab: Tensor, union: list[Tensor], rank: float) -> Tensor:
    """``U_r U_r^T mean``, ``U_r`` the leading left singular vectors of ``[W_1 ... W_n]``."""
    gram_aa = torch.zeros(mean_ab.shape[0], mean_ab.shape[0], dtype=torch.float64, device=mean_ab.device)
    for weight_ab in union:
        precise_ab = weight_ab.to(mean_ab.dtype)
        gram_aa += precise_ab @ precise_ab.T
    width = sum(weight_ab.shape[1] for weight_ab in union)
    kept = math.ceil(rank * min(mean_ab.shape[0], width))
    # ascending eigenvalues
    basis_ar: Tensor = torch.linalg.eigh(gram_aa).eigenvectors[:, -kept:].to(mean_ab.dtype)
    return basis_ar @ (basis_ar.T @ mean_ab)
