"""Which experts to keep so that the layer's own output changes least: a search over sets of experts.

The searches know nothing but ``loss(kept)`` of ascending tuples of experts. All sets are tried where they are few;
otherwise experts are removed one by one, and then exchanged for as long as that helps. Ties keep the lowest indices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from heapq import heappop, heappush
from itertools import combinations
from math import comb, inf, isfinite

import numpy as np
import torch
from torch import Tensor

from conmoe.ops.experts import expert_output
from conmoe.types import ConmoeError, Experts, TokenSample

Kept = tuple[int, ...]
Loss = Callable[[Kept], float]
#: ``(hidden_nD, kept_K) -> (index_nk, weight_nk)``, as :attr:`conmoe.types.Experts.reroute`.
Reroute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

#: Bytes of expert outputs held at a time: every block of tokens reads the weights of all experts once.
BLOCK_BYTES = 512 * 2**20
#: A lower relative loss is what is left of terms that cancel.
ROUNDING = 1e-12
#: An exchange must lower the loss by this share, so that rounding cannot make it cycle.
IMPROVEMENT = 1e-9


@torch.no_grad()
def routed_loss(sample: TokenSample, experts: Experts, reroute: Reroute) -> Loss:
    """``kept -> ||F(x) - F_kept(x)||^2 / ||F(x)||^2`` over all tokens of the sample, in float64.

    ``F`` is what the routed experts add to the layer with the routing observed, ``F_kept`` with the one that
    ``reroute`` gives; where ``F`` is zero the loss is not relative. Slots of experts that are not among ``experts``
    count as nothing on both sides. NAEE (arXiv 2402.14800) takes the root, the Frobenius norm: the same order.

    Cost: every expert runs once on every token; then ``n E^2 D`` for inner products of outputs, which are all that is
    held, ``8 n E^2`` bytes. One loss costs a call of ``reroute`` and ``n k^2`` look-ups.
    """
    hidden_nD = sample.hidden_nD.to(experts.gate_EID.device)
    gram_nEE = _output_grams(experts, hidden_nD)
    n, E, _ = gram_nEE.shape
    row_n1 = torch.arange(n, device=hidden_nD.device).unsqueeze(1)

    slot_nk, gate_nk = _inside(sample.index_nk.to(hidden_nD.device), sample.weight_nk.to(hidden_nD.device))
    gates_nE = gate_nk.new_zeros(n, E).scatter_add_(1, slot_nk, gate_nk)
    cross_nE = (gram_nEE @ gates_nE.unsqueeze(2)).squeeze(2)
    energy = float((gates_nE * cross_nE).sum())

    def loss(kept: Kept) -> float:
        slot_nk, gate_nk = _inside(*reroute(hidden_nD, torch.tensor(kept)))
        new_nkk = gram_nEE[row_n1.unsqueeze(2), slot_nk.unsqueeze(2), slot_nk.unsqueeze(1)]
        ours = torch.einsum("nk,nkj,nj->", gate_nk, new_nkk, gate_nk)
        error = energy - 2 * (gate_nk * cross_nE[row_n1, slot_nk]).sum() + ours
        if not isfinite(float(error)):
            raise ConmoeError(f"With {len(kept)} experts left the router gives gates that are not finite; keep more.")
        relative = float(error) / (energy or 1.0)
        return relative if relative > ROUNDING else 0.0

    return loss


def fewest_changes(loss: Loss, E: int, keep: int, limit: int, least: int = 1) -> Kept:
    """``keep`` of ``E`` experts: the set of lowest loss if there are at most ``limit`` sets; otherwise one that none of
    the ``limit`` exchanges that promise most improves. Sets of fewer experts than ``least`` are never asked about.
    """
    if comb(E, keep) <= limit:
        return exhaustive(loss, E, keep)
    known = cache(loss)
    return exchange(known, remove_greedily(known, E, keep), E, limit, least)


def exhaustive(loss: Loss, E: int, keep: int) -> Kept:
    """The set of lowest loss of all, by trying all."""
    return min(combinations(range(E), keep), key=loss)


def remove_greedily(loss: Loss, E: int, keep: int) -> Kept:
    """Remove, one after the other, the expert without which the loss is lowest.

    Lazily: what removing an expert cost when more of them were left stands until it makes that expert the cheapest, and
    is then worked out anew. The same choices wherever a removal costs the more the fewer are left, at a few losses a
    step in place of one for every expert.
    """
    kept = tuple(range(E))
    current = loss(kept)
    queue = [(-inf, -expert, 0) for expert in reversed(kept)]  # by rise, then highest index; how many were left then
    while len(kept) > keep:
        rise, minus, left = heappop(queue)
        if left == len(kept):
            kept, current = _without(kept, -minus), current + rise
        else:
            heappush(queue, (loss(_without(kept, -minus)) - current, minus, len(kept)))
    return kept


def exchange(loss: Loss, kept: Kept, E: int, tries: int, least: int = 1) -> Kept:
    """Exchange a kept and a dropped expert for as long as that lowers the loss.

    Exchanges are tried in the order of the loss without the one (where ``least`` experts remain) plus the loss with the
    other, ``tries`` at most between two that help; with ``tries >= K (E - K)`` the result is a local optimum.
    """
    while True:
        others = [expert for expert in range(E) if expert not in kept]
        lost_K = np.array([loss(_without(kept, expert)) if len(kept) > least else 0.0 for expert in kept])
        won_C = np.array([loss(_with(kept, expert)) for expert in others])
        promising = (lost_K[:, None] + won_C[None, :]).ravel().argsort(kind="stable")[:tries]
        bound = loss(kept) * (1 - IMPROVEMENT)
        for out, into in zip(*np.unravel_index(promising, (len(kept), max(len(others), 1))), strict=True):
            changed = _with(_without(kept, kept[out]), others[into])
            if loss(changed) < bound:
                kept = changed
                break
        else:
            return kept


def _output_grams(experts: Experts, hidden_nD: Tensor) -> Tensor:
    """``gram_nEE``: the inner products of the outputs of every two experts for each token, in float64."""
    n, (E, _, D) = hidden_nD.shape[0], experts.gate_EID.shape
    gram_nEE = torch.empty(n, E, E, dtype=torch.float64, device=hidden_nD.device)
    step = max(1, BLOCK_BYTES // (4 * E * D))
    for start in range(0, n, step):
        x_cD = hidden_nD[start : start + step]
        y_cED = torch.empty(x_cD.shape[0], E, D, dtype=torch.promote_types(experts.gate_EID.dtype, torch.float32))
        y_cED = y_cED.to(hidden_nD.device)
        for expert in range(E):
            y_cED[:, expert] = expert_output(experts, expert, x_cD)
        for token, y_ED in enumerate(y_cED, start):
            wide_ED = y_ED.double()
            gram_nEE[token] = wide_ED @ wide_ED.T
    return gram_nEE


def _inside(index_nk: Tensor, weight_nk: Tensor) -> tuple[Tensor, Tensor]:
    """Slots and their gates, where those of experts outside the set have a gate of zero."""
    return index_nk.long().clamp_min(0), weight_nk.double() * (index_nk >= 0)


def _without(kept: Kept, expert: int) -> Kept:
    return tuple(other for other in kept if other != expert)


def _with(kept: Kept, expert: int) -> Kept:
    return tuple(sorted((*kept, expert)))
