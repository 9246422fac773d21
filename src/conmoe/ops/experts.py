"""Experts as tensors: run one, take some, join several, mix them.

``E`` experts, ``K`` prototypes, ``n`` tokens, ``D`` hidden size, ``I`` intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from conmoe.types import EXPERT_TENSORS, Experts, Reroute


def expert_output(experts: Experts, expert: int, x_nD: Tensor) -> Tensor:
    """``y_nD = down(activate(gate(x), up(x)))`` of one expert before its gate, in the experts' own dtype."""
    hidden_nI = expert_hidden(experts, expert, x_nD)
    return linear(hidden_nI, experts.down_EDI[expert], _row(experts.down_bias_ED, expert))


def expert_hidden(experts: Experts, expert: int, x_nD: Tensor) -> Tensor:
    """``h_nI = activate(gate(x), up(x))``: what the down projection of one expert gets, in the experts' own dtype."""
    x_nD = x_nD.to(experts.gate_EID.dtype)
    gate_nI = linear(x_nD, experts.gate_EID[expert], _row(experts.gate_bias_EI, expert))
    up_nI = linear(x_nD, experts.up_EID[expert], _row(experts.up_bias_EI, expert))
    return experts.activate(gate_nI, up_nI)


def tensors(experts: Experts) -> dict[str, Tensor]:
    """The tensors these experts have, by canonical name, in canonical order."""
    named = {name: getattr(experts, name) for name in EXPERT_TENSORS}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def select(experts: Experts, index_E: Tensor) -> Experts:
    """The experts ``index_E``, in that order; a run of neighbours is a view, anything else a copy."""
    selected: dict[str, Any] = {name: rows(tensor, index_E) for name, tensor in tensors(experts).items()}
    reroute = (
        None if experts.reroute is None else partial(_reroute_part, experts.reroute, experts.gate_EID.shape[0], index_E)
    )
    router_ED = None if experts.router_ED is None else rows(experts.router_ED, index_E)
    return replace(experts, **selected, reroute=reroute, router_ED=router_ED)


def concatenate(parts: Sequence[Experts]) -> Experts:
    """The experts of several layers of one model in one row; they share the activation of the first."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {name: torch.cat([tensors(part)[name] for part in parts]) for name in tensors(parts[0])}
    return replace(parts[0], **joined, reroute=None, router_ED=None)


def mix(tensor_E: Tensor, mixing_KE: Tensor, *, rounded: bool = True) -> Tensor:
    """``mixing_KE @ tensor_E`` along the expert axis; a one-hot row is copied bit for bit.

    Args:
        tensor_E: one tensor of all experts.
        mixing_KE: the recipe of each prototype.
        rounded: give the sums in the dtype of the experts; otherwise everything in the precision of the sums.
    """
    mixed = []
    for recipe_E in mixing_KE:
        members = recipe_E.nonzero().flatten().tolist()
        mixed.append(mixture([tensor_E[member] for member in members], recipe_E[members].tolist(), rounded=rounded))
    return torch.stack(mixed)


def mixture(members: Sequence[Tensor], shares: Sequence[float], *, rounded: bool = True) -> Tensor:
    """The weighted sum of ``members``, in float32 or better and cast once; a single one with share 1 is itself."""
    precision = torch.promote_types(members[0].dtype, torch.float32)
    if list(shares) == [1.0]:
        return members[0] if rounded else members[0].to(precision)
    total = torch.zeros_like(members[0], dtype=precision)
    for member, share in zip(members, shares, strict=True):
        total.add_(member.to(precision), alpha=share)
    return total.to(members[0].dtype) if rounded else total


def rows(tensor: Tensor, index: Tensor, axis: int = 0) -> Tensor:
    """``tensor`` at ``index`` along ``axis``, without a copy where the index counts up by ones."""
    first, length = (int(index[0]), index.numel()) if index.numel() else (0, 0)
    if torch.equal(index, torch.arange(first, first + length, device=index.device)):
        return tensor.narrow(axis, first, length)
    return tensor.index_select(axis, index.to(tensor.device))


def _reroute_part(
    reroute: Reroute,
    E: int,
    index_E: Tensor,
    hidden_nD: Tensor,
    kept_K: Tensor,
    router_KD: Tensor | None = None,
    /,
) -> tuple[Tensor, Tensor]:
    """Routing among a part of the experts of a layer: all those outside the part stay, and are -1."""
    position_E = torch.full((E + 1,), -1, dtype=torch.int64)
    position_E[index_E] = torch.arange(index_E.numel())
    outside = torch.ones(E, dtype=torch.bool)
    outside[index_E] = False
    assert router_KD is None  # refinement looks at whole layers
    kept = torch.cat([outside.nonzero().flatten(), index_E[kept_K.cpu()]]).sort().values
    index_nk, weight_nk = reroute(hidden_nD, kept)
    return position_E.to(index_nk.device)[index_nk.long()], weight_nk


def _row(tensor: Tensor | None, index: int) -> Tensor | None:
    return None if tensor is None else tensor[index]
