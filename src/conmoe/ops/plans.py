"""Make layer plans, and put plans of parts of a layer together.

Prototypes are always in the order of the lowest source expert in their recipe, so equal decisions are equal plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conmoe.ops import fusion
from conmoe.ops.experts import mix, tensors
from conmoe.ops.factors import Factors, concatenate, exact, from_weights, take, to_weights
from conmoe.types import ConmoeError, Experts, LayerPlan

DROPPED = -1


def identity(E: int) -> LayerPlan:
    """Every expert answers for itself."""
    return replace(prune(torch.arange(E), E), predicted_error=0.0)


def prune(kept_K: Tensor, E: int) -> LayerPlan:
    """Keep ``kept_K``; the router may not choose any other expert."""
    assignment_E = torch.full((E,), DROPPED, dtype=torch.int64)
    kept_K = kept_K.sort().values
    assignment_E[kept_K] = torch.arange(kept_K.numel())
    return remap(kept_K, assignment_E)


def remap(kept_K: Tensor, assignment_E: Tensor) -> LayerPlan:
    """Keep ``kept_K`` unchanged; expert ``e`` is answered for by ``kept_K[assignment_E[e]]``."""
    mixing_KE = torch.zeros(kept_K.numel(), assignment_E.numel(), dtype=torch.float64)
    mixing_KE[torch.arange(kept_K.numel()), kept_K] = 1.0
    return compose(assignment_E, mixing_KE)


def merge(assignment_E: Tensor, weight_E: Tensor) -> LayerPlan:
    """Prototype ``c`` is the mean of the experts with ``assignment_E == c``, weighted by ``weight_E``."""
    return compose(assignment_E, fusion.average(assignment_E, weight_E))


def compose(assignment_E: Tensor, mixing_KE: Tensor) -> LayerPlan:
    """The plan of an assignment and its recipes, with gains of one and prototypes in canonical order."""
    return _ordered(LayerPlan(assignment_E, mixing_KE, torch.ones(assignment_E.numel(), dtype=torch.float64)))


def condense(kept_K: Tensor, gate_K: Tensor, E: int) -> LayerPlan:
    """Without a router: the experts ``kept_K``, in ascending order and perhaps none, answer with ``gate_K``."""
    mixing_KE = torch.zeros(kept_K.numel(), E, dtype=torch.float64)
    mixing_KE[torch.arange(kept_K.numel()), kept_K] = 1.0
    dropped_E = torch.full((E,), DROPPED, dtype=torch.int64)
    return LayerPlan(dropped_E, mixing_KE, torch.ones(E, dtype=torch.float64), static_K=gate_K.float())


def embed(
    plans: Sequence[LayerPlan],
    subsets: Sequence[Tensor],
    E: int,
    *,
    energy_E: Tensor | None = None,
    experts: Experts | None = None,
) -> LayerPlan:
    """One plan of ``E`` experts from plans of disjoint subsets of them (protected experts, router groups).

    ``subsets[s][i]`` is the expert that ``plans[s]`` knows as ``i``. Predicted errors are averaged by the share of
    ``energy_E`` (the sum of g^2 ||E||^2 over tokens) in each subset. ``experts`` are read only where one plan brings
    new weights and another does not. Beside factored matrices (:mod:`conmoe.ops.factors`), others are kept whole.
    """
    if not torch.equal(torch.cat(list(subsets)).sort().values, torch.arange(E)):
        raise ConmoeError(f"The parts of a layer do not name each of its {E} experts exactly once; this is a bug.")
    if any(plan.static_K is not None for plan in plans):
        raise ConmoeError("A layer is condensed as a whole, not in parts; this is a bug.")
    assignment_E, gain_E = torch.empty(E, dtype=torch.int64), torch.empty(E, dtype=torch.float64)
    mixing_KE = torch.zeros(sum(plan.mixing_KE.shape[0] for plan in plans), E, dtype=torch.float64)
    first, constants = 0, mixing_KE.shape[0]
    for plan, subset in zip(plans, subsets, strict=True):
        K, last = plan.mixing_KE.shape[0], first + plan.mixing_KE.shape[0]
        place_E = torch.where(plan.assignment_E < K, plan.assignment_E + first, plan.assignment_E - K + constants)
        assignment_E[subset] = torch.where(plan.assignment_E < 0, DROPPED, place_E)
        constants += 0 if plan.constant_CD is None else plan.constant_CD.shape[0]
        gain_E[subset] = plan.gain_E.double()
        mixing_KE[first:last, subset] = plan.mixing_KE.double()
        first = last
    joined = LayerPlan(
        assignment_E,
        mixing_KE,
        gain_E,
        _join_weights(plans, subsets, experts),
        _join_errors(plans, subsets, energy_E),
        _join_scores(plans, subsets, E),
        torch.cat(constant) if (constant := [p.constant_CD for p in plans if p.constant_CD is not None]) else None,
        skip=max(plan.skip for plan in plans),
    )
    return _ordered(joined)


def _ordered(plan: LayerPlan) -> LayerPlan:
    order_K = (plan.mixing_KE != 0).to(torch.int8).argmax(dim=1).argsort(stable=True)
    K, rank_K = order_K.numel(), order_K.argsort()
    if K == 0:
        return plan
    ranked_E = rank_K[plan.assignment_E.clamp(0, K - 1)]
    assignment_E = torch.where((plan.assignment_E >= 0) & (plan.assignment_E < K), ranked_E, plan.assignment_E)
    weights = _take_weights(plan.weights, order_K)
    return replace(plan, assignment_E=assignment_E, mixing_KE=plan.mixing_KE[order_K], weights=weights)


def _take_weights(weights: Mapping[str, Tensor], order_K: Tensor) -> dict[str, Tensor]:
    factors, dense = from_weights(weights)
    taken = {name: tensor[order_K.to(tensor.device)] for name, tensor in dense.items()}
    return taken | to_weights({name: take(item, order_K) for name, item in factors.items()})


def _join_weights(plans: Sequence[LayerPlan], subsets: Sequence[Tensor], experts: Experts | None) -> dict[str, Tensor]:
    found = [from_weights(plan.weights) for plan in plans]
    names = sorted({name for factors, dense in found for name in (*factors, *dense)})
    if experts is None and any(name not in factors and name not in dense for factors, dense in found for name in names):
        raise ConmoeError("A plan with new weights can only join one without them if the experts are at hand.")
    source = {} if experts is None else tensors(experts)
    joined: dict[str, Tensor] = {}
    for name in names:
        parts: list[Factors | Tensor] = []
        for (factors, dense), plan, subset in zip(found, plans, subsets, strict=True):
            if name in factors or name in dense:
                parts.append(factors[name] if name in factors else dense[name])
            else:
                parts.append(mix(source[name][subset], plan.mixing_KE).cpu())
        joined |= _join_parts(name, parts)
    return joined


def _join_parts(name: str, parts: Sequence[Factors | Tensor]) -> dict[str, Tensor]:
    """One tensor of all parts: factored if any part is, the others then exactly, with all their rows or columns."""
    structures = [part.structure for part in parts if isinstance(part, Factors)]
    if not structures:
        return {name: torch.cat([part for part in parts if isinstance(part, Tensor)])}
    factors = [part if isinstance(part, Factors) else exact(part, structures[0]) for part in parts]
    return to_weights({name: concatenate(factors)})


def _join_errors(plans: Sequence[LayerPlan], subsets: Sequence[Tensor], energy_E: Tensor | None) -> float:
    masses = [subset.numel() if energy_E is None else float(energy_E[subset].sum()) for subset in subsets]
    total = sum(masses)
    if total <= 0:
        return 0.0
    return sum(mass / total * plan.predicted_error for mass, plan in zip(masses, plans, strict=True))


def _join_scores(plans: Sequence[LayerPlan], subsets: Sequence[Tensor], E: int) -> dict[str, Tensor]:
    scores: dict[str, Tensor] = {}
    for plan, subset in zip(plans, subsets, strict=True):
        for name, score in plan.scores.items():
            scores.setdefault(name, torch.full((E,), torch.nan, dtype=torch.float64))[subset] = score.double()
    return scores
