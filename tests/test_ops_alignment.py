"""Alignment of hidden units: against brute force, and by what it must not change."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from conmoe.ops import alignment
from conmoe.ops.experts import tensors
from conmoe.types import ConmoeError, Experts
from tests.layers import answer, random_experts


def shuffled(experts: Experts, *, noise: float = 0.0) -> tuple[Experts, Tensor]:
    """Every expert is expert 0 with its hidden units in another order; and those orders (unit by unit)."""
    E, width, _ = experts.gate_EID.shape
    generator = torch.Generator().manual_seed(7)
    order_EI = torch.stack([torch.arange(width), *(torch.randperm(width, generator=generator) for _ in range(E - 1))])

    def rows(tensor_E: Tensor) -> Tensor:
        return torch.stack([tensor_E[0][order_I] for order_I in order_EI])

    moved = {name: rows(value) for name, value in tensors(experts).items() if name not in ("down_EDI", "down_bias_ED")}
    moved["down_EDI"] = torch.stack([experts.down_EDI[0][:, order_I] for order_I in order_EI])
    if experts.down_bias_ED is not None:
        moved["down_bias_ED"] = experts.down_bias_ED[:1].expand(E, -1)
    moved = {name: value + noise * torch.randn(value.shape, generator=generator) for name, value in moved.items()}
    return replace(experts, **moved), order_EI


def matching(experts: Experts, kind: str):
    x_nD = torch.randn(64, experts.gate_EID.shape[2], generator=torch.Generator().manual_seed(1))
    return {
        "weight": partial(alignment.weight_affinity, experts),
        "activation": partial(alignment.activation_affinity, experts, x_nD),
    }[kind]


@pytest.mark.parametrize("kind", ["weight", "activation"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_recovers_a_hidden_permutation_exactly(kind: str, bias: bool, noise: float):
    experts, order_EI = shuffled(random_experts(3, bias=bias), noise=noise)
    permutation_EI = alignment.align(experts, torch.zeros(3, dtype=torch.int64), matching(experts, kind))
    for order_I, permutation_I in zip(order_EI, permutation_EI, strict=True):
        assert order_I[permutation_I].tolist() == list(range(12))


@pytest.mark.parametrize("bias", [False, True])
def test_aligned_copies_average_to_the_expert_itself(bias: bool):
    experts, _ = shuffled(random_experts(4, bias=bias))
    permutation_EI = alignment.align(experts, torch.zeros(4, dtype=torch.int64), matching(experts, "weight"))
    mixed = alignment.mix_aligned(experts, torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]]), permutation_EI)
    assert mixed.keys() == tensors(experts).keys()
    for name, tensor in tensors(experts).items():
        torch.testing.assert_close(mixed[name][0], tensor[0])
        torch.testing.assert_close(mixed[name][1], tensor[0])


@pytest.mark.parametrize("bias", [False, True])
def test_permuting_hidden_units_leaves_the_function_alone(bias: bool):
    experts = random_experts(2, bias=bias)
    permutation_I = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    permuted = replace(experts, **alignment.permute(tensors(experts), permutation_I))
    assert not torch.equal(permuted.gate_EID, experts.gate_EID)
    x_D = torch.randn(16, generator=torch.Generator().manual_seed(4))
    for expert in range(2):
        torch.testing.assert_close(answer(permuted, expert, x_D), answer(experts, expert, x_D))


def test_one_expert_is_permuted_like_several():
    experts = random_experts(2, bias=True)
    permutation_I = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    together = alignment.permute(tensors(experts), permutation_I)
    alone = alignment.permute({name: tensor[1] for name, tensor in tensors(experts).items()}, permutation_I)
    assert all(torch.equal(alone[name], together[name][1]) for name in together)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bias", [False, True])
def test_weight_matching_is_the_nearest_of_all_orders(seed: int, bias: bool):
    experts = random_experts(2, width=5, seed=seed, bias=bias)
    found = alignment.match(alignment.weight_affinity(experts, 0, 1))

    def distance(order: tuple[int, ...]) -> float:
        moved = alignment.permute({name: tensor[1] for name, tensor in tensors(experts).items()}, torch.tensor(order))
        return sum(
            float((moved[name] - tensor[0]).double().square().sum()) for name, tensor in tensors(experts).items()
        )

    nearest = min(permutations(range(5)), key=distance)
    assert tuple(found.tolist()) == nearest


@pytest.mark.parametrize("seed", range(5))
def test_activation_matching_is_the_most_correlated_of_all_orders(seed: int):
    experts = random_experts(2, width=5, seed=seed, bias=True)
    x_nD = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed)) + 3.0
    assert experts.gate_bias_EI is not None
    assert experts.up_bias_EI is not None
    hidden = []
    for expert in range(2):
        gate = experts.gate_EID[expert] @ x_nD.T + experts.gate_bias_EI[expert, :, None]
        up = experts.up_EID[expert] @ x_nD.T + experts.up_bias_EI[expert, :, None]
        hidden.append((gate * torch.sigmoid(gate) * up).double().numpy())
    naive_II = np.corrcoef(hidden[0], hidden[1])[:5, 5:]
    affinity_II = alignment.activation_affinity(experts, x_nD, 0, 1)
    np.testing.assert_allclose(affinity_II.numpy(), naive_II, atol=1e-5)
    best = max(permutations(range(5)), key=lambda order: naive_II[range(5), order].sum())
    assert tuple(alignment.match(affinity_II).tolist()) == best


def test_activations_are_summed_over_blocks_of_tokens(monkeypatch: pytest.MonkeyPatch):
    experts, x_nD = random_experts(2), torch.randn(50, 16, generator=torch.Generator().manual_seed(2)) + 1.0
    whole_II = alignment.activation_affinity(experts, x_nD, 0, 1)
    monkeypatch.setattr(alignment, "BLOCK_BYTES", 16 * 12 * 7)
    torch.testing.assert_close(alignment.activation_affinity(experts, x_nD, 0, 1), whole_II, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 20])
def test_units_that_never_change_are_correlated_with_nothing(n: int):
    experts = random_experts(2)
    experts.gate_EID[0, 3] = 0.0
    x_nD = torch.randn(n, 16, generator=torch.Generator().manual_seed(2))
    affinity_II = alignment.activation_affinity(experts, x_nD, 0, 1)
    assert torch.isfinite(affinity_II).all()
    assert not affinity_II[3].any()
    assert n == 20 or not affinity_II.any()


def test_units_that_may_as_well_stay_stay():
    equal_II = torch.ones(6, 6)
    assert alignment.match(equal_II).tolist() == list(range(6))
    # units 0 and 1 are alike, and so are 4 and 5; only 2 and 3 gain by changing places
    unit_IF = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 1], [1, 1, 1]])
    other_IF = unit_IF[[0, 1, 3, 2, 4, 5]]
    assert alignment.match(unit_IF @ other_IF.T).tolist() == [0, 1, 3, 2, 4, 5]
    rounding_II = 1e-9 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    assert alignment.match(equal_II + rounding_II).tolist() == list(range(6))


def test_experts_that_are_their_own_reference_stay_as_they_are():
    experts, order_EI = shuffled(random_experts(4))
    permutation_EI = alignment.align(experts, torch.tensor([0, 1, 1, 3]), matching(experts, "weight"))
    assert permutation_EI[[0, 1, 3]].tolist() == [list(range(12))] * 3
    assert torch.equal(order_EI[2][permutation_EI[2]], order_EI[1])


def test_half_precision_copies_are_exact_and_mixtures_are_rounded_once():
    experts = random_experts(3, dtype=torch.bfloat16)
    permutation_EI = alignment.align(experts, torch.tensor([0, 0, 2]), matching(experts, "weight"))
    mixed = alignment.mix_aligned(experts, torch.tensor([[0.7, 0.3, 0], [0, 0, 1]]), permutation_EI)
    assert torch.equal(mixed["down_EDI"][1], experts.down_EDI[2])
    exact = 0.7 * experts.gate_EID[0].double() + 0.3 * experts.gate_EID[1].double()[permutation_EI[1]]
    assert mixed["gate_EID"].dtype == torch.bfloat16
    assert (mixed["gate_EID"][0] != exact.bfloat16()).float().mean() < 0.02


def test_affinities_that_are_not_finite_are_refused():
    with pytest.raises(ConmoeError, match="not finite"):
        alignment.match(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))
