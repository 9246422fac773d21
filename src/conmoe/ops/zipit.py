"""Merge experts unit by unit where their hidden units correlate, one to one or not.

ZipIt (arXiv 2305.03053) as HC-SMoE (arXiv 2410.08589) uses it on gated experts. For members with shares ``b_j`` the
wanted output is ``sum b_j E_j(x)``, a sum over all units ``u`` of all members of ``b_j(u) down_u h_u(x)``. Put into
``I`` groups of units that are alike, each group becomes one unit: the mean of its rows of gate and up, weighted by
share, and the sum of ``b_j(u) down_u``, for all its units are taken to have the activation of the group. With one unit
of each member in every group, that is the weighted mean of permuted experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conmoe.ops.accumulate import add_at
from conmoe.ops.alignment import HIDDEN_AXIS, activation_affinity
from conmoe.ops.experts import mixture, tensors
from conmoe.types import Experts

#: A merged unit correlates with others this much less than the less alike of its two halves did (ZipIt's alpha).
REPEATED = 0.1
#: Shares below this count as this much in the mean of gate and up, so that a group of unused experts has one.
LEAST_SHARE = 1e-12


@torch.no_grad()
def merge_units(experts: Experts, recipe_E: Tensor, dominant: int, x_nD: Tensor, fixed: bool) -> dict[str, Tensor]:
    """One prototype, by canonical name, in the dtype of the experts.

    From the dominant member on, the others are merged in one after another, those of larger share first. ``fixed``:
    each of their units joins the unit of the dominant expert that it correlates with most. Otherwise the two experts
    are zipped: the most correlated two of their ``2 I`` units merge until ``I`` are left, two of one expert as well.
    ZipIt zips all members at once; that takes ``(n I)^2`` numbers, and a cluster may hold most experts of a layer.

    Args:
        recipe_E: the share of each member, zero for the others.
        dominant: a member.
        x_nD: the tokens over which hidden activations are correlated; without any, units merge in their order.
    """
    members = recipe_E.nonzero().flatten().tolist()
    source = tensors(experts)
    if len(members) == 1:
        return {name: tensor[dominant] for name, tensor in source.items()}
    width = experts.gate_EID.shape[1]
    merged, mass_I = _weighted(experts, dominant, float(recipe_E[dominant]))
    for other in sorted(set(members) - {dominant}, key=lambda member: (-float(recipe_E[member]), member)):
        guest, guest_mass_I = _weighted(experts, other, float(recipe_E[other]))
        both = {name: torch.cat([merged[name], guest[name]], dim=HIDDEN_AXIS[name]) for name in merged}
        if fixed or not x_nD.shape[0]:
            label_P = _join(activation_affinity(experts, x_nD, dominant, other))
        else:
            label_P = zip_units(activation_affinity(_as_experts(experts, both), x_nD, 0, 0), width)
        merged, mass_I = _fold(both, torch.cat([mass_I, guest_mass_I]), label_P.to(mass_I.device), width)
    made = {name: tensor.to(source[name].dtype) for name, tensor in merged.items()}
    if experts.down_bias_ED is not None:
        shares = recipe_E[members].tolist()
        made["down_bias_ED"] = mixture([experts.down_bias_ED[member] for member in members], shares)
    return made


def zip_units(correlation_PP: Tensor, keep: int) -> Tensor:
    """``label_P``: merge the two most correlated of ``P`` units until ``keep`` are left; labels by lowest member.

    A merged unit correlates with another as the less correlated of its halves, times ``REPEATED``. Ties go to the
    lowest index. ``O(P)`` for most merges.
    """
    correlation: NDArray[np.float64] = correlation_PP.to("cpu", torch.float64).numpy().copy()
    P = correlation.shape[0]
    np.fill_diagonal(correlation, -np.inf)
    label_P, units_P = np.arange(P), np.arange(P)
    nearest_P = correlation.argmax(axis=1)
    highest_P = correlation[units_P, nearest_P]
    for _ in range(P - keep):
        one = int(highest_P.argmax())
        into, gone = sorted((one, int(nearest_P[one])))
        label_P[label_P == gone] = into
        row_P = REPEATED * np.minimum(correlation[into], correlation[gone])
        correlation[into] = correlation[:, into] = row_P
        correlation[gone] = correlation[:, gone] = -np.inf
        bereft_P = (nearest_P == into) | (nearest_P == gone) | (units_P == into)
        better_P = (row_P > highest_P) | ((row_P == highest_P) & (into < nearest_P))
        nearest_P[better_P], highest_P[better_P] = into, row_P[better_P]
        stale = np.flatnonzero(bereft_P)
        nearest_P[stale] = correlation[stale].argmax(axis=1)
        highest_P[stale] = correlation[stale, nearest_P[stale]]
        highest_P[gone] = -np.inf
    return torch.from_numpy(np.unique(label_P, return_inverse=True)[1].reshape(P))


def _join(correlation_II: Tensor) -> Tensor:
    """Labels of ``2 I`` units: the dominant expert's own, and for each guest the one that it correlates with most.

    A guest that correlates with none, constant on these tokens, goes where it is.
    """
    correlation: NDArray[np.float64] = correlation_II.to("cpu", torch.float64).numpy()
    own_I = np.arange(correlation.shape[0])
    joined_I = np.where(correlation.max(axis=0) > 0, correlation.argmax(axis=0), own_I)
    return torch.from_numpy(np.concatenate([own_I, joined_I]))


def _weighted(experts: Experts, expert: int, share: float) -> tuple[dict[str, Tensor], Tensor]:
    """An expert's units in float32 or better, its down projection times its share, and the mass of each unit."""
    units = {
        name: tensor[expert].to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in tensors(experts).items()
        if name in HIDDEN_AXIS
    }
    units["down_EDI"] = units["down_EDI"] * share
    return units, torch.full_like(units["gate_EID"][:, 0], max(share, LEAST_SHARE))


def _fold(units: dict[str, Tensor], mass_P: Tensor, label_P: Tensor, keep: int) -> tuple[dict[str, Tensor], Tensor]:
    """``P`` units in ``keep`` groups: gate and up averaged by mass, down added up."""
    total_I = add_at(mass_P.new_zeros(keep), 0, label_P, mass_P)
    folded = {}
    for name, tensor in units.items():
        weight_P = mass_P.new_ones(mass_P.shape) if name == "down_EDI" else mass_P / total_I[label_P]
        axis = HIDDEN_AXIS[name] + tensor.ndim
        weighted = tensor * (weight_P.unsqueeze(1) if axis == 0 and tensor.ndim == 2 else weight_P)
        shape = list(tensor.shape)
        shape[axis] = keep
        folded[name] = add_at(tensor.new_zeros(shape), axis, label_P, weighted)
    return folded, total_I


def _as_experts(experts: Experts, units: dict[str, Tensor]) -> Experts:
    fields: dict[str, Any] = {name: tensor.unsqueeze(0) for name, tensor in units.items()}
    return replace(experts, down_bias_ED=None, **fields)
