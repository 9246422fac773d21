"""How large an expert's output is, with and without its gate."""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe.registry import statistic
from conmoe.types import Routed


@statistic("norm", per="expert", shape="E")
def norm(routed: Routed) -> Tensor:
    """Sum of ||E_j(x)|| (EAN; MAN is its mean)."""
    return routed.norm_n.sum(dtype=torch.float64)


@statistic("norm_squared", per="expert", shape="E")
def norm_squared(routed: Routed) -> Tensor:
    """Sum of ||E_j(x)||^2 (MSAN is its mean)."""
    norm_n = routed.norm_n.double()
    return norm_n @ norm_n


@statistic("gate_norm", per="expert", shape="E")
def gate_norm(routed: Routed) -> Tensor:
    """Sum of g_j(x) ||E_j(x)|| (REAP is its mean)."""
    return routed.gate_n.double() @ routed.norm_n.double()


@statistic("gate_norm_squared", per="expert", shape="E")
def gate_norm_squared(routed: Routed) -> Tensor:
    """Sum of g_j(x)^2 ||E_j(x)||^2: the energy an expert adds to the layer's output."""
    weighted_n = routed.gate_n.double() * routed.norm_n.double()
    return weighted_n @ weighted_n
