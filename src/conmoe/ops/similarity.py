"""How far apart experts are: three distances behind one interface, ``(sample, experts) -> cost_EE`` in float64.

``cost_ij`` is the cost of letting ``j`` answer for ``i``; the diagonal is zero, exact duplicates are at distance zero
(functional: up to float32 rounding), and nothing is ever NaN. All stream: no tensor of ``E * n * D`` is held, nor a
second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from conmoe.ops.accumulate import add_at
from conmoe.ops.experts import expert_output, select
from conmoe.types import Experts, TokenSample, sample_tensors

#: ``(sample, experts) -> [E, E]``
Measure = Callable[[TokenSample, Experts], Tensor]

#: Bytes of the largest intermediate tensor.
BLOCK_BYTES = 128 * 2**20
#: Tokens that all experts are asked at once, at least: for fewer, reading the weights takes longer than using them.
LEAST_ROWS = 128
#: Pairs closer than this share of their norms are compared again by subtraction: dot products cancel there.
CLOSE = 1e-2
#: A norm below this is zero.
TINY = 1e-30
#: How many tokens stand in for those an expert never got.
STAND_INS = 32


@torch.no_grad()
def weight_distance(sample: TokenSample, experts: Experts) -> Tensor:
    """``D_ij = mean over W in (gate, up, down) of 2 ||W_i - W_j|| / (||W_i|| + ||W_j|| + 2e-12)``, between 0 and 2.

    The rule of an independent implementation of ConMoE; needs no sample. A bias counts as one more column of its
    matrix. Blind to a permutation of hidden units. Cost: ``3 E^2 D I`` multiplications, in float32.
    """
    relative = [
        2 * square_EE.sqrt() / (norm_EE + 2e-12)
        for square_EE, norm_EE in (_squared_distance(*matrix) for matrix in _matrices(experts))
    ]
    return torch.stack(relative).mean(dim=0).fill_diagonal_(0.0)


@torch.no_grad()
def euclidean_weight_distance(experts: Experts) -> Tensor:
    """``||w_i - w_j||`` of all weights of an expert in one row. Cost and blindness as of :func:`weight_distance`."""
    square_EE = torch.stack([_squared_distance(*matrix)[0] for matrix in _matrices(experts)]).sum(dim=0)
    return square_EE.sqrt().fill_diagonal_(0.0)


@torch.no_grad()
def gate_up_cosine(experts: Experts) -> Tensor:
    """``cosine_EE`` of the flattened ``[up; gate]``, in float64; 0 beside an expert whose weights are all zero.

    MergeMoE (arXiv 2510.14436) compares this concatenation and does not name the measure. A bias counts as one more
    column of its matrix. Cost: ``2 E^2 D I`` multiplications, in float32.
    """
    matrices = ((experts.gate_EID, experts.gate_bias_EI), (experts.up_EID, experts.up_bias_EI))
    dot_EE = torch.stack([_gram(part) for matrix in matrices for part in _parts(*matrix)]).sum(dim=0)
    norm_E = dot_EE.diagonal().sqrt()
    return dot_EE / torch.outer(norm_E, norm_E).clamp_min(1e-300)


def logit_cosine(logit_gram_EE: Tensor) -> Tensor:
    """``cosine_EE`` of the experts' columns of router logits over all calibration tokens, from the sum of ``z z^T``.

    M-SMoE (arXiv 2310.01334, section 3) and REAM (arXiv 2604.04356). 1 on the diagonal; 0 beside an expert whose
    logits are all zero, and between experts of different layers, whose logits never meet.
    """
    norm_E = logit_gram_EE.double().diagonal().clamp_min(0).sqrt()
    cosine_EE = logit_gram_EE.double() / torch.outer(norm_E, norm_E).clamp_min(1e-300)
    return cosine_EE.clamp(-1, 1).fill_diagonal_(1.0)


def logit_distance(logit_gram_EE: Tensor) -> Tensor:
    """``||z_i - z_j||`` of the experts' columns of router logits over all calibration tokens (HC-SMoE's ablation)."""
    square_E = logit_gram_EE.double().diagonal()
    square_EE = square_E.unsqueeze(0) + square_E.unsqueeze(1) - 2 * logit_gram_EE.double()
    return square_EE.clamp_min(0).sqrt().fill_diagonal_(0.0)


@torch.no_grad()
def mean_output_distance(sample: TokenSample, experts: Experts) -> Tensor:
    """``||mean E_i(x) - mean E_j(x)||`` over all tokens of the sample, routed there or not (HC-SMoE, arXiv 2410.08589).

    Cost: ``n E`` expert evaluations.
    """
    mean_ED = mean_outputs(sample, experts)
    return _pairwise(mean_ED, mean_ED)


@torch.no_grad()
def mean_outputs(sample: TokenSample, experts: Experts, share_nE: Tensor | None = None) -> Tensor:
    """``mean_ED`` of ``share * E_i(x)`` over all tokens of the sample, in float64; every share is 1 unless given."""
    E, n = experts.gate_EID.shape[0], sample.hidden_nD.shape[0]
    total_ED = torch.zeros(E, sample.hidden_nD.shape[1], dtype=torch.float64, device=experts.gate_EID.device)
    for block in _blocks(n, floats_per_row=8 * sum(experts.gate_EID.shape[1:])):
        x_cD = sample.hidden_nD[block].to(total_ED.device)
        for expert in range(E):
            y_cD = expert_output(experts, expert, x_cD)
            if share_nE is None:
                total_ED[expert] += y_cD.sum(dim=0, dtype=torch.float32)
            else:
                total_ED[expert] += share_nE[block, expert].to(y_cD.device).float() @ y_cD.float()
    return total_ED / max(n, 1)


@torch.no_grad()
def output_cosine(sample: TokenSample, experts: Experts) -> Tensor:
    """``cosine_EE`` of the outputs of two experts for the same token, mean over all tokens of the sample.

    Sub-MoE (arXiv 2506.23266). The inner products of unit vectors, so a Gram matrix. 1 on the diagonal; an output of
    zero has a cosine of 0 with any other. Cost: ``n E`` expert evaluations and ``n E^2 D``, in float32.
    """
    E, _, D = experts.gate_EID.shape
    total_EE = torch.zeros(E, E, dtype=torch.float64, device=experts.gate_EID.device)
    for block in _blocks(sample.hidden_nD.shape[0], floats_per_row=2 * E * D):
        y_cED = _all_outputs(experts, sample.hidden_nD[block].to(total_EE.device))
        unit_EP = normalize(y_cED, dim=-1, eps=TINY).transpose(0, 1).reshape(E, -1)
        total_EE += unit_EP @ unit_EP.T
    return (total_EE / max(sample.hidden_nD.shape[0], 1)).clamp(-1, 1).fill_diagonal_(1.0)


def within_layers(measure: Measure, sample: TokenSample, experts: Experts, owner_E: Tensor) -> Tensor:
    """``measure`` of the experts of each layer of a scope on the inputs of that layer; zero between layers.

    For measures that do not ask how tokens were routed.
    """
    layers = owner_E.unique()
    if layers.numel() == 1:
        return measure(sample, experts)
    device = experts.gate_EID.device
    joined_EE = torch.zeros(owner_E.numel(), owner_E.numel(), dtype=torch.float64, device=device)
    for layer in layers:
        own = (owner_E == layer).nonzero().flatten()
        known_n = ~sample.logits_nE[:, int(own[0])].isnan()
        inputs: dict[str, Any] = {name: tensor[known_n] for name, tensor in sample_tensors(sample).items()}
        own_EE = measure(replace(sample, **inputs), select(experts, own))
        joined_EE[own.to(device).unsqueeze(1), own.to(device)] = own_EE
    return joined_EE


@torch.no_grad()
def functional_distance(sample: TokenSample, experts: Experts) -> Tensor:
    """``F_ij = sum of g_i^2 ||E_i(x) - E_j(x)||^2 / sum of g_i^2 ||E_i(x)||^2`` over the sample tokens routed to i.

    Directed: the squared error that ``i`` answered for by ``j`` makes in the layer's output, relative to what ``i``
    contributes, before other experts and the residual. In a scope, ``j`` of another layer is fed the inputs of ``i``.

    An expert without sample tokens is judged on those that came nearest to choosing it: the ``STAND_INS`` tokens of
    its layer with the highest router logit, with equal gates; it will be chosen by tokens like them if by any. Where a
    ratio is 0 / 0 the two experts agree: 0. Where only the denominator is 0, or no token is known at all, 1: as wrong
    as leaving the expert out.

    Cost: ``n E`` expert evaluations (``6 n E D I`` operations) and ``n E k D`` for the differences; 128 MiB, or the
    outputs of all experts for 128 tokens in float32, whichever is more.
    """
    error_EE, energy_E, seen_E = _redirect_errors(experts, sample.hidden_nD, sample.index_nk, sample.weight_nk)
    unseen = (~seen_E).nonzero().flatten()
    for x_nD, index_n1 in _stand_ins(sample, unseen):
        ones_n1 = torch.ones_like(index_n1, dtype=torch.float32)
        more_EE, more_E, now_seen_E = _redirect_errors(experts, x_nD, index_n1, ones_n1)
        error_EE, energy_E, seen_E = error_EE + more_EE, energy_E + more_E, seen_E | now_seen_E
    known_EE = (seen_E & (energy_E > 0)).unsqueeze(1)
    undefined_EE = ((error_EE > 0) | ~seen_E.unsqueeze(1)).double()
    cost_EE = torch.where(known_EE, error_EE / energy_E.unsqueeze(1), undefined_EE)
    return cost_EE.fill_diagonal_(0.0)


def _redirect_errors(
    experts: Experts, x_nD: Tensor, index_nk: Tensor, weight_nk: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over routed slots of ``g_i^2 ||E_i - E_j||^2`` and ``g_i^2 ||E_i||^2``, and who got a slot at all."""
    E, _, D = experts.gate_EID.shape
    device = experts.gate_EID.device
    error_EE = torch.zeros(E, E, dtype=torch.float64, device=device)
    energy_E, seen_E = error_EE.new_zeros(E), torch.zeros(E, dtype=torch.bool, device=device)
    for block in _blocks(x_nD.shape[0], floats_per_row=E * D, least=LEAST_ROWS):
        # every expert runs on the same block, so that duplicates agree bit for bit
        y_cED = _all_outputs(experts, x_nD[block].to(device))
        index_ck = index_nk[block].to(device).long()
        routed_ck, slot_ck = index_ck >= 0, index_ck.clamp_min(0)
        square_ck = weight_nk[block].to(device).double().square() * routed_ck
        error_ckE, energy_ck = _slot_errors(y_cED, slot_ck)
        add_at(error_EE, 0, slot_ck.flatten(), (error_ckE * square_ck.unsqueeze(-1)).flatten(0, 1))
        add_at(energy_E, 0, slot_ck.flatten(), (energy_ck * square_ck).flatten())
        seen_E[slot_ck[routed_ck]] = True
    return error_EE, energy_E, seen_E


