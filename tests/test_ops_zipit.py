"""Unit by unit merging against the algorithm as it is stated, one unit at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conmoe.ops.alignment import permute
from conmoe.ops.experts import tensors
from conmoe.ops.zipit import merge_units, zip_units
from conmoe.types import Experts
from tests.layers import answer, random_experts


def naive_zip(correlation_PP: Tensor, keep: int) -> list[list[int]]:
    """Always the most correlated two, the lowest first; the smaller correlation is handed on, a tenth of it."""
    groups = {p: [p] for p in range(correlation_PP.shape[0])}
    correlation = correlation_PP.tolist()
    while len(groups) > keep:
        pairs = [(-correlation[a][b], a, b) for a in groups for b in groups if a < b]
        _, a, b = min(pairs)
        for c in groups:
            if c not in (a, b):
                correlation[a][c] = correlation[c][a] = 0.1 * min(correlation[a][c], correlation[b][c])
        groups[a] += groups.pop(b)
    return [sorted(group) for group in groups.values()]


@pytest.mark.parametrize("keep", [1, 4, 7, 11])
@pytest.mark.parametrize("seed", range(4))
def test_zipping_merges_the_most_correlated_units_first(keep: int, seed: int):
    x = torch.randn(12, 9, generator=torch.Generator().manual_seed(seed)).double()
    x[:6] += 1  # or else nearly all correlations are small, and of either sign
    correlation_PP = torch.corrcoef(x)
    label_P = zip_units(correlation_PP, keep)
    groups = [(label_P == label).nonzero().flatten().tolist() for label in range(keep)]
    assert groups == sorted(naive_zip(correlation_PP, keep))


def test_zipping_breaks_ties_to_the_lowest_units():
    assert zip_units(torch.ones(5, 5), 3).tolist() == [0, 0, 1, 1, 2]


def hidden(experts: Experts, expert: int, x_D: Tensor) -> Tensor:
    gate_I, up_I = experts.gate_EID[expert] @ x_D, experts.up_EID[expert] @ x_D
    return gate_I / (1 + torch.exp(-gate_I)) * up_I


@pytest.mark.parametrize("seed", range(3))
def test_units_join_the_unit_of_the_dominant_expert_that_they_correlate_with_most(seed: int):
    experts = random_experts(4, seed=seed)
    x_nD = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))
    share = [0.2, 0.0, 0.5, 0.3]
    dominant, others = 2, (0, 3)
    activation = {e: torch.stack([hidden(experts, e, x_D) for x_D in x_nD], dim=1) for e in (0, 2, 3)}
    groups = [[(dominant, a)] for a in range(12)]
    for other in others:
        for unit in range(12):
            pairs = [torch.stack([activation[dominant][a], activation[other][unit]]) for a in range(12)]
            groups[max(range(12), key=lambda a: float(torch.corrcoef(pairs[a])[0, 1]))].append((other, unit))
    made = merge_units(experts, torch.tensor(share), dominant, x_nD, fixed=True)
    assert any(len(group) != 3 for group in groups), "an example in which all are matched one to one shows little"
    for a, group in enumerate(groups):
        mass = sum(share[e] for e, _ in group)
        for name in ("gate_EID", "up_EID"):
            expected = sum(share[e] * getattr(experts, name)[e, unit] for e, unit in group) / mass
            torch.testing.assert_close(made[name][a], expected)
        torch.testing.assert_close(
            made["down_EDI"][:, a], sum(share[e] * experts.down_EDI[e, :, unit] for e, unit in group)
        )


def shuffled_copies(E: int, bias: bool) -> Experts:
    """One expert, its hidden units in ``E`` different orders."""
    one = {name: tensor[0] for name, tensor in tensors(random_experts(1, bias=bias)).items()}
    generator = torch.Generator().manual_seed(3)
    copies = [permute(one, torch.randperm(12, generator=generator)) for _ in range(E)]
    stacked = {name: torch.stack([copy[name] for copy in copies]) for name in one}
    return replace(random_experts(E), **stacked)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_experts_that_differ_in_the_order_of_their_units_merge_without_loss(fixed: bool, bias: bool):
    experts = shuffled_copies(4, bias)
    x_nD = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    made = merge_units(experts, torch.tensor([0.1, 0.4, 0.2, 0.3]), 3, x_nD, fixed)
    merged = replace(experts, **{name: tensor.unsqueeze(0) for name, tensor in made.items()})
    for x_D in x_nD:
        torch.testing.assert_close(answer(merged, 0, x_D), answer(experts, 0, x_D))


@pytest.mark.parametrize("fixed", [True, False])
def test_without_tokens_units_merge_in_their_order(fixed: bool):
    experts, share_E = random_experts(3, bias=True), torch.tensor([0.5, 0.0, 0.5])
    made = merge_units(experts, share_E, 0, torch.empty(0, 16), fixed)
    for name, tensor in tensors(experts).items():
        torch.testing.assert_close(made[name], 0.5 * tensor[0] + 0.5 * tensor[2])


@pytest.mark.parametrize("fixed", [True, False])
def test_a_single_member_is_copied_bit_for_bit(fixed: bool):
    experts = random_experts(3, dtype=torch.bfloat16)
    made = merge_units(experts, torch.tensor([0.0, 1.0, 0.0]), 1, torch.randn(5, 16), fixed)
    assert all(torch.equal(made[name], tensor[1]) for name, tensor in tensors(experts).items())


@pytest.mark.parametrize("fixed", [True, False])
def test_silent_units_are_defined(fixed: bool):
    experts = random_experts(2)
    experts.gate_EID[:, :4] = 0.0
    made = merge_units(experts, torch.tensor([0.5, 0.5]), 0, torch.randn(20, 16), fixed)
    assert all(torch.isfinite(tensor).all() for tensor in made.values())
