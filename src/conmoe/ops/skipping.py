"""Dynamic skipping: run fewer experts for tokens whose router is sure of its first choice."""

from __future__ import annotations

import torch
from torch import Tensor

#: The largest threshold: at 1, rounding would decide which of several equal gates run.
HIGHEST = 1 - 2**-20


def skip_threshold(weight_nk: Tensor) -> float:
    """``beta``, the median over tokens of the ratio of a token's lowest gate to its highest, in ``[0, 1)``.

    NAEE (arXiv 2402.14800) has k = 2: the second expert is skipped where ``g_2 < beta g_1``, on half of the tokens.
    For k > 2, our generalisation: any expert with ``g_s < beta g_1`` is skipped, and ``beta`` is the median of the
    last gate against the first, so that again half of the tokens skip one expert or more.

    Args:
        weight_nk: the gates of each token, in any order. A token whose gates are all zero counts for nothing.

    Returns:
        ``beta``; 0, by which nothing is skipped, where there is no token, or only one expert for each.
    """
    highest_n = weight_nk.double().amax(dim=1)
    ratio_n = (weight_nk.double().amin(dim=1) / highest_n)[highest_n > 0]
    if weight_nk.shape[1] < 2 or not ratio_n.numel():
        return 0.0
    return min(max(float(torch.quantile(ratio_n, 0.5)), 0.0), HIGHEST)
