"""Choose prototypes that cover all experts: weighted facility location, also known as k-medoids.

Minimise ``J(P) = sum_i weight_i * min over p in P of cost_ip`` over sets ``P`` of ``keep`` experts; ``cost_ij`` is the
directed cost of letting ``j`` answer for ``i``. Greedy addition, then the best single swap until none improves
(FastPAM, Schubert and Rousseeuw 2019: with the nearest and second nearest prototype of every expert at hand, all
``K * (E - K)`` swaps are valued in ``O(E^2)``). Every tie goes to the lowest index. In a scope, ``min_own``
prototypes at least come from each layer ``owner_E``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, eye_array, hstack, kron, vstack
from torch import Tensor

from conmoe.ops.scores import check_min_own

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

#: A swap must improve the objective by this share, so that rounding cannot make it cycle.
IMPROVEMENT = 1e-12


def cover(cost_EE: Tensor, weight_E: Tensor, keep: int, owner_E: Tensor | None = None, min_own: int = 0) -> Tensor:
    """A locally optimal set of ``keep`` prototypes, ascending. ``O(K E^2)`` and a few ``E^2`` per swap."""
    weighted_EE, owner = _prepare(cost_EE, weight_E, keep, owner_E, min_own)
    kept_K = swap(weighted_EE, greedy(weighted_EE, keep, owner, min_own), owner, min_own)
    return torch.from_numpy(kept_K)


def cover_exactly(
    cost_EE: Tensor, weight_E: Tensor, keep: int, owner_E: Tensor | None = None, min_own: int = 0
) -> Tensor:
    """An optimal set by mixed-integer programming; for small ``E`` only."""
    weighted_EE, owner = _prepare(cost_EE, weight_E, keep, owner_E, min_own)
    E = weighted_EE.shape[0]
    # variables: x_ij (i answered for by j), row by row, then y_j (j is kept); x may be fractional, y makes it whole
    once = hstack([kron(eye_array(E), np.ones((1, E))), coo_array((E, E))])
    open_only = hstack([eye_array(E * E), -kron(np.ones((E, 1)), eye_array(E))])
    own = (owner[None, :] == np.unique(owner)[:, None]).astype(np.float64)
    counts = hstack([coo_array((own.shape[0] + 1, E * E)), np.vstack([np.ones((1, E)), own])])
    result: Any = milp(
        np.concatenate([weighted_EE.ravel(), np.zeros(E)]),
        integrality=np.concatenate([np.zeros(E * E), np.ones(E)]),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(
            vstack([once, open_only, counts]),
            np.concatenate([np.ones(E), np.full(E * E, -np.inf), [keep], np.full(own.shape[0], min_own)]),
            np.concatenate([np.ones(E), np.zeros(E * E), [keep], np.full(own.shape[0], np.inf)]),
        ),
    )
    return torch.from_numpy(np.flatnonzero(result.x[E * E :] > 0.5))


def objective(cost_EE: Tensor, weight_E: Tensor, kept_K: Tensor) -> float:
    """``J(kept_K)``."""
    return float((weight_E.double() * cost_EE.double()[:, kept_K].amin(dim=1)).sum())


def nearest(cost_EE: Tensor, kept_K: Tensor) -> Tensor:
    """``assignment_E``: for each expert the position in ``kept_K`` of its cheapest prototype; a kept one is its own."""
    kept_K = kept_K.sort().values
    assignment_E = torch.from_numpy(cost_EE[:, kept_K].cpu().numpy().argmin(axis=1))
    assignment_E[kept_K] = torch.arange(kept_K.numel())
    return assignment_E


def greedy(weighted_EE: Array, keep: int, owner_E: Indices, min_own: int) -> Indices:
    """Add, ``keep`` times, the expert that lowers the objective most."""
    E = weighted_EE.shape[0]
    best_E, missing_W = np.full(E, np.inf), np.full(int(owner_E.max()) + 1, min_own)
    missing_W[np.bincount(owner_E) == 0] = 0
    free_E = np.ones(E, dtype=bool)
    for step in range(keep):
        must_serve = missing_W.sum() >= keep - step
        allowed_E = free_E & (missing_W[owner_E] > 0) if must_serve else free_E
        value_E = np.minimum(weighted_EE, best_E[:, None]).sum(axis=0)
        chosen = int(np.where(allowed_E, value_E, np.inf).argmin())
        free_E[chosen] = False
        missing_W[owner_E[chosen]] = max(missing_W[owner_E[chosen]] - 1, 0)
        best_E = np.minimum(best_E, weighted_EE[:, chosen])
    return np.flatnonzero(~free_E)


def swap(weighted_EE: Array, kept_K: Indices, owner_E: Indices, min_own: int) -> Indices:
    """Exchange one kept and one other expert for as long as that lowers the objective; the best exchange first."""
    while kept_K.size < weighted_EE.shape[0]:
        other_C = np.setdiff1d(np.arange(weighted_EE.shape[0]), kept_K)
        change_KC = _swap_changes(weighted_EE, kept_K, other_C)
        scarce_K = np.bincount(owner_E[kept_K])[owner_E[kept_K]] <= min_own
        change_KC[scarce_K[:, None] & (owner_E[kept_K][:, None] != owner_E[other_C])] = np.inf
        out, into = np.unravel_index(int(change_KC.argmin()), change_KC.shape)
        if change_KC[out, into] >= -IMPROVEMENT * weighted_EE[:, kept_K].min(axis=1).sum():
            return kept_K
        kept_K = np.sort(np.append(np.delete(kept_K, out), other_C[into]))
    return kept_K


def _swap_changes(weighted_EE: Array, kept_K: Indices, other_C: Indices) -> Array:
    """``change_KC``: by how much the objective changes if prototype ``k`` makes way for expert ``c``."""
    to_kept_EK = weighted_EE[:, kept_K]
    nearest_E = to_kept_EK.argmin(axis=1)
    rows_E = np.arange(nearest_E.size)
    first_E = to_kept_EK[rows_E, nearest_E].copy()
    to_kept_EK[rows_E, nearest_E] = np.inf
    second_E = to_kept_EK.min(axis=1)
    to_other_EC = weighted_EE[:, other_C]
    with_first_EC = np.minimum(to_other_EC, first_E[:, None])
    added_C = (with_first_EC - first_E[:, None]).sum(axis=0)
    bereft_EC = np.minimum(to_other_EC, second_E[:, None]) - with_first_EC
    change_KC = np.tile(added_C, (kept_K.size, 1))
    order_E = np.argsort(nearest_E, kind="stable")
    served, starts = np.unique(nearest_E[order_E], return_index=True)
    change_KC[served] += np.add.reduceat(bereft_EC[order_E], starts, axis=0)
    return change_KC


def _prepare(
    cost_EE: Tensor, weight_E: Tensor, keep: int, owner_E: Tensor | None, min_own: int
) -> tuple[Array, Indices]:
    owner_E = torch.zeros(weight_E.numel(), dtype=torch.int64) if owner_E is None else owner_E.cpu()
    check_min_own(owner_E, keep, min_own)
    return (weight_E.cpu().double().unsqueeze(1) * cost_EE.cpu().double()).numpy(), owner_E.numpy()
