"""How far apart two hidden states are when read as distributions over their components.

``n`` tokens, ``D`` hidden size, ``E`` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conmoe.ops.similarity import BLOCK_BYTES

#: Added to every probability, as in the code of CD-MoE (arXiv 2412.00069).
EPSILON = 1e-10


@torch.no_grad()
def jensen_shannon(x_nD: Tensor, y_nD: Tensor) -> Tensor:
    """``JS_n`` of ``p = softmax(x)`` and ``q = softmax(y)`` over the last axis, in nats and float64.

    ``JS = (KL(p||m) + KL(q||m)) / 2`` with ``m = (p + q) / 2``, each probability plus 1e-10; between 0 and ln 2. It is
    worked out from the entropies of p, q and m, of which float32 would leave nothing but rounding. Leading axes may be
    broadcast.
    """
    p_nD, q_nD = x_nD.double().softmax(-1), y_nD.double().softmax(-1)
    return (_entropy((p_nD + q_nD) / 2) - (_entropy(p_nD) + _entropy(q_nD)) / 2).clamp_min(0)


@torch.no_grad()
def divergence_with(original_nD: Tensor, base_nD: Tensor, terms: Sequence[Tensor], weight_E: Tensor) -> Tensor:
    """For each of ``terms`` the mean over tokens of ``JS(original, base + weight * term)``, as ``js_E`` in float64.

    The terms may be in any dtype; a block of tokens of one of them exists in float64 at a time.
    """
    n, D = original_nD.shape
    js_E = torch.zeros(len(terms), dtype=torch.float64, device=original_nD.device)
    for block in torch.arange(n).split(max(1, BLOCK_BYTES // (64 * D))):
        rows = slice(int(block[0]), int(block[-1]) + 1)
        p_cD, base_cD = original_nD[rows].double().softmax(-1), base_nD[rows].double()
        own_c = _entropy(p_cD)
        for candidate, (term_nD, weight) in enumerate(zip(terms, weight_E.tolist(), strict=True)):
            q_cD = torch.add(base_cD, term_nD[rows].double(), alpha=weight).softmax(-1)
            js_c = _entropy((p_cD + q_cD) / 2) - (own_c + _entropy(q_cD)) / 2
            js_E[candidate] += js_c.clamp_min(0).sum()
    return js_E / max(n, 1)


def _entropy(p_nD: Tensor) -> Tensor:
    entropy_n: Tensor = torch.special.entr(p_nD + EPSILON).sum(-1)
    return entropy_n
