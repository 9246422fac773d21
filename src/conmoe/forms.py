"""The three forms of a result: which experts are stored, which router rows stay, and what a form cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from conmoe.moe import MoeLayer
from conmoe.ops.factors import from_weights
from conmoe.registry import Form
from conmoe.types import LayerPlan, Plan, ScopePlan, UsageError


@dataclass(frozen=True, slots=True)
class Stored:
    """The ``S`` experts that a layer of the result stores, and the router rows it keeps."""

    plan: LayerPlan | None
    prototype_S: Tensor
    scale_S: Tensor  # multiplies the down projection, where the form has no place for gains
    rows: Tensor | None  # logical experts whose router rows stay; None: all of them, untouched
    owner: bool  # whether the experts are stored with this layer (else with the first of its scope)

    def origin(self, slot: int) -> int | None:
        """The source expert of which ``slot`` is an exact copy, or None if it has to be computed."""
        if self.plan is None:
            return slot
        recipe = self.plan.mixing_KE[self.prototype_S[slot]]
        expert = int(recipe.argmax())
        exact = recipe[expert] == 1 and int((recipe != 0).sum()) == 1 and not self.plan.weights
        return expert if exact and self.scale_S[slot] == 1 else None


def stored_experts(layer: MoeLayer, scope: ScopePlan | None, form: Form) -> Stored:
    """What the result stores for one layer; an unplanned layer stays as it is."""
    if scope is None:
        everyone = torch.arange(layer.logical)
        return Stored(None, everyone, torch.ones(layer.logical), None, True)
    plan = scope.plan
    K = plan.mixing_KE.shape[0]
    if form == "expanded":
        mine = own_part(scope, layer, plan.assignment_E), own_part(scope, layer, plan.gain_E)
        return Stored(plan, *mine, None, True)
    if form == "sliced" and not is_condensed(scope):
        rows = representatives(plan)
        return Stored(plan, torch.arange(K), plan.gain_E[rows], rows, True)
    assignment_E = own_part(scope, layer, plan.assignment_E)
    cut = bool((assignment_E < 0).any()) and not is_condensed(scope)
    rows_left = (assignment_E >= 0).nonzero().flatten() if cut else None
    return Stored(plan, torch.arange(K), torch.ones(K), rows_left, layer.index == scope.layers[0])


def own_part(scope: ScopePlan, layer: MoeLayer, value_E: Tensor) -> Tensor:
    """Of what a scope's plan says of all its logical experts, the part of one layer."""
    position = scope.layers.index(layer.index)
    return value_E[position * layer.logical : (position + 1) * layer.logical]


def is_condensed(scope: ScopePlan | None) -> bool:
    """Whether the layers of this scope lose their router."""
    return scope is not None and scope.plan.static_K is not None


def departures(layer: MoeLayer, scope: ScopePlan | None) -> dict[str, Any]:
    """What a ``shared`` checkpoint's configuration has to say of a layer, beside its pool."""
    if scope is None:
        return {}
    plan = scope.plan
    if plan.static_K is not None:
        return {"static": plan.static_K.numel()}
    found: dict[str, Any] = {}
    left = int((own_part(scope, layer, plan.assignment_E) >= 0).sum())
    if left < layer.logical:
        found["rows"] = left
    if plan.constant_CD is not None:
        found["constants"] = plan.constant_CD.shape[0]
    if plan.skip:
        found["skip"] = True
    factors = from_weights(plan.weights)[0]
    if factors:
        found["factors"] = {
            name.partition("_")[0]: {
                "rank": item.left_KOr.shape[2],
                "kept": item.index_S.numel(),
                "structure": item.structure,
            }
            for name, item in factors.items()
        }
    return found


def representatives(plan: LayerPlan) -> Tensor:
    """The logical expert whose router row speaks for each prototype: of those it answers for, its largest part."""
    K = plan.mixing_KE.shape[0]
    answers_KE = plan.assignment_E[None, :] == torch.arange(K)[:, None]
    if not bool(answers_KE.any(dim=1).all()):
        raise UsageError("A prototype answers for no expert; the plan cannot be stored sliced.")
    return plan.mixing_KE.masked_fill(~answers_KE, float("-inf")).argmax(dim=1)


def without_map(plan: LayerPlan, rows: Tensor | None = None) -> LayerPlan:
    """What the sliced form makes of a plan: all experts but ``rows``, by default the representatives, are dropped."""
    rows = representatives(plan) if rows is None else rows
    assignment_E = torch.full_like(plan.assignment_E, -1)
    assignment_E[rows] = torch.arange(rows.numel())
    router_KD = None if plan.router_KD is None else plan.router_KD[assignment_E[plan.assignment_E >= 0] >= 0]
    return replace(plan, assignment_E=assignment_E, constant_CD=None, skip=0.0, router_KD=router_KD)


