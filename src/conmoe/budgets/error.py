"""Counts by measured error: what the method's plan leaves of each layer's output, at several counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from conmoe.allocate import cheapest
from conmoe.artifacts import write_json
from conmoe.budgets import Context
from conmoe.ops.leftover import leftover
from conmoe.ops.subsets import join_layers
from conmoe.registry import budget
from conmoe.request import Asked
from conmoe.types import ConmoeError, UsageError

#: What was measured so far, in the folder of the plan.
MEASURED = "error.json"

Weight = Literal["absolute", "relative"]
#: ``(||y - y'||^2, ||y||^2)`` of each token of one layer -> the error of the layer.
WEIGHTS: Mapping[Weight, Callable[[Tensor, Tensor], float]] = {
    "absolute": lambda lost_n, whole_n: float(lost_n.mean()),
    "relative": lambda lost_n, whole_n: float(lost_n.sum()) / (float(whole_n.sum()) or 1.0),
}


def check(asked: Asked, *, points: int, weight: Weight) -> None:
    """Raise a UsageError unless there are two ends at least."""
    if points < 2:
        raise UsageError("The budget 'error' takes two points or more: the ends of the curve are two of them.")


@budget("error", check=check)
def error(
    context: Context,
    *,
    points: Annotated[int, "counts at which each layer is measured, its fewest and all of its experts included"] = 8,
    weight: Annotated[
        Weight, "errors of layers are added as they are, or each as a share of the energy of its layer"
    ] = "absolute",
) -> list[int]:
    """The counts by which the errors of all layers, measured on their token samples, add up to the least.

    Each layer (or scope) is planned by the method at ``points`` counts from its fewest to all its experts, beside the
    even count; of each plan, ``||y - y'||^2`` is measured on the layer's token sample, ``y`` being what its routed
    experts add and ``y'`` what the plan makes of it (routers are asked again where experts are dropped). More experts
    never count as worse, and between the counts the error is taken to be linear. Of all counts that add up to what
    ``--keep`` asks for, those of least total are found exactly (:func:`conmoe.allocate.cheapest`).

    ``weight="absolute"`` is the mean of ``||y - y'||^2`` over tokens: every layer adds its output to the same stream,
    where what is missing stays missing. ``"relative"`` divides by the mean of ``||y||^2``; counts came out worse by it.
    The layers are looked at one by one, on inputs that passed through the source: errors that add up or cancel on the
    way are not seen, and a method that fits weights to the sample looks better than it is. Curves are those of the plan
    before ``--refine`` and ``--sequential``; where a refinement repairs nearly everything, they tell little.

    Cost: ``points`` plans of each layer; for each, the sample passes through the layer's experts twice (``12 n k D I``
    multiplications) and its weights are read. New weights, if the method makes any, take disk for every point (memory,
    if the plan has no folder). A killed run goes on: ``error.json`` beside the plan has every error that was
    measured, by the first layer of the scope, the count and the weight.
    """
    grids = [
        grid(*ends, context.step, points) for ends in zip(context.floor, context.cap, context.uniform, strict=True)
    ]
    remembered = _Remembered(context.work)
    cost = []
    with context.progress.stage("error", sum(len(each) - 1 for each in grids), "plans") as advance:
        for scope, counts in enumerate(grids):
            measured = {context.cap[scope]: 0.0}
            for count in counts[:-1]:
                measured[count] = remembered(context, scope, count)[weight]
                advance(1)
            cost.append(curve(measured, context.step))
    found = cheapest(cost, context.total, context.floor, context.step)
    totals = [_total(cost, counts, context) for counts in (context.uniform, found)]
    context.progress.note(f"Predicted error {totals[0]:.4g} with equal counts, {totals[1]:.4g} with those found.")
    return found


def grid(floor: int, cap: int, uniform: int, step: int, points: int) -> list[int]:
    """Counts from ``floor`` to ``cap``, evenly ``points`` of them but for rounding to ``step``, and the even count."""
    units = (cap - floor) // step
    steps = {round(units * place / (points - 1)) for place in range(points)}
    inside = {floor + step * each for each in steps} | ({uniform} if floor < uniform < cap else set())
    return [*sorted(inside - {cap}), cap]


def curve(measured: Mapping[int, float], step: int) -> NDArray[np.float64]:
    """The error at each count from the lowest to the highest that was measured, ``step`` apart.

    Where more experts measured worse than fewer, the error of the fewer stands.
    """
    known = sorted(measured)
    falling = np.minimum.accumulate([measured[count] for count in known])
    return np.interp(np.arange(known[0], known[-1] + 1, step), known, falling)


def _total(cost: Sequence[NDArray[np.float64]], counts: Sequence[int], context: Context) -> float:
    """The total error of these counts, those below a scope's fewest raised to it."""
    places = [(count - least) // context.step for count, least in zip(counts, context.floor, strict=True)]
    return float(sum(curve_c[max(0, place)] for curve_c, place in zip(cost, places, strict=True)))


def _measure(context: Context, scope: int, count: int) -> dict[str, float]:
    """The error of one scope's plan by each weight, added up over its layers."""
    plan = context.plan_scope(scope, count).plan
    loaded = [context.load(layer) for layer in context.scopes[scope]]
    known, experts = [part for part, _ in loaded], [part for _, part in loaded]
    samples = [part.sample for part in known]
    _, wide = join_layers(known, experts)
    sizes = [len(sample.hidden_nD) for sample in samples]
    if not all(sizes):
        raise UsageError("The budget 'error' measures plans on the token sample, and there is none; calibrate again.")
    lost, whole = (value.split(sizes) for value in leftover(samples, experts, wide, plan))
    layers = list(zip(lost, whole, strict=True))
    found: dict[str, float] = {name: sum(weigh(*layer) for layer in layers) for name, weigh in WEIGHTS.items()}
    if not np.isfinite(list(found.values())).all():
        raise ConmoeError("Activations of an expert overflow on the calibration tokens; calibrate in a wider dtype.")
    return found


class _Remembered:
    """Errors, each measured once, also over runs if there is a folder."""

    def __init__(self, work: Path | None) -> None:
        self._file = work and work / MEASURED
        self._known = json.loads(self._file.read_text()) if self._file and self._file.is_file() else {}

    def __call__(self, context: Context, scope: int, count: int) -> dict[str, float]:
        curve_of = self._known.setdefault(str(context.scopes[scope][0].index), {})
        if str(count) not in curve_of:
            curve_of[str(count)] = _measure(context, scope, count)
            if self._file:
                write_json(self._file, self._known)
        found: dict[str, float] = curve_of[str(count)]
        return found
