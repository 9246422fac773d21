"""The same for every layer."""

from __future__ import annotations

from conmoe.budgets import Context
from conmoe.registry import budget


@budget("uniform", even=True)
def uniform(context: Context) -> list[int]:
    """Every layer gives up the same share of its experts."""
    return list(context.uniform)
