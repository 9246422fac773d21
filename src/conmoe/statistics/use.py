"""How often, and how strongly, the router chooses an expert."""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe.registry import statistic
from conmoe.types import Routed


@statistic("count", per="expert", shape="E")
def count(routed: Routed) -> Tensor:
    """n_j: how many tokens chose the expert."""
    return torch.full((), routed.gate_n.numel(), dtype=torch.int64, device=routed.gate_n.device)


@statistic("gate", per="expert", shape="E")
def gate(routed: Routed) -> Tensor:
    """Sum of g_j(x): the expert's gates (SEER)."""
    return routed.gate_n.sum(dtype=torch.float64)


@statistic("gate_squared", per="expert", shape="E")
def gate_squared(routed: Routed) -> Tensor:
    """Sum of g_j(x)^2: with the sum of gates, the exact variance of the gate."""
    gate_n = routed.gate_n.double()
    return gate_n @ gate_n