def is_approximate(plan: Plan, form: Form) -> bool:
    """Whether storing ``plan`` in this form changes what it says: a map is lost when router rows are cut."""
    return form == "sliced" and any(
        bool((scope.plan.assignment_E >= 0).sum() > scope.plan.mixing_KE.shape[0]) or scope.plan.skip > 0
        for scope in plan.scopes
    )


def check_form(layers: Sequence[MoeLayer], plan: Plan, form: Form) -> None:
    """Raise a UsageError, in one sentence, if ``form`` cannot hold ``plan``."""
    by_index = {layer.index: layer for layer in layers}
    if form == "shared":
        for scope in plan.scopes:
            for layer in (by_index[index] for index in scope.layers):
                if len(scope.layers) > 1 and from_weights(scope.plan.weights)[0]:
                    raise UsageError("Layers that share a pool of prototypes cannot store them as factors.")
                rows_left = stored_experts(layer, scope, form).rows
                if rows_left is not None:
                    check_router(layer, rows_left)
        return
    for scope in plan.scopes:
        what = _unlike_stock(scope.plan, form)
        if what:
            raise UsageError(
                f"The plan of {plan.method!r} {what}, which the {form} form cannot hold; use --form shared."
            )
    if form == "expanded":
        if any(bool((scope.plan.assignment_E < 0).any()) for scope in plan.scopes):
            raise UsageError(
                f"The plan of {plan.method!r} drops experts, which the expanded form cannot take out of the router; "
                "use --form sliced or --form shared."
            )
        return
    if any(len(scope.layers) > 1 for scope in plan.scopes):
        raise UsageError("Layers that share a pool of prototypes have no sliced form; use --form shared.")
    if len(sliced_counts(layers, plan)) > 1:
        raise UsageError("The sliced form stores one number of experts for all layers, and this plan has several.")
    for scope in (scope for scope in plan.scopes if not is_condensed(scope)):
        layer = next(layer for layer in layers if layer.index == scope.layers[0])
        check_router(layer, representatives(scope.plan))


def sliced_counts(layers: Sequence[MoeLayer], plan: Plan) -> set[int]:
    """How many experts the layers have that keep their routers; condensed ones become dense layers."""
    count = {layer.index: layer.logical for layer in layers}
    count |= {index: scope.plan.mixing_KE.shape[0] for scope in plan.scopes for index in scope.layers}
    condensed = {index for scope in plan.scopes if is_condensed(scope) for index in scope.layers}
    return {count[index] for index in count if index not in condensed}


def _unlike_stock(plan: LayerPlan, form: Form) -> str:
    """What ``plan`` has that the classes of the source's family have no place for, and cannot do without."""
    if form == "expanded" and plan.static_K is not None:
        return "condenses layers"
    if any("." in name for name in plan.weights):
        return "stores experts as factors"
    if form == "expanded" and plan.constant_CD is not None:
        return "answers with constants"
    if form == "expanded" and plan.skip:
        return "skips experts at run time"
    return ""


def check_router(layer: MoeLayer, kept: Tensor) -> None:
    """Raise unless a router left with the rows ``kept`` can still choose ``k`` experts, group by group."""
    K = len(kept)
    if layer.top_k > K:
        raise UsageError(
            f"{K} experts would be left, but every token goes to {layer.top_k}; keep at least {layer.top_k} "
            "in the sliced form, or use --form shared."
        )
    if layer.groups > 1:
        sizes = torch.bincount(kept // (layer.logical // layer.groups), minlength=layer.groups)
        if int(sizes.min()) != int(sizes.max()):
            raise UsageError(f"The router has {layer.groups} groups, which must keep equally many experts.")
        check_groups(layer, K)


def check_groups(layer: MoeLayer, K: int) -> None:
    """Raise unless ``K`` experts spread over the router's groups in a way that it can still work with."""
    if K % layer.groups:
        raise UsageError(
            f"The router has {layer.groups} groups, so the experts kept must be a multiple of {layer.groups}, not {K}."
        )
    size = K // layer.groups
    if size < 2 or size * layer.groups_used < layer.top_k:
        raise UsageError(
            f"With {K} experts each of the router's {layer.groups} groups has {size}, too few for {layer.top_k} "
            f"experts a token from {layer.groups_used} groups; keep more."
        )
