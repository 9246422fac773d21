"""Which parameters a mode of tuning may change."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from conmoe.moe import decoder_layers, is_condensed_block, logical_rows
from conmoe.ops.plans import identity
from conmoe.source import Source
from conmoe.tune.options import Mode
from conmoe.types import LayerPlan, Plan, UsageError

#: A bias that only ranks the experts takes no part in what is computed from them: there is no gradient to follow.
_RANKS_ONLY = "e_score_correction_bias"
_FACTORS = tuple(f".{matrix}_{part}" for matrix in ("gate", "up", "down") for part in ("left", "right", "values"))
_NOTHING = {
    "experts": "its plan changes no experts",
    "router": "no router is left",
    "prune": "it stores no experts as factors, as compressing with --method mc-smoe does",
}


def tuned_parameters(source: Source, plan: Plan, mode: Mode) -> list[str]:
    """The parameters that a mode may change.

    ``experts``: the routed experts of the layers that the plan changed; where such a layer is condensed, its whole
    block, which is always-on experts, shared ones among them. ``router``: the routers of all layers, their biases too.
    ``prune``: the low ranks of experts that are stored as factors, and the lines beside them.

    Raises:
        UsageError: there are none.
    """
    model = source.model
    trainable = {name for name, _ in model.named_parameters()} & source.layout.sources.keys()
    if mode == "router":
        rows = {name for layer in source.layers for name in logical_rows(model, layer)}
        wanted = {name for name in rows if not name.endswith(_RANKS_ONLY)}
    elif mode == "prune":
        factors = {f"{layer.experts}{part}" for layer in source.layers for part in _FACTORS}
        wanted = factors
    else:
        changed = {index for scope in plan.scopes if _changes(scope.plan) for index in scope.layers}
        prefixes = tuple(
            [f"{layer.experts}." for layer in source.layers if layer.index in changed]
            + [f"{block}." for index, block in _condensed_blocks(model) if index in changed]
        )
        wanted = {name for name in trainable if name.startswith(prefixes)}
    names = [name for name in source.layout.sources if name in wanted & trainable]
    if not names:
        raise UsageError(f"There is nothing to tune in {source.folder}: {_NOTHING[mode]}.")
    return names


def _changes(plan: LayerPlan) -> bool:
    """Whether a layer is another than before."""
    same = identity(plan.assignment_E.numel())
    if plan.weights or plan.skip or plan.constant_CD is not None or plan.static_K is not None:
        return True
    return not all(
        torch.equal(getattr(plan, name).double(), getattr(same, name).double())
        for name in ("assignment_E", "mixing_KE", "gain_E")
    )


def _condensed_blocks(model: PreTrainedModel) -> Iterator[tuple[int, str]]:
    """Decoder layer and path of the blocks that have lost their router."""
    path, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if is_condensed_block(module):
                yield index, f"{path}.{index}.{name}"
