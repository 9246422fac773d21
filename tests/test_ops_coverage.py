"""Facility location: the search against brute force and mixed-integer programming."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conmoe.ops import coverage
from conmoe.types import UsageError


def instance(E: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cost_EE = torch.rand(E, E, generator=generator, dtype=torch.float64).fill_diagonal_(0)
    return cost_EE, torch.rand(E, generator=generator, dtype=torch.float64)


def best(cost_EE: Tensor, weight_E: Tensor, keep: int, owner_E: Tensor, min_own: int) -> float:
    sets = (torch.tensor(chosen) for chosen in combinations(range(weight_E.numel()), keep))
    lawful = (kept for kept in sets if all((owner_E[kept] == layer).sum() >= min_own for layer in owner_E.unique()))
    return min(coverage.objective(cost_EE, weight_E, kept) for kept in lawful)


@settings(max_examples=40, deadline=None)
@given(E=st.integers(2, 8), keep=st.integers(1, 8), min_own=st.integers(0, 2), seed=st.integers(0, 10**6))
def test_search_is_locally_and_programming_globally_optimal(E: int, keep: int, min_own: int, seed: int):
    cost_EE, weight_E = instance(E, seed)
    owner_E = (torch.arange(E) >= E // 2).long()
    keep = min(keep, E)
    min_own = min(min_own, keep // 2, E // 2)
    optimum = best(cost_EE, weight_E, keep, owner_E, min_own)
    exact = coverage.cover_exactly(cost_EE, weight_E, keep, owner_E, min_own)
    found = coverage.cover(cost_EE, weight_E, keep, owner_E, min_own)
    assert found.unique().numel() == keep
    assert coverage.objective(cost_EE, weight_E, exact) == pytest.approx(optimum, abs=1e-9)
    value = coverage.objective(cost_EE, weight_E, found)
    assert value >= optimum - 1e-9
    for out in found.tolist():
        for into in set(range(E)) - set(found.tolist()):
            swapped = torch.tensor(sorted({*found.tolist(), into} - {out}))
            if all((owner_E[swapped] == layer).sum() >= min_own for layer in (0, 1)):
                assert coverage.objective(cost_EE, weight_E, swapped) >= value - 1e-9
    assert all((owner_E[found] == layer).sum() >= min_own for layer in (0, 1))


def test_search_is_near_the_optimum_and_better_than_greedy_alone():
    gaps = {"greedy": 0.0, "swap": 0.0}
    for seed in range(30):
        cost_EE, weight_E = instance(14, seed)
        optimum = coverage.objective(cost_EE, weight_E, coverage.cover_exactly(cost_EE, weight_E, 5))
        weighted_EE, owner_E = coverage._prepare(cost_EE, weight_E, 5, None, 0)
        greedy = torch.from_numpy(coverage.greedy(weighted_EE, 5, owner_E, 0))
        gaps["greedy"] += coverage.objective(cost_EE, weight_E, greedy) / optimum - 1
        gaps["swap"] += coverage.objective(cost_EE, weight_E, coverage.cover(cost_EE, weight_E, 5)) / optimum - 1
    assert gaps["swap"] / 30 < 0.03
    assert gaps["swap"] < gaps["greedy"] / 2


def test_duplicates_are_covered_by_one_of_each():
    cost_EE = torch.ones(4, 4, dtype=torch.float64)
    cost_EE[:2, :2] = cost_EE[2:, 2:] = 0
    assert coverage.cover(cost_EE, torch.ones(4), 2).tolist() == [0, 2]


def test_ties_go_to_the_lowest_index():
    cost_EE = 1 - torch.eye(6, dtype=torch.float64)
    assert coverage.cover(cost_EE, torch.ones(6), 3).tolist() == [0, 1, 2]
    assert coverage.nearest(cost_EE, torch.tensor([4, 2])).tolist() == [0, 0, 0, 0, 1, 0]


def test_a_prototype_answers_for_itself_even_beside_its_duplicate():
    assert coverage.nearest(torch.zeros(3, 3), torch.tensor([1, 2])).tolist() == [0, 0, 1]


def test_costs_are_directed():
    # everyone can be answered for by 2, and 2 by nobody
    cost_EE = torch.tensor([[0.0, 1, 0], [1, 0, 0], [9, 9, 0]])
    assert coverage.cover(cost_EE, torch.ones(3), 1).tolist() == [2]


def test_swaps_leave_a_layer_its_own():
    # 2 and 3 would cover everyone; layer 0 keeps one of its two all the same
    cost_EE = torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 0]])
    owner_E = torch.tensor([0, 0, 1, 1])
    assert coverage.cover(cost_EE, torch.ones(4), 2).tolist() == [2, 3]
    assert coverage.cover(cost_EE, torch.ones(4), 2, owner_E, 1).tolist() == [0, 2]


def test_a_scope_that_cannot_be_served_is_refused():
    with pytest.raises(UsageError, match="lower min_own"):
        coverage.cover(torch.zeros(4, 4), torch.ones(4), 2, torch.tensor([0, 0, 1, 1]), 2)


def test_five_hundred_experts_take_moments():
    generator = torch.Generator().manual_seed(0)
    point_ED = torch.randn(512, 8, generator=generator)
    cost_EE = torch.cdist(point_ED, point_ED).square().double()
    weight_E = torch.rand(512, generator=generator)
    kept = coverage.cover(cost_EE, weight_E, 128)
    assert coverage.objective(cost_EE, weight_E, kept) < coverage.objective(cost_EE, weight_E, torch.arange(128)) * 0.8
