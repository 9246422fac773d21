"""Hidden units of experts as things of their own: find alike ones in other experts, and let experts absorb them.

A unit is a row of gate, a row of up and a column of down (and its entries of the biases of gate and up), laid end to
end in ``F = 3 D`` numbers (``+ 2`` with biases). ``I`` units per expert, ``M`` units on the move.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from conmoe.ops.accumulate import add_at
from conmoe.ops.experts import tensors
from conmoe.types import Experts

#: Bytes of the largest block of cosines.
BLOCK_BYTES = 128 * 2**20
#: Units are looked up by this many random projections: 24 times fewer multiplications at D = 2048.
PROJECTIONS = 256
#: How far below the threshold a projected cosine may lie before the true one is worked out: five standard deviations
#: at a cosine of 0.6, 0.04 each.
MARGIN = 0.2
#: How many of the most similar units, by their projections, are compared in full.
CANDIDATES = 4
#: A shorter unit has no direction: it is like no other.
TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Moves:
    """``M`` units, and the experts they move to."""

    source_M: Tensor
    unit_M: Tensor
    target_M: Tensor


def unit_vectors(experts: Experts, expert: int) -> Tensor:
    """``[I, F]`` in float32 or better: the units of one expert."""
    parts = _unit_tensors(experts)
    return _end_to_end([part[expert].T if name == "down_EDI" else part[expert] for name, part in parts.items()])


def moved_vectors(experts: Experts, expert_M: Tensor, unit_M: Tensor) -> Tensor:
    """``[M, F]`` in float32 or better: one unit each of the experts ``expert_M``."""
    parts = _unit_tensors(experts)
    return _end_to_end(
        [part[expert_M, :, unit_M] if name == "down_EDI" else part[expert_M, unit_M] for name, part in parts.items()]
    )


def as_tensors(experts: Experts, unit_IF: Tensor) -> dict[str, Tensor]:
    """The tensors of one expert that has these units, by canonical name; what belongs to no unit is left out."""
    parts = _unit_tensors(experts)
    D = experts.gate_EID.shape[2]
    sizes = [1 if "bias" in name else D for name in parts]
    columns = dict(zip(parts, unit_IF.split(sizes, dim=1), strict=True))
    shaped = {name: part.T if name == "down_EDI" else part for name, part in columns.items()}
    return {name: part.reshape(parts[name].shape[1:]).to(parts[name].dtype) for name, part in shaped.items()}


@torch.no_grad()
def matching_units(experts: Experts, source_S: Tensor, target_K: Tensor, threshold: float, seed: int) -> Moves:
    """Each unit of ``source_S`` whose most similar unit in ``target_K`` has a cosine above ``threshold``.

    Where ``F`` is large, the most similar unit is one of the ``CANDIDATES`` that are most similar in random projections
    (a cosine ``c`` is off by some ``(1 - c^2) / 16`` there); the cosines that decide are the true ones.

    Cost: ``2 S K I^2`` times ``PROJECTIONS``, in float32; holds the projections of all targets.
    """
    width, F = unit_vectors(experts, 0).shape
    directions_FP = _directions(F, seed).to(experts.gate_EID.device) if F > PROJECTIONS else None
    target_K = target_K.to(experts.gate_EID.device)
    target_TP = torch.cat([_projected(experts, expert, directions_FP) for expert in target_K.tolist()])
    lowest = threshold if directions_FP is None else threshold - MARGIN
    rows = max(1, BLOCK_BYTES // (4 * target_TP.shape[0]))
    found = [torch.empty(0, 3, dtype=torch.int64)]
    for source in source_S.tolist():
        source_IP = _projected(experts, source, directions_FP)
        for first, part_cP in zip(range(0, width, rows), source_IP.split(rows), strict=True):
            cosine_cT = part_cP @ target_TP.T
            row_M = (cosine_cT.amax(dim=1) > lowest).nonzero().flatten()
            place_MC = cosine_cT[row_M].topk(min(CANDIDATES, cosine_cT.shape[1])).indices.sort(dim=1).values
            source_M, unit_M = torch.full_like(row_M, source), first + row_M
            cosine_MC = _cosines(experts, (source_M, unit_M), (target_K[place_MC // width], place_MC % width))
            best_M1 = cosine_MC.argmax(dim=1, keepdim=True)
            target_M = target_K[place_MC.gather(1, best_M1).squeeze(1) // width]
            close_M = cosine_MC.gather(1, best_M1).squeeze(1) > threshold
            found.append(torch.stack([source_M, unit_M, target_M], dim=1)[close_M].cpu())
    return Moves(*torch.cat(found).unbind(dim=1))


@torch.no_grad()
def absorb(
    own_IF: Tensor, guest_MF: Tensor, own_weight: float, weight_M: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Merge guests into an expert's units, of which there stay ``I``: weighted spherical k-means around them.

    Each cluster starts at one own unit and never loses it: two own units in one cluster would have to be added, not
    averaged, for the expert to go on doing what it did. Guests join the centre of highest cosine; a centre is the
    direction of the weighted mean of its members' directions. A merged unit is the weighted mean of the members
    themselves; without guests, or weights, it is the own unit, bit for bit.

    Returns:
        the merged units, and the share of each guest in the one that it became part of.
    """
    direction_IF, direction_MF = normalize(own_IF, eps=TINY), normalize(guest_MF, eps=TINY)
    weight_M = weight_M.to(own_IF)
    cluster_M = (direction_MF @ direction_IF.T).argmax(dim=1)
    for _ in range(iterations):
        centre_IF = add_at(own_weight * direction_IF, 0, cluster_M, weight_M.unsqueeze(1) * direction_MF)
        moved_M = (direction_MF @ normalize(centre_IF, eps=TINY).T).argmax(dim=1)
        if torch.equal(moved_M, cluster_M):
            break
        cluster_M = moved_M
    guests_I = add_at(torch.zeros_like(own_IF[:, 0]), 0, cluster_M, weight_M)
    total_I = own_weight + guests_I
    share_M = torch.where(total_I[cluster_M] > 0, weight_M / total_I[cluster_M], 0.0)
    left_I = 1.0 - add_at(torch.zeros_like(total_I), 0, cluster_M, share_M)
    merged_IF = add_at(left_I.unsqueeze(1) * own_IF, 0, cluster_M, share_M.unsqueeze(1) * guest_MF)
    return merged_IF, share_M


