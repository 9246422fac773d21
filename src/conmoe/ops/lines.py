"""Which lines (rows or columns) beside a low rank stay: what each is worth, and how many while that is being learned.

From MC-SMoE (arXiv 2310.01334), which took both from LoSparse (arXiv 2306.11222). ``S`` lines of ``A`` numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: What is left of an old importance after a step: beta of the moving average.
DECAY = 0.85


def share_at(step: float, start: float, end: float, first: float, last: float) -> float:
    """The share of the lines that is left after ``step``: ``first`` until ``start``, ``last`` from ``end`` on.

    In between ``last + (first - last) (1 - u)^3`` with ``u = (step - start) / (end - start)``: most go early, while
    there is time to make up for them.
    """
    if step >= end:
        return last
    if step <= start:
        return first
    return last + (first - last) * (1 - (step - start) / (end - start)) ** 3


def line_importance(values_SA: Tensor, gradient_SA: Tensor) -> Tensor:
    """The mean over each line of ``|s dL/ds|``, what the loss changes by to first order without a number; float64."""
    return (values_SA.float() * gradient_SA.float()).abs().mean(dim=1, dtype=torch.float64)


def moving_average(average_S: Tensor, new_S: Tensor) -> Tensor:
    """``DECAY`` of what was known and the rest of what is new.

    Of means over lines, which is the mean over lines of averages of each number: one number per line is enough.
    """
    return DECAY * average_S + (1 - DECAY) * new_S


def count_of(share: float, lines: int) -> int:
    """So many of ``lines`` are a share of them, halves rounded up."""
    return math.floor(share * lines + 0.5)


def highest(importance: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` highest numbers of all tensors together; ties to the first tensor and place."""
    flat = torch.cat([part.flatten() for part in importance])
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[flat.argsort(descending=True, stable=True)[:count]] = True
    masks = chosen.split([part.numel() for part in importance])
    return [mask.view(part.shape) for mask, part in zip(masks, importance, strict=True)]
