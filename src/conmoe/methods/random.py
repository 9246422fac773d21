"""The floor: experts chosen without looking."""

from __future__ import annotations

from typing import Annotated

import torch

from conmoe.ops import plans, scores
from conmoe.registry import method
from conmoe.types import Experts, LayerPlan, LayerStatistics


@method("random", paper="baseline", form="sliced")
def random(
    statistics: LayerStatistics, experts: Experts, keep: int, *, seed: Annotated[int, "seed of the choice"] = 0
) -> LayerPlan:
    """Keep experts drawn at random, drop the others: what every other method must beat.

    Each layer draws with the same seed; experts have no order across layers, so the layers are independent all the
    same.
    """
    E = statistics.owner_E.numel()
    if keep == E:
        return plans.identity(E)
    draw_E = torch.randperm(E, generator=torch.Generator().manual_seed(seed))
    kept_K = scores.top(-draw_E.argsort(), keep, statistics.owner_E, scores.own_by_default(statistics, keep))
    return plans.prune(kept_K, E)
