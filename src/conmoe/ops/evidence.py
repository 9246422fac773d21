"""Whether a sample shows a difference, or chance does."""

from __future__ import annotations

from math import sqrt

from torch import Tensor

#: In standard errors, what chance does not do.
SURE = 2.0


def surely_lower(after_n: Tensor, before_n: Tensor) -> bool:
    """Whether the sum over tokens fell by more than two standard errors of that fall, as of independent tokens.

    Both are of the same tokens, so what makes some of them large does not count. One token shows nothing.
    """
    fall_n = before_n.double() - after_n.double()
    n = fall_n.numel()
    if n < 2:
        return False
    spread = float((fall_n - fall_n.mean()).square().sum())
    return float(fall_n.sum()) > SURE * sqrt(spread * n / (n - 1))
