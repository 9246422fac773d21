"""Pruning while tuning: the compression of MC-SMoE as its paper has it (arXiv 2310.01334).

Experts are stored as ``left right + S``, and the lines (rows or columns) of ``S`` are pruned while left, right and
``S`` are trained. A line's importance is ``|s dL/ds|``, its mean, as a moving average over the steps (:mod:`conmoe.ops
.lines`); after each step the least important of all layers and matrices are set to zero, so many as the schedule says.

A pruned line keeps its gradient, so it may come back as long as its importance makes it: the choice is made anew after
every step, also after the schedule has ended. Only the result is without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from conmoe.moe import MoeLayer
from conmoe.ops.factors import Factors, Structure, from_weights, to_weights
from conmoe.ops.lines import count_of, highest, line_importance, moving_average, share_at
from conmoe.shards import DTYPES, read_tensor
from conmoe.source import Source
from conmoe.tune.options import Tuning
from conmoe.types import EXPERT_TENSORS, LayerPlan, Plan, ScopePlan, UsageError


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines beside the low ranks of one matrix of all experts of one layer."""

    index_S: Tensor
    free_S: Tensor  # those that may go; the lines of protected experts may not
    possible: int  # how many may be stored, beside protected ones


def with_factors(source: Source, plan: Plan) -> Plan:
    """The plan of a checkpoint with the factors (and biases) that it stores, which the plan's copy there leaves out."""
    scopes = {scope.layers[0]: scope for scope in plan.scopes}
    for layer in source.layers:
        structures = getattr(source.model.get_submodule(layer.experts), "structures", None)
        if structures and layer.index in scopes:
            weights = _stored_weights(source, layer, structures)
            scope = scopes[layer.index]
            scopes[layer.index] = ScopePlan(scope.layers, replace(scope.plan, weights=weights))
    return replace(plan, scopes=tuple(scopes.values()))


def _stored_weights(source: Source, layer: MoeLayer, structures: Mapping[str, Structure]) -> dict[str, Tensor]:
    """The experts of one layer as a plan brings them."""

    def part(name: str, kind: str) -> Tensor:
        return read_tensor(source.layout.sources[f"{_path(layer, name)}_{kind}"][0].entry)

    matrices = [name for name in EXPERT_TENSORS if "bias" not in name]
    factors = {}
    for name in matrices:
        left_KOr, right_KrI, values_SA, index_S = (part(name, kind) for kind in ("left", "right", "values", "index"))
        factors[name] = Factors(left_KOr, right_KrI, values_SA, index_S, structures[name.partition("_")[0]])
    biased = source.model.get_submodule(layer.experts).has_bias
    biases = [name for name in EXPERT_TENSORS if biased and name not in matrices]
    return {**to_weights(factors), **{name: part(name, "bias") for name in biases}}