def _slot_errors(y_cED: Tensor, slot_ck: Tensor) -> tuple[Tensor, Tensor]:
    """``||a - b||^2`` and ``||a||^2`` for the output ``a`` of each slot and the output ``b`` of each expert.

    As ``||b||^2 - ||a||^2 + 2 (<a, a> - <a, b>)``, where most of the rounding cancels when ``a`` and ``b`` are equal;
    subtracting vectors would move ``k`` times as much memory.
    """
    own_ckD = y_cED[torch.arange(slot_ck.shape[0], device=slot_ck.device).unsqueeze(1), slot_ck]
    dot_ckE = (own_ckD @ y_cED.mT).double()
    square_cE = torch.linalg.vector_norm(y_cED, dim=-1).double().square()
    own_ck1 = slot_ck.unsqueeze(-1)
    energy_ck1 = square_cE.unsqueeze(1).expand_as(dot_ckE).gather(2, own_ck1)
    error_ckE = square_cE.unsqueeze(1) - energy_ck1 + 2 * (dot_ckE.gather(2, own_ck1) - dot_ckE)
    return error_ckE.clamp_min(0), energy_ck1.squeeze(-1)


def _all_outputs(experts: Experts, x_cD: Tensor) -> Tensor:
    E = experts.gate_EID.shape[0]
    precision = torch.promote_types(experts.gate_EID.dtype, torch.float32)
    y_cED = torch.empty(x_cD.shape[0], E, x_cD.shape[1], dtype=precision, device=x_cD.device)
    for expert in range(E):
        y_cED[:, expert] = expert_output(experts, expert, x_cD)
    return y_cED


