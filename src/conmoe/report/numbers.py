"""Numbers as a person reads them."""

from __future__ import annotations

import math


def with_error(value: float, stderr: float | None, *, percent: bool = False) -> str:
    """A value and its standard error, to the second digit of the error where four decimals (of a share) show it."""
    scale, digits, unit = (100, 2, "%") if percent else (1, 4, "")
    value, error = scale * value, math.nan if stderr is None else scale * stderr
    if 0 < error < math.inf:
        digits = min(max(1 - math.floor(math.log10(error)), 1), digits)
    shown = "" if math.isnan(error) else f" ± {error:.{digits}f}"
    return f"{value:.{digits}f}{shown}{unit}"


def size(nbytes: float) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= step:
            return f"{nbytes / step:.4g} {unit}"
    return f"{nbytes:.0f} B"
