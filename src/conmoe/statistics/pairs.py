"""Which experts are chosen together."""

from __future__ import annotations

import torch
from torch import Tensor

from conmoe.registry import statistic
from conmoe.types import Routing


@statistic("pair", per="batch", shape="EE")
def pair(routing: Routing) -> Tensor:
    """How many tokens chose both experts; the diagonal counts the tokens of one."""
    index_Tk, E = routing.index_Tk.long(), routing.experts
    pairs_Tkk = index_Tk.unsqueeze(2) * E + index_Tk.unsqueeze(1)
    return torch.bincount(pairs_Tkk.flatten(), minlength=E * E).view(E, E)
