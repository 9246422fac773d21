"""Recipes that average the members of a cluster."""

from __future__ import annotations

import torch
from torch import Tensor


def average(assignment_E: Tensor, weight_E: Tensor) -> Tensor:
    """``mixing_KE``: row ``c`` holds ``weight_e / sum of weights`` for the members ``e`` of cluster ``c``.

    M-SMoE (arXiv 2310.01334, section 3.2). A cluster whose weights sum to zero is averaged evenly; experts with
    ``assignment_E`` of -1 are in no cluster. A single member gets exactly 1.
    """
    member_KE = assignment_E == torch.arange(int(assignment_E.max()) + 1).unsqueeze(1)
    weight_KE = member_KE * weight_E.to("cpu", torch.float64)
    empty_K = weight_KE.sum(dim=1) == 0
    weight_KE[empty_K] = member_KE[empty_K].double()
    return weight_KE / weight_KE.sum(dim=1, keepdim=True)


def average_own(kept_K: Tensor, assignment_E: Tensor, weight_E: Tensor, owner_E: Tensor) -> Tensor:
    """``mixing_KE`` over the members that live in the layer of their prototype ``kept_K[c]``.

    Members of another layer of a scope are answered for, but not mixed in: their weights were trained behind another
    layer's norm.
    """
    same_E = owner_E == owner_E[kept_K][assignment_E]
    return average(torch.where(same_E, assignment_E, -1), weight_E)
