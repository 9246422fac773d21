"""The three forms of a result: which experts are stored, which router rows stay, and what a form cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conmoe.moe import MoeLayer
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
        position = scope.layers.index(layer.index)
        mine = slice(position * layer.logical, (position + 1) * layer.logical)
        return Stored(plan, plan.assignment_E[mine], plan.gain_E[mine], None, True)
    if form == "sliced":
        rows = representatives(plan)
        return Stored(plan, torch.arange(K), plan.gain_E[rows], rows, True)
    return Stored(plan, torch.arange(K), torch.ones(K), None, layer.index == scope.layers[0])


def representatives(plan: LayerPlan) -> Tensor:
    """The logical expert whose router row speaks for each prototype: of those it answers for, its largest part."""
    K = plan.mixing_KE.shape[0]
    answers_KE = plan.assignment_E[None, :] == torch.arange(K)[:, None]
    if not bool(answers_KE.any(dim=1).all()):
        raise UsageError("A prototype answers for no expert; the plan cannot be stored sliced.")
    return plan.mixing_KE.masked_fill(~answers_KE, float("-inf")).argmax(dim=1)


def is_approximate(plan: Plan, form: Form) -> bool:
    """Whether storing ``plan`` in this form changes what it says: a map is lost when router rows are cut."""
    return form == "sliced" and any(
        bool((scope.plan.assignment_E >= 0).sum() > scope.plan.mixing_KE.shape[0]) for scope in plan.scopes
    )


def check_form(layers: Sequence[MoeLayer], plan: Plan, form: Form) -> None:
    """Raise a UsageError, in one sentence, if ``form`` cannot hold ``plan``."""
    counts = {scope.plan.mixing_KE.shape[0] for scope in plan.scopes}
    if form != "sliced":
        if any(bool((scope.plan.assignment_E < 0).any()) for scope in plan.scopes):
            raise UsageError(
                f"The plan of {plan.method!r} drops experts, and only the sliced form takes them out of the router; "
                "use --form sliced."
            )
        return
    if any(len(scope.layers) > 1 for scope in plan.scopes):
        raise UsageError("Layers that share a pool of prototypes have no sliced form; use --form shared.")
    planned = {scope.layers[0] for scope in plan.scopes}
    if len(counts) > 1 or (planned != {layer.index for layer in layers} and counts != {layers[0].logical}):
        raise UsageError("The sliced form stores one number of experts for all layers, and this plan has several.")
    for scope in plan.scopes:
        layer = next(layer for layer in layers if layer.index == scope.layers[0])
        check_router(layer, representatives(scope.plan))


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