def _directions(F: int, seed: int) -> Tensor:
    return torch.randn(F, PROJECTIONS, generator=torch.Generator().manual_seed(seed))


def _projected(experts: Experts, expert: int, directions_FP: Tensor | None) -> Tensor:
    unit_IF = unit_vectors(experts, expert)
    return normalize(unit_IF if directions_FP is None else unit_IF @ directions_FP.to(unit_IF.dtype), eps=TINY)


def _cosines(experts: Experts, mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> Tensor:
    """``[M, C]``: one unit (expert, row) of each ``M`` against its ``C`` candidates."""
    one_MF = normalize(moved_vectors(experts, *mine), eps=TINY)
    other_NF = normalize(moved_vectors(experts, theirs[0].flatten(), theirs[1].flatten()), eps=TINY)
    cosine_MC: Tensor = torch.linalg.vecdot(one_MF.unsqueeze(1), other_NF.unflatten(0, theirs[0].shape))
    return cosine_MC


def _unit_tensors(experts: Experts) -> dict[str, Tensor]:
    """All but the bias of down, which belongs to no unit."""
    return {name: tensor for name, tensor in tensors(experts).items() if name != "down_bias_ED"}


def _end_to_end(parts: list[Tensor]) -> Tensor:
    vectors_MF = torch.cat([part if part.ndim == 2 else part.unsqueeze(1) for part in parts], dim=1)
    return vectors_MF.to(torch.promote_types(vectors_MF.dtype, torch.float32))
