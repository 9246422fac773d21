"""The arithmetic of budgets: what ``--keep`` means, and counts for each scope that add up to it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from conmoe.types import UsageError


def parse_keep(text: str) -> float | int:
    """``"0.5"`` and ``"50%"`` are shares (floats), ``"32"`` is a count of experts (int).

    Raises:
        UsageError: not a number, nothing kept, or a share of more than all.
    """
    text = text.strip()
    if re.fullmatch(r"\d+", text):
        value: float | int = int(text)
    elif re.fullmatch(r"(\d+\.?\d*|\.\d+)%", text):
        value = float(text[:-1]) / 100
    elif re.fullmatch(r"\d*\.\d*", text) and text != ".":
        value = float(text)
    else:
        raise UsageError(f"--keep takes a share (0.5 or 50%) or a count of experts (32), not {text!r}.")
    if value == 0:
        raise UsageError("--keep 0 would leave no expert; keep at least one.")
    if isinstance(value, float) and value > 1:
        raise UsageError(f"--keep {text} is more than all experts; a share is at most 1.0 or 100%.")
    return value


def experts_kept(keep: float | int, experts: int) -> int:
    """The count that ``keep`` means for a layer (or scope) of ``experts``; a share is rounded half up, to at least 1.

    Raises:
        UsageError: a count of more than there are.
    """
    if isinstance(keep, float):
        return max(1, math.floor(keep * experts + 0.5))
    if keep > experts:
        raise UsageError(f"--keep {keep} asks for more experts than the {experts} there are.")
    return keep


def uniform(keep: float | int, experts: int, layers_per_scope: list[int]) -> list[int]:
    """Prototypes of each scope when every layer gives up the same share; a count is per layer."""
    return [
        experts_kept(keep, experts * width) if isinstance(keep, float) else experts_kept(keep, experts) * width
        for width in layers_per_scope
    ]


#: Bytes of a unit, in lower case.
UNITS = {"b": 1} | {
    f"{letter}{i}b": (1024 if i else 1000) ** (power + 1) for power, letter in enumerate("kmgt") for i in ("", "i")
}


def parse_size(text: str, whole: int) -> int:
    """Bytes: ``"24GB"`` and ``"20GiB"`` are sizes, ``"60%"`` is a share of ``whole``; rounded down.

    Raises:
        UsageError: not a size, or none at all.
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%|[kmgt]?i?b)", text.strip(), re.IGNORECASE)
    unit = found[2].lower() if found else ""
    if not found or (unit != "%" and unit not in UNITS):
        raise UsageError(f"--fit takes a size (24GB, 500MB, 20GiB) or a share of the model's own (60%), not {text!r}.")
    size = math.floor(Fraction(found[1]) * (Fraction(whole, 100) if unit == "%" else UNITS[unit]))
    if size == 0:
        raise UsageError(f"--fit {text.strip()} leaves room for nothing.")
    return size


def parse_counts(text: str) -> tuple[int, ...]:
    """``"12,16,16"``: the prototypes of each scope one by one; nothing for the name of a budget."""
    return tuple(int(part) for part in text.split(",")) if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text) else ()


def spread(value: Sequence[Tensor], total: int, floor: Sequence[int], cap: Sequence[int], step: int = 1) -> list[int]:
    """Counts of each scope, ``total`` in all, by which the experts of highest value over all scopes stay.

    Args:
        value: of each scope, what its experts are worth; infinity for those that stay in any case.
        total: how many stay; at least what ``floor`` adds up to.
        floor: the fewest of each scope.
        cap: the experts of each scope.
        step: counts above the floor grow by so many at once, which are valued together.

    Ties go to the earlier scope.
    """
    blocks: list[tuple[float, int]] = []
    for scope, worth_E in enumerate(value):
        ranked_E = worth_E.double().sort(descending=True).values
        for start in range(floor[scope], cap[scope] - step + 1, step):
            blocks.append((-float(ranked_E[start : start + step].sum()), scope))
    counts = list(floor)
    for _, scope in sorted(blocks)[: (total - sum(floor)) // step]:
        counts[scope] += step
    return counts


def cheapest(cost: Sequence[NDArray[np.float64]], total: int, floor: Sequence[int], step: int = 1) -> list[int]:
    """Counts of each scope, as many in all as there may be, whose costs add up to the least there is.

    Exact, by dynamic programming over scopes: with ``S`` of them, at most ``C`` counts each and ``U`` steps to share
    out, ``S C U`` additions (100 scopes, 512 counts: seconds).

    Args:
        cost: of each scope, the cost of ``floor``, ``floor + step``, ... prototypes; not necessarily convex.
        total: how many stay; at least what ``floor`` adds up to. What is left over of a step is not used.
        floor: the fewest of each scope.
        step: of the counts.

    Ties go to the earlier scope.
    """
    units = min((total - sum(floor)) // step, sum(len(cost_c) - 1 for cost_c in cost))
    best_U = np.zeros(1)  # the least cost of the scopes so far, by the steps that they take together
    taken: list[NDArray[np.int32]] = []  # by the last of them, to get there
    for cost_c in cost:
        size = min(len(best_U) + len(cost_c) - 1, units + 1)
        found_U, steps_U = np.full(size, np.inf), np.zeros(size, dtype=np.int32)
        for count, value in enumerate(cost_c[:size]):
            width = min(len(best_U), size - count)
            candidate_U = best_U[:width] + value
            part_U = found_U[count : count + width]
            better = candidate_U < part_U
            part_U[better] = candidate_U[better]
            steps_U[count : count + width][better] = count
        best_U = found_U
        taken.append(steps_U)
    counts, left = list(floor), units
    for scope in reversed(range(len(cost))):
        own = int(taken[scope][left])
        counts[scope] += own * step
        left -= own
    return counts
