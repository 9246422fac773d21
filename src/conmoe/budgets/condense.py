"""CD-MoE: which layers are condensed (arXiv 2412.00069)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch

from conmoe.artifacts import read_layer, read_measured, read_tokens, write_json
from conmoe.budgets import Context
from conmoe.condense import LastHidden, Order, search
from conmoe.folding import can_be_dense
from conmoe.observe import IMPLEMENTATION
from conmoe.ops.outliers import super_experts
from conmoe.registry import budget
from conmoe.request import Asked
from conmoe.source import open_source
from conmoe.types import UsageError

#: What was measured so far, in the folder of the plan.
MEASURED = "condense.json"


def check(asked: Asked, *, always_on: int, sequences: int, beam: int) -> None:
    """Raise a UsageError unless this can be met by condensing some of the planned layers."""
    if not asked.method.condenses:
        raise UsageError(f"The budget 'condense' chooses layers to condense, and {asked.method.name!r} condenses none.")
    if sequences < 1 or beam < 1 or always_on < -1:
        raise UsageError("condense takes one sequence or more, a beam of one or more, and always_on from 0 up (or -1).")
    if asked.counts == asked.cap:
        return
    stay, E = _always_on(asked.scopes[0][0].top_k, always_on), asked.cap[0]
    if stay >= E:
        raise UsageError(f"{stay} of {E} experts would be always on, which saves nothing; choose a lower always_on.")
    if layers_to_condense(sum(asked.counts), asked.cap, stay) > len(asked.cap):
        least = len(asked.cap) * stay / sum(asked.cap)
        raise UsageError(
            f"--keep {asked.keep} is less than what is left when all {len(asked.cap)} layers are condensed to {stay} "
            f"experts ({least:.3f} of all); keep more, or choose a lower always_on."
        )


@budget("condense", paper="https://arxiv.org/abs/2412.00069", check=check)
def condense(
    context: Context,
    *,
    always_on: Annotated[int, "experts that stay in a condensed layer; -1: as many as its router picks, 0: none"] = -1,
    sequences: Annotated[int, "calibration sequences to measure on, the first ones"] = 8,
    beam: Annotated[int, "choices of layers that are followed at a time"] = 1,
) -> list[int]:
    """Some layers are condensed to a few experts, as many as it takes to keep what is asked; the others stay whole.

    Greedy: at each step the layer whose condensing changes the model's last hidden state least, given the layers
    condensed before; by the Jensen-Shannon divergence, mean over tokens, between softmaxes over the hidden dimension
    of the source's and the result's. Layers with super experts are left whole unless --protect none; in the sliced
    form only layers that the family's configuration can call dense are chosen.

    Cost, for each layer that is condensed: the weights are read once, and ``sequences`` run through about half of the
    layers for every layer that is left. A killed search goes on: ``condense.json`` beside the plan has every choice
    that was measured, and the order that was found; the plan has that too.
    """
    stay = _always_on(context.scopes[0][0].top_k, always_on)
    position = {scope[0].index: place for place, scope in enumerate(context.scopes)}
    count = layers_to_condense(context.total, context.cap, stay)
    candidates = [layer for layer in position if layer not in _with_super_experts(context)]
    if count > len(candidates):
        raise UsageError(
            f"--keep asks for {count} condensed layers, and {len(candidates)} hold no super experts; keep more, or "
            "--protect none."
        )
    plans = {layer: context.plan_scope(position[layer], stay).plan for layer in candidates}
    request = context.request
    sliced = request.form == "sliced"
    source = open_source(
        context.source.folder,
        experts_implementation=IMPLEMENTATION,
        trust_remote_code=request.trust_remote_code,
    )
    measure = LastHidden(source, plans, read_tokens(context.statistics)[:sequences], request.device)
    with context.progress.stage("search", 1 + (count - 1) * beam, "steps") as advance:
        remembered = _Remembered(measure, context.work)

        def step(chosen: Order, left: Sequence[int]) -> Mapping[int, float]:
            found = remembered(chosen, left)
            advance(1)
            return found

        order, divergence = search(
            candidates,
            count,
            step,
            beam=beam,
            allowed=lambda chosen: not sliced or can_be_dense(context.source, chosen),
        )
    remembered.keep("order", list(order))
    context.found["order"] = list(order)
    counts = [stay if layer in order else experts for layer, experts in zip(position, context.cap, strict=True)]
    context.progress.note(
        f"Condensed in this order: {', '.join(map(str, order))}; {sum(counts)} of {sum(context.cap)} experts stay. "
        f"Divergence {divergence[0]:.3g} after the first layer, {divergence[-1]:.3g} after all."
    )
    return counts


def layers_to_condense(total: int, cap: Sequence[int], always_on: int) -> int:
    """How many layers have to be condensed so that no more than ``total`` experts stay."""
    return -((total - sum(cap)) // (cap[0] - always_on))


def _always_on(top_k: int, asked: int) -> int:
    return top_k if asked < 0 else asked


def _with_super_experts(context: Context) -> set[int]:
    """Layers that may not be condensed, as an expert that has to be protected would answer every token there."""
    if "super" not in context.request.protect:
        return set()
    layers = [layer.index for layer in context.source.layers]
    peaks = torch.stack([read_layer(context.statistics, layer).sums["peak"] for layer in layers])
    return {layers[place] for place, _ in super_experts(peaks).nonzero().tolist()}


class _Remembered:
    """Divergences, each set of layers once, also over runs if there is a folder."""

    def __init__(self, measure: LastHidden, work: Path | None) -> None:
        self._measure, self._file = measure, work and work / MEASURED
        self._known = read_measured(self._file)

    def __call__(self, chosen: Order, candidates: Sequence[int]) -> dict[int, float]:
        names = {layer: ",".join(map(str, sorted((*chosen, layer)))) for layer in candidates}
        unknown = [layer for layer in candidates if names[layer] not in self._known]
        if unknown:
            for layer, value in self._measure(chosen, unknown).items():
                self.keep(names[layer], value)
        return {layer: self._known[names[layer]] for layer in candidates}

    def keep(self, name: str, value: object) -> None:
        self._known[name] = value
        if self._file:
            write_json(self._file, self._known)
