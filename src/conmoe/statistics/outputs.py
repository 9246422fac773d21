"""What an expert puts out: mean, variance and extremes of its output before the gate."""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe.registry import statistic
from conmoe.types import Routed


@statistic("output", per="expert", shape="ED")
def output(routed: Routed) -> Tensor:
    """Sum of E_j(x) over routed tokens (MoNE's constant is its mean)."""
    return routed.output_nD.sum(dim=0, dtype=torch.float32).double()


@statistic("output_squared", per="expert", shape="ED")
def output_squared(routed: Routed) -> Tensor:
    """Sum of E_j(x)^2 per channel: with the sum of outputs, their exact variance."""
    return routed.output_nD.float().square().sum(dim=0).double()


@statistic("peak", per="expert", shape="E", reduce="max")
def peak(routed: Routed) -> Tensor:
    """Largest absolute value of E_j(x) in any channel: finds super experts (arXiv 2507.23279)."""
    # one pass over the output; abs() would copy it first
    lowest, highest = routed.output_nD.aminmax()
    return torch.maximum(-lowest, highest).double()