def _stand_ins(sample: TokenSample, unseen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """``(x_mD, index_m1)`` for each expert without tokens: the inputs whose logit for it is highest."""
    for expert in unseen.tolist():
        logit_n = sample.logits_nE[:, expert].float()
        logit_n = torch.where(torch.isnan(logit_n), -torch.inf, logit_n)
        order_n = logit_n.argsort(descending=True, stable=True)[:STAND_INS]
        order_n = order_n[logit_n[order_n] > -torch.inf]
        if order_n.numel():
            yield sample.hidden_nD[order_n], torch.full((order_n.numel(), 1), expert)


def _matrices(experts: Experts) -> tuple[tuple[Tensor, Tensor | None], ...]:
    return (
        (experts.gate_EID, experts.gate_bias_EI),
        (experts.up_EID, experts.up_bias_EI),
        (experts.down_EDI, experts.down_bias_ED),
    )


def _squared_distance(matrix_Eab: Tensor, bias_Ea: Tensor | None) -> tuple[Tensor, Tensor]:
    """``||W_i - W_j||^2`` and ``||W_i|| + ||W_j||`` of one matrix, with its bias as one more column."""
    parts = _parts(matrix_Eab, bias_Ea)
    dot_EE = torch.stack([_gram(part) for part in parts]).sum(dim=0)
    square_E = dot_EE.diagonal()
    norm_EE = square_E.sqrt().unsqueeze(0) + square_E.sqrt().unsqueeze(1)
    square_EE = (square_E.unsqueeze(0) + square_E.unsqueeze(1) - 2 * dot_EE).clamp_min(0)
    for i, j in (square_EE <= CLOSE * norm_EE.square()).triu(1).nonzero().tolist():
        square_EE[i, j] = square_EE[j, i] = _squared_difference(parts, i, j)
    return square_EE, norm_EE


def _parts(matrix_Eab: Tensor, bias_Ea: Tensor | None) -> list[Tensor]:
    return [matrix_Eab] if bias_Ea is None else [matrix_Eab, bias_Ea.unsqueeze(-1)]


def _gram(matrix_Eab: Tensor) -> Tensor:
    """``<W_i, W_j>`` for all pairs: float32 within a block of rows, float64 between blocks."""
    E, _, b = matrix_Eab.shape
    precision = torch.promote_types(matrix_Eab.dtype, torch.float32)
    dot_EE = torch.zeros(E, E, dtype=torch.float64, device=matrix_Eab.device)
    for block in _blocks(matrix_Eab.shape[1], floats_per_row=8 * E * b):
        flat_EP = matrix_Eab[:, block].reshape(E, -1).to(precision)
        dot_EE += flat_EP @ flat_EP.T
    return dot_EE


def _squared_difference(parts: Sequence[Tensor], i: int, j: int) -> Tensor:
    differences = [(part[i].double() - part[j].double()).square().sum() for part in parts]
    return torch.stack(differences).sum()


def _pairwise(a_iD: Tensor, b_jD: Tensor) -> Tensor:
    # by subtraction, not by dot products: those cancel exactly where experts are alike
    return torch.cdist(a_iD, b_jD, compute_mode="donot_use_mm_for_euclid_dist")


def _blocks(length: int, floats_per_row: int, least: int = 1) -> Iterator[slice]:
    step = max(least, BLOCK_BYTES // (4 * floats_per_row))
    return (slice(start, start + step) for start in range(0, length, step))
