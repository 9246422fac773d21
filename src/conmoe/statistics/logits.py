"""First and second moments of the router's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe.registry import statistic
from conmoe.types import Routing


@statistic("logit", per="batch", shape="E")
def logit(routing: Routing) -> Tensor:
    """Sum of the router's logits z."""
    return routing.logits_TE.sum(dim=0, dtype=torch.float64)


@statistic("logit_gram", per="batch", shape="EE")
def logit_gram(routing: Routing) -> Tensor:
    """Sum of z z^T: cosines of the experts' logit columns (M-SMoE, REAM)."""
    logits_TE = routing.logits_TE.double()
    return logits_TE.T @ logits_TE
