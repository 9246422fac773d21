"""A budget over layers: how many prototypes each scope keeps."""

from __future__ import annotations

import math
import re

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
