"""Hidden units that move between experts, against loops over every pair of units."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conmoe.ops import units
from conmoe.types import Experts
from tests.layers import random_experts


def unit(experts: Experts, expert: int, row: int) -> Tensor:
    parts = [experts.gate_EID[expert, row], experts.up_EID[expert, row], experts.down_EDI[expert, :, row]]
    for bias in (experts.gate_bias_EI, experts.up_bias_EI):
        parts += [] if bias is None else [bias[expert, row].reshape(1)]
    return torch.cat(parts).double()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def related_experts(E: int, D: int, width: int, *, noise: float, bias: bool = False) -> Experts:
    """The same units in every expert, in another order each, and further from expert 0's the higher their row was."""
    experts = random_experts(E, D, width, bias=bias)
    order = torch.stack([torch.randperm(width, generator=torch.Generator().manual_seed(e)) for e in range(E)])
    scale_I = torch.linspace(0, noise, width)

    def relate(tensor: Tensor, axis: int) -> Tensor:
        shape = [1] * (tensor.ndim - 1)
        shape[axis - 1] = width
        near = tensor[:1] + scale_I.reshape(shape) * tensor
        return torch.stack([near[e].index_select(axis - 1, order[e]) for e in range(E)])

    related = {name: relate(getattr(experts, name), 1) for name in ("gate_EID", "up_EID")}
    related["down_EDI"] = relate(experts.down_EDI, 2)
    if bias:
        related |= {name: relate(getattr(experts, name), 1) for name in ("gate_bias_EI", "up_bias_EI")}
    return replace(experts, **related)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("D", [16, 160], ids=["looked up", "looked up by projections"])
def test_units_move_to_the_expert_of_the_most_similar_unit(D: int, bias: bool):
    experts = related_experts(5, D, 12, noise=1.5, bias=bias)
    assert (3 * D > units.PROJECTIONS) == (D == 160)
    moves = units.matching_units(experts, torch.tensor([0, 3]), torch.tensor([1, 2, 4]), 0.6, seed=0)
    found = {
        (e, row): target
        for e, row, target in zip(
            *(part.tolist() for part in (moves.source_M, moves.unit_M, moves.target_M)), strict=True
        )
    }
    assert list(found) == sorted(found)
    assert 0 < len(found) < 24
    for source in (0, 3):
        for row in range(12):
            mine = unit(experts, source, row)
            best = {t: max(cosine(mine, unit(experts, t, r)) for r in range(12)) for t in (1, 2, 4)}
            assert ((source, row) in found) == (max(best.values()) > 0.6)
            if (source, row) in found:  # projections may take a unit that is nearly as close for the closest
                assert best[found[source, row]] >= max(best.values()) - (0.0 if D == 16 else 0.01)


def test_units_of_no_length_stay_where_they_are():
    experts = random_experts(3)
    for tensor in (experts.gate_EID, experts.up_EID, experts.down_EDI):
        tensor[:2] = 0.0
    moves = units.matching_units(experts, torch.tensor([0]), torch.tensor([1, 2]), 0.01, seed=0)
    assert moves.source_M.numel() == 0


@pytest.mark.parametrize("bias", [False, True])
def test_units_and_tensors_are_two_views_of_an_expert(bias: bool):
    experts = random_experts(3, bias=bias, dtype=torch.bfloat16)
    vectors_IF = units.unit_vectors(experts, 1)
    assert torch.equal(vectors_IF[4].double(), unit(experts, 1, 4))
    assert torch.equal(units.moved_vectors(experts, torch.tensor([1]), torch.tensor([4])), vectors_IF[4:5])
    for name, tensor in units.as_tensors(experts, vectors_IF).items():
        assert torch.equal(tensor, getattr(experts, name)[1]), name


def clusters(own_IF: Tensor, guest_MF: Tensor, own_weight: float, weight_M: Tensor, iterations: int) -> list[list[int]]:
    """The guests of each own unit, by loops."""
    centres = list(own_IF)
    for _ in range(iterations + 1):
        members: list[list[int]] = [[] for _ in centres]
        for m, guest in enumerate(guest_MF):
            members[max(range(len(centres)), key=lambda c: cosine(guest, centres[c]))].append(m)
        centres = [
            own_weight * own / own.norm() + sum(weight_M[m] * guest_MF[m] / guest_MF[m].norm() for m in guests)
            for own, guests in zip(own_IF, members, strict=True)
        ]
    return members


@pytest.mark.parametrize("iterations", [0, 1, 10])
@pytest.mark.parametrize("seed", range(4))
def test_guests_are_merged_by_weighted_spherical_k_means(iterations: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    own_IF = torch.randn(4, 3, generator=generator).double()
    guest_MF = torch.randn(20, 3, generator=generator).double()
    weight_M = torch.rand(20, generator=generator).double()
    merged_IF, share_M = units.absorb(own_IF, guest_MF, 0.7, weight_M, iterations)
    for row, guests in enumerate(clusters(own_IF, guest_MF, 0.7, weight_M, iterations)):
        total = 0.7 + sum(float(weight_M[m]) for m in guests)
        mean_F = (0.7 * own_IF[row] + sum(weight_M[m] * guest_MF[m] for m in guests)) / total
        torch.testing.assert_close(merged_IF[row], mean_F)
        torch.testing.assert_close(share_M[guests], weight_M[guests] / total)


def test_an_expert_without_guests_or_weights_stays_bit_for_bit():
    own_IF = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    guest_MF = own_IF[:2] + 0.1
    assert torch.equal(units.absorb(own_IF, guest_MF[:0], 0.0, torch.zeros(0), 3)[0], own_IF)
    merged_IF, share_M = units.absorb(own_IF, guest_MF, 0.0, torch.zeros(2), 3)
    assert torch.equal(merged_IF, own_IF)
    assert share_M.tolist() == [0.0, 0.0]
    merged_IF, _ = units.absorb(own_IF, guest_MF[:1], 1.0, torch.ones(1), 3)
    assert torch.equal(merged_IF[1:], own_IF[1:])
