"""Budgets: how the prototypes that ``--keep`` asks for are shared out over the layers. One, or close kin, a file.

A budget is one decorated function, ``(context, *, options) -> list[int]``: the prototypes of each scope, which add up
to at most ``context.total``. Its options and its help are declared like those of a method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conmoe.moe import MoeLayer
from conmoe.progress import Progress
from conmoe.registry import Method
from conmoe.request import Request
from conmoe.source import Source
from conmoe.types import Experts, LayerStatistics, Plan, ScopePlan


@dataclass(frozen=True, slots=True)
class Context:
    """What a budget may look at. Everything that is a tuple has one entry for each scope, in depth order."""

    source: Source
    statistics: Path  # the folder that the calibration wrote
    scopes: tuple[tuple[MoeLayer, ...], ...]
    request: Request
    method: Method
    options: Mapping[str, Any]  # of the method
    uniform: tuple[int, ...]  # what each scope keeps when all layers give up the same share
    floor: tuple[
        int, ...
    ]  # the fewest it can be left with: what its router needs, and one beside its protected experts
    cap: tuple[int, ...]  # its logical experts
    step: int  # counts are multiples of it: the groups of a router whose rows are cut
    load: Callable[[MoeLayer], tuple[LayerStatistics, Experts]]  # what is known of a layer, and its weights
    plan_scope: Callable[[int, int], ScopePlan]  # (which scope, prototypes) -> the method's plan, made only once
    assemble: Callable[[Sequence[ScopePlan]], Plan]  # plans of some scopes as one; other layers stay as they are
    work: Path | None  # a folder that outlives a killed run of the same request, for what is worth keeping
    progress: Progress
    found: dict[str, Any] = field(default_factory=dict)  # what the plan should say of it beside its options

    @property
    def total(self) -> int:
        """Prototypes of all scopes together."""
        return sum(self.uniform)
