"""Bring the hidden units of experts into one order, so that averaging them averages what belongs together.

A gated expert computes the same function whatever the order of its ``I`` hidden units: rows of gate and up (and their
biases) and columns of down move together. ``permutation_I[a]`` is the unit of an expert that goes where the reference
has its unit ``a``; the best one maximises ``sum over a of affinity_II[a, permutation_I[a]]``, a linear assignment.
Cost of one expert: the affinity (weights: ``6 D I^2`` operations) and ``O(I^3)`` at worst for the assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from conmoe.ops.experts import expert_hidden, mixture, tensors
from conmoe.types import ConmoeError, Experts

#: Bytes of the largest block of hidden activations.
BLOCK_BYTES = 128 * 2**20
#: A permutation has to gain this share of the affinities involved, so that rounding cannot move units that are alike.
TIE = 1e-6
#: The axis of hidden units, counted from the back: the same for one expert and for all of them.
HIDDEN_AXIS = {"gate_EID": -2, "up_EID": -2, "down_EDI": -1, "gate_bias_EI": -1, "up_bias_EI": -1}

Affinity = Callable[[int, int], Tensor]


def align(experts: Experts, reference_E: Tensor, affinity: Affinity) -> Tensor:
    """``permutation_EI``, on the CPU: how the hidden units of each expert are to be ordered to match its reference.

    Args:
        experts: only their shape is asked for.
        reference_E: the expert that each one is aligned to (the dominant one of its group, say, or expert 0); one that
            is its own reference stays as it is.
        affinity: ``(reference, expert) -> affinity_II``, as in :func:`match`: :func:`weight_affinity` or
            :func:`activation_affinity` with the experts filled in, or a mixture of a method's own.
    """
    E, width, _ = experts.gate_EID.shape
    permutation_EI = torch.arange(width).repeat(E, 1)
    for expert, reference in enumerate(reference_E.tolist()):
        if reference != expert:
            permutation_EI[expert] = match(affinity(reference, expert))
    return permutation_EI


def match(affinity_II: Tensor) -> Tensor:
    """The permutation that maximises ``sum over a of affinity_II[a, permutation_I[a]]``; negate a cost.

    Exact (scipy's linear assignment). Units that may as well stay stay: each cycle of the permutation that gains
    nothing over leaving its units in place is undone.

    Raises:
        ConmoeError: an affinity is NaN or infinite.
    """
    affinity: NDArray[np.float64] = affinity_II.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(affinity).all():
        raise ConmoeError("Hidden units cannot be aligned: an affinity between two of them is not finite.")
    permutation = linear_sum_assignment(affinity, maximize=True)[1].astype(np.int64)
    unit_I = np.arange(permutation.size)
    moved_I, still_I = affinity[unit_I, permutation], affinity.diagonal()
    cycle_I = _cycles(permutation)
    gain = np.bincount(cycle_I, moved_I - still_I)
    scale = np.bincount(cycle_I, np.abs(moved_I) + np.abs(still_I))
    undone_I = (gain <= TIE * scale)[cycle_I]
    return torch.from_numpy(np.where(undone_I, unit_I, permutation))


@torch.no_grad()
def weight_affinity(experts: Experts, reference: int, expert: int) -> Tensor:
    """Inner products of the weights of every two hidden units: weight matching (M-SMoE, arXiv 2310.01334).

    Its best permutation P maximises ``<gate_ref, P gate> + <up_ref, P up> + <down_ref, down P^T>``, and so minimises
    the squared distance of the weights. A bias of gate or up counts as one more column; the bias of down belongs to no
    unit. Products in float32, their sum in float64.
    """
    width = experts.gate_EID.shape[1]
    total_II = torch.zeros(width, width, dtype=torch.float64, device=experts.gate_EID.device)
    for name, tensor in tensors(experts).items():
        if name in HIDDEN_AXIS:
            total_II += _units(name, tensor[reference]) @ _units(name, tensor[expert]).T
    return total_II


@torch.no_grad()
def activation_affinity(experts: Experts, x_nD: Tensor, reference: int, expert: int) -> Tensor:
    """Correlations over the tokens ``x_nD`` of every two hidden units of two experts: activation matching.

    A unit that is constant on these tokens is correlated with nothing: 0, also where there are no tokens at all.
    Streams over tokens: ``n`` evaluations of gate and up of both experts, and ``2 n I^2`` operations.
    """
    width, device = experts.gate_EID.shape[1], experts.gate_EID.device
    dot_II = torch.zeros(width, width, dtype=torch.float64, device=device)
    total_2I, square_2I, shift_2I = (dot_II.new_zeros(2, width) for _ in range(3))
    blocks = x_nD.split(max(1, BLOCK_BYTES // (16 * width))) if x_nD.shape[0] else ()
    for position, x_cD in enumerate(blocks):
        hidden_2cI = torch.stack([expert_hidden(experts, e, x_cD.to(device)) for e in (reference, expert)])
        if position == 0:  # moments around a value near the mean: those around zero cancel where the mean is large
            shift_2I = hidden_2cI.mean(dim=1, dtype=torch.float64)
        precision = torch.promote_types(hidden_2cI.dtype, torch.float32)
        around_2cI = hidden_2cI.to(precision) - shift_2I.unsqueeze(1).to(precision)
        dot_II += around_2cI[0].T @ around_2cI[1]
        total_2I += around_2cI.sum(dim=1)
        square_2I += around_2cI.square().sum(dim=1)
    return _correlation(dot_II, total_2I, square_2I, shift_2I, x_nD.shape[0])


def permute(parts: Mapping[str, Tensor], permutation_I: Tensor) -> dict[str, Tensor]:
    """Expert tensors, by canonical name, with their hidden units in the order ``permutation_I``.

    Of one expert, or of several that share a permutation. The function that they compute stays the same.
    """
    return {
        name: tensor.index_select(HIDDEN_AXIS[name], permutation_I.to(tensor.device)) if name in HIDDEN_AXIS else tensor
        for name, tensor in parts.items()
    }


def mix_aligned(experts: Experts, mixing_KE: Tensor, permutation_EI: Tensor) -> dict[str, Tensor]:
    """The prototypes ``mixing_KE`` of experts whose hidden units are put in order first, by canonical name.

    In the dtype of the experts, summed in float32 or better and rounded once; a one-hot row whose expert is its own
    reference is a copy, bit for bit. Holds one recipe's members beside the result.
    """
    mixed: dict[str, list[Tensor]] = {name: [] for name in tensors(experts)}
    for recipe_E in mixing_KE:
        members = recipe_E.nonzero().flatten().tolist()
        for name, tensor in tensors(experts).items():
            aligned = [permute({name: tensor[member]}, permutation_EI[member])[name] for member in members]
            mixed[name].append(mixture(aligned, recipe_E[members].tolist()))
    return {name: torch.stack(prototypes) for name, prototypes in mixed.items()}


def _units(name: str, tensor: Tensor) -> Tensor:
    """``[I, features]``: what belongs to each hidden unit of one expert's tensor, in float32 or better."""
    unit_I = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).movedim(HIDDEN_AXIS[name], 0)
    return unit_I.reshape(unit_I.shape[0], -1)


def _correlation(dot_II: Tensor, total_2I: Tensor, square_2I: Tensor, shift_2I: Tensor, n: int) -> Tensor:
    """From sums of products of deviations from ``shift_2I`` to Pearson's correlation."""
    mean_2I = total_2I / max(n, 1)
    covariance_II = dot_II / max(n, 1) - torch.outer(*mean_2I)
    deviation_2I = (square_2I / max(n, 1) - mean_2I.square()).clamp_min(0).sqrt()
    constant_2I = deviation_2I <= TIE * (mean_2I + shift_2I).abs()
    inverse_2I = torch.where(constant_2I, 0.0, 1 / deviation_2I.masked_fill(constant_2I, 1.0))
    return covariance_II * torch.outer(*inverse_2I)


def _cycles(permutation: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each unit the lowest unit of its cycle."""
    cycle_I = np.full(permutation.size, -1)
    for start in range(permutation.size):
        unit = start
        while cycle_I[unit] < 0:
            cycle_I[unit], unit = start, permutation[unit]
    return cycle_I
