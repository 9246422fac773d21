"""The hidden units of all experts of a layer in a few dimensions: their principal components, without all at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from conmoe.ops.units import unit_vectors
from conmoe.types import Experts

#: Directions iterated beside those asked for, and how often: the authors of REAM rely on two iterations as well.
SPARE = 16
ITERATIONS = 2
#: A norm below this is zero.
TINY = 1e-30


@torch.no_grad()
def principal_units(experts: Experts, components: int) -> Tensor:
    """``[E, I, components]`` in float32: the unit-length weights of each hidden unit along their leading directions.

    Each row ``[gate | up | down^T]`` (and biases) is scaled to length 1, the mean over all units is subtracted, and
    what is left is projected on the leading principal directions and multiplied by their singular values (REAM's code,
    arXiv 2604.04356). With fewer numbers to a unit there are fewer columns.

    By subspace iteration from a fixed start, exact where a unit has few numbers; the weights stream by, expert by
    expert. Cost: ``6 (components + SPARE) E I F`` multiplications, ``F`` the numbers of a unit.
    """
    device = experts.gate_EID.device
    mean_F = torch.stack([unit_IF.mean(dim=0, dtype=torch.float64) for unit_IF in _unit_length(experts)]).mean(dim=0)
    mean_F, F = mean_F.float(), mean_F.numel()
    start_FQ = torch.randn(F, min(components + SPARE, F), generator=torch.Generator().manual_seed(0))
    basis_FQ = torch.linalg.qr(start_FQ.to(device))[0]
    for _ in range(ITERATIONS):
        image_FQ = torch.zeros_like(basis_FQ, dtype=torch.float64)
        for unit_IF in _unit_length(experts):
            centred_IF = unit_IF - mean_F
            image_FQ += centred_IF.T @ (centred_IF @ basis_FQ)
        basis_FQ = torch.linalg.qr(image_FQ)[0].float()
    along_EIQ = torch.stack([(unit_IF - mean_F) @ basis_FQ for unit_IF in _unit_length(experts)])
    gram_QQ = torch.zeros(basis_FQ.shape[1], basis_FQ.shape[1], dtype=torch.float64, device=device)
    for along_IQ in along_EIQ:
        gram_QQ += along_IQ.T @ along_IQ
    value_Q, turn_QQ = torch.linalg.eigh(gram_QQ)
    scaled_QQ = turn_QQ * value_Q.clamp_min(0).sqrt()
    projected_EIC: Tensor = along_EIQ @ scaled_QQ[:, -components:].float()
    return projected_EIC


def _unit_length(experts: Experts) -> Iterator[Tensor]:
    for expert in range(experts.gate_EID.shape[0]):
        yield normalize(unit_vectors(experts, expert).float(), eps=TINY)
