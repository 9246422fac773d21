"""Experts whose output is so large that the model leans on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUANTILE = 0.995
SHARE_OF_MAXIMUM = 0.1
SHARE_OF_DEPTH = 0.75
TIMES_LAYER_MEDIAN = 10.0


def super_experts(peak_LE: Tensor) -> Tensor:
    """``bool_LE``: which experts to protect, from the largest |down output| of each (arXiv 2507.23279).

    The rule of the authors' code: above the 99.5th percentile of all experts of all layers, above 10 % of the global
    maximum, in the first 75 % of the MoE layers. We also ask for 10 times the median of the expert's own layer: among
    fewer than some hundred experts someone always exceeds a percentile, and an ordinary expert should not be
    protected by the size of the model. Super experts exceed it by far (hundreds against ones). Experts that saw no
    token (peak 0) and NaN, the padding of layers with fewer experts, take no part.
    """
    peak_LE = torch.nan_to_num(peak_LE.double(), nan=0.0)
    L = peak_LE.shape[0]
    seen = peak_LE[peak_LE > 0]
    if seen.numel() == 0:
        return torch.zeros_like(peak_LE, dtype=torch.bool)
    threshold = max(float(torch.quantile(seen, QUANTILE)), SHARE_OF_MAXIMUM * float(seen.max()))
    median_L1 = peak_LE.masked_fill(peak_LE == 0, torch.nan).nanmedian(dim=1, keepdim=True).values
    shallow_L1 = (torch.arange(L, device=peak_LE.device) < math.ceil(SHARE_OF_DEPTH * L)).unsqueeze(1)
    return (peak_LE > threshold) & (peak_LE > TIMES_LAYER_MEDIAN * median_L1) & shallow_L1