def stored_lines(source: Source, plan: Plan) -> dict[str, Lines]:
    """The lines of a checkpoint, by the parameter that holds their values."""
    found: dict[str, Lines] = {}
    for _, scope, layer in _factored(source, plan):
        held = scope.plan.assignment_E[list(plan.protected.get(layer.index, ()))]
        for name, item in from_weights(scope.plan.weights)[0].items():
            path = _path(layer, name)
            free_S = ~torch.isin(item.index_S // item.lines, held)
            possible = (item.left_KOr.shape[0] - held.unique().numel()) * item.lines
            found[f"{path}_values"] = Lines(item.index_S, free_S, possible)
    return found


class LinePruning(nn.Module):
    """What is known of each line's importance, as buffers: part of what a run goes on from."""

    def __init__(self, lines: Mapping[str, Lines], options: Tuning, steps: int) -> None:
        super().__init__()
        self.names = tuple(lines)
        self._options, self._steps = options, steps
        for number, each in enumerate(lines.values()):
            self.register_buffer(f"free_{number}", each.free_S, persistent=False)
            self.register_buffer(f"importance_{number}", torch.zeros(each.free_S.numel(), dtype=torch.float64))
        self._possible = sum(each.possible for each in lines.values())
        self._stored = sum(int(each.free_S.sum()) for each in lines.values())
        self._held = sum(int((~each.free_S).sum()) for each in lines.values())
        self.left = count_of(options.ratio, self._possible) + self._held
        self.all = self._possible + self._held
        if self.left - self._held > self._stored:
            raise UsageError(
                f"A ratio of {options.ratio:g} leaves {self.left} rows (or columns), but only "
                f"{self._stored + self._held} of {self.all} are stored; compress with --option ratio=1.0."
            )

    @torch.no_grad()
    def update(self, weights: Mapping[str, nn.Parameter], step: int) -> None:
        """Learn from the gradients of a step, and set to zero what the schedule does not leave after it."""
        values = [weights[name] for name in self.names]
        for value_SA, average_S in zip(values, self._buffers_of("importance"), strict=True):
            gradient_SA = torch.zeros_like(value_SA) if value_SA.grad is None else value_SA.grad
            average_S.copy_(moving_average(average_S, line_importance(value_SA, gradient_SA)))
        for value_SA, kept_S in zip(values, self.kept(step).values(), strict=True):
            value_SA[~kept_S] = 0

    def kept(self, step: int) -> dict[str, Tensor]:
        """Which lines are left after ``step``, by the parameter that holds their values."""
        options, steps = self._options, self._steps
        first = self._stored / max(self._possible, 1)
        share = share_at(step, options.prune_start * steps, options.prune_end * steps, first, options.ratio)
        pairs = zip(self._buffers_of("importance"), self._buffers_of("free"), strict=True)
        importance = [average_S.masked_fill(~free_S, torch.inf) for average_S, free_S in pairs]
        return dict(zip(self.names, highest(importance, count_of(share, self._possible) + self._held), strict=True))

    def _buffers_of(self, kind: str) -> list[Tensor]:
        return [self.get_buffer(f"{kind}_{number}") for number in range(len(self.names))]


def cut(weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], lines: Mapping[str, Lines]) -> dict[str, Tensor]:
    """The tensors of the result that are others than before: tuned, and without the pruned lines."""
    made = dict(weights)
    for name, kept_S in kept.items():
        made[name] = weights[name][kept_S]
        made[name.removesuffix("values") + "index"] = lines[name].index_S[kept_S]
    return made


def cut_plan(source: Source, plan: Plan, weights: Mapping[str, Tensor]) -> Plan:
    """The plan with the factors that are stored now, which are its prototypes' only recipe."""
    scopes = list(plan.scopes)
    for position, scope, layer in _factored(source, plan):
        factors, others = from_weights(scope.plan.weights)
        found = {name: _stored(source, weights, _path(layer, name), item) for name, item in factors.items()}
        tuned: LayerPlan = replace(
            scope.plan, weights={**others, **to_weights(found)}, predicted_error=float("nan")
        )  # the prediction was of the factors before
        scopes[position] = ScopePlan(scope.layers, tuned)
    return replace(plan, scopes=tuple(scopes))


def cut_config(config: Mapping[str, Any], source: Source, plan: Plan) -> dict[str, Any]:
    """The configuration with the numbers of lines of ``plan``."""
    departures = {layer: dict(found) for layer, found in config["consolidated_layers"].items()}
    for _, scope, layer in _factored(source, plan):
        departure = departures[str(layer.index)]
        departure["factors"] = {matrix: dict(found) for matrix, found in departure["factors"].items()}
        for name, item in from_weights(scope.plan.weights)[0].items():
            departure["factors"][name.partition("_")[0]]["kept"] = item.index_S.numel()
    return {**config, "consolidated_layers": departures}


def _factored(source: Source, plan: Plan) -> list[tuple[int, ScopePlan, MoeLayer]]:
    """The scopes whose experts are factors, their place in the plan, and the one layer of each."""
    layers = {layer.index: layer for layer in source.layers}
    return [
        (position, scope, layers[scope.layers[0]])
        for position, scope in enumerate(plan.scopes)
        if from_weights(scope.plan.weights)[0]
    ]


def _path(layer: MoeLayer, name: str) -> str:
    """Where the model has the factors of a canonical tensor."""
    return f"{layer.experts}.{name.partition('_')[0]}"


def _stored(source: Source, weights: Mapping[str, Tensor], path: str, item: Factors) -> Factors:
    dtype = DTYPES[source.layout.sources[f"{path}_values"][0].entry.dtype]
    left_KOr, right_KrI, values_SA = (weights[f"{path}_{part}"].to(dtype) for part in ("left", "right", "values"))
    return Factors(left_KOr, right_KrI, values_SA, weights[f"{path}_index"], item.structure)
