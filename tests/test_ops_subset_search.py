"""Search for the experts to keep, and its loss, against loops over tokens and over all sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from conmoe.ops import subset_search
from conmoe.ops.skipping import skip_threshold
from conmoe.ops.subset_search import Kept, Loss, Reroute, exchange, exhaustive, fewest_changes, remove_greedily
from conmoe.types import ConmoeError, Experts, TokenSample
from tests.layers import answer, random_experts


def router(E: int, D: int, k: int, *, renormalised: bool, seed: int) -> Reroute:
    """A softmax router of its own rows: what is left of it without the others."""
    rows_ED = torch.randn(E, D, generator=torch.Generator().manual_seed(2000 + seed))

    def reroute(hidden_nD: Tensor, kept_K: Tensor) -> tuple[Tensor, Tensor]:
        weight_nk, place_nk = (hidden_nD @ rows_ED[kept_K].T).softmax(dim=1).topk(k)
        return kept_K[place_nk], weight_nk / (weight_nk.sum(dim=1, keepdim=True) if renormalised else 1)

    return reroute


def observed(experts: Experts, reroute: Reroute, *, n: int = 30, seed: int = 0) -> TokenSample:
    E, _, D = experts.gate_EID.shape
    hidden_nD = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    index_nk, weight_nk = reroute(hidden_nD, torch.arange(E))
    return TokenSample(hidden_nD, index_nk, weight_nk, torch.zeros(n, E), torch.zeros(n))


def output(experts: Experts, hidden_nD: Tensor, index_nk: Tensor, weight_nk: Tensor) -> Tensor:
    y_nD = torch.zeros(hidden_nD.shape, dtype=torch.float64)
    for token, x_D in enumerate(hidden_nD):
        for expert, gate in zip(index_nk[token].tolist(), weight_nk[token].tolist(), strict=True):
            if expert >= 0:
                y_nD[token] += gate * answer(experts, expert, x_D).double()
    return y_nD


def naive_loss(sample: TokenSample, experts: Experts, reroute: Reroute, kept: Kept) -> float:
    before_nD = output(experts, sample.hidden_nD, sample.index_nk, sample.weight_nk)
    after_nD = output(experts, sample.hidden_nD, *reroute(sample.hidden_nD, torch.tensor(kept)))
    return float((before_nD - after_nD).square().sum() / before_nD.square().sum())


def small_problem(seed: int, E: int = 8, renormalised: bool = True) -> Loss:
    experts = random_experts(E, seed=seed)
    reroute = router(E, 16, 2, renormalised=renormalised, seed=seed)
    return subset_search.routed_loss(observed(experts, reroute, n=60, seed=seed), experts, reroute)


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_is_the_squared_change_of_the_output(renormalised: bool, bias: bool):
    experts = random_experts(6, bias=bias)
    reroute = router(6, 16, 2, renormalised=renormalised, seed=0)
    sample = observed(experts, reroute)
    loss = subset_search.routed_loss(sample, experts, reroute)
    for kept in [(0, 1), (2, 5), (0, 2, 3), (1, 2, 3, 4, 5)]:
        assert loss(kept) == pytest.approx(naive_loss(sample, experts, reroute, kept), rel=1e-5)
    assert loss((0, 1, 2, 3, 4, 5)) == 0.0


def test_slots_of_experts_outside_the_set_count_as_nothing():
    experts, inner = random_experts(6), router(6, 16, 3, renormalised=True, seed=1)

    def reroute(hidden_nD: Tensor, kept_K: Tensor) -> tuple[Tensor, Tensor]:
        index_nk, weight_nk = inner(hidden_nD, torch.cat([kept_K[kept_K < 4], torch.tensor([4, 5])]))
        return torch.where(index_nk < 4, index_nk, -1), weight_nk

    part = replace(experts, gate_EID=experts.gate_EID[:4], up_EID=experts.up_EID[:4], down_EDI=experts.down_EDI[:4])
    sample = observed(part, reroute)
    assert bool((sample.index_nk < 0).any())
    loss = subset_search.routed_loss(sample, part, reroute)
    for kept in [(0,), (1, 3), (0, 2, 3)]:
        assert loss(kept) == pytest.approx(naive_loss(sample, part, reroute, kept), rel=1e-5)


def test_loss_does_not_depend_on_blocks_of_tokens(monkeypatch):
    whole = small_problem(0)
    monkeypatch.setattr(subset_search, "BLOCK_BYTES", 4 * 8 * 16 * 7)
    blocks = small_problem(0)
    assert blocks((1, 3, 4)) == pytest.approx(whole((1, 3, 4)), rel=1e-5)


def test_duplicates_are_told_apart_from_nothing():
    experts = random_experts(4)
    twins = replace(
        experts,
        gate_EID=experts.gate_EID[[0, 1, 0, 1]],
        up_EID=experts.up_EID[[0, 1, 0, 1]],
        down_EDI=experts.down_EDI[[0, 1, 0, 1]],
    )
    ones = torch.ones(20, 1)

    def reroute(hidden_nD: Tensor, kept_K: Tensor) -> tuple[Tensor, Tensor]:
        """Expert 2 stands in for 0, and 3 for 1."""
        wanted = torch.arange(20).remainder(4)
        there = (wanted.unsqueeze(1) == kept_K).any(dim=1)
        return torch.where(there, wanted, (wanted + 2).remainder(4)).unsqueeze(1), ones

    sample = observed(twins, reroute, n=20)
    assert subset_search.routed_loss(sample, twins, reroute)((0, 3)) == 0.0


def test_gates_that_are_not_finite_are_an_error():
    experts = random_experts(4)
    reroute = router(4, 16, 2, renormalised=True, seed=0)

    def broken(hidden_nD: Tensor, kept_K: Tensor) -> tuple[Tensor, Tensor]:
        index_nk, weight_nk = reroute(hidden_nD, kept_K)
        return index_nk, weight_nk / 0 if kept_K.numel() < 4 else weight_nk

    with pytest.raises(ConmoeError, match="not finite"):
        subset_search.routed_loss(observed(experts, reroute), experts, broken)((0, 1))


def test_a_silent_layer_loses_nothing():
    experts = random_experts(4)
    reroute = router(4, 16, 2, renormalised=True, seed=0)
    silent = replace(experts, down_EDI=torch.zeros_like(experts.down_EDI))
    loss = subset_search.routed_loss(observed(silent, reroute), silent, reroute)
    assert fewest_changes(loss, 4, 2, 100) == (0, 1)
    assert loss((0, 1)) == 0.0


# The search ----------------------------------------------------------------------------------------------------------


def counted(loss: Loss) -> tuple[Loss, list[Kept]]:
    calls: list[Kept] = []

    def counting(kept: Kept) -> float:
        calls.append(kept)
        return loss(kept)

    return counting, calls


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("keep", [1, 2, 4, 7])
def test_exhaustive_search_finds_the_set_of_lowest_loss(keep: int, renormalised: bool):
    experts = random_experts(7 if keep < 7 else 8, seed=keep)
    E, k = experts.gate_EID.shape[0], min(keep, 2)
    reroute = router(E, 16, k, renormalised=renormalised, seed=keep)
    sample = observed(experts, reroute)
    best = fewest_changes(subset_search.routed_loss(sample, experts, reroute), E, keep, 100)
    losses = {kept: naive_loss(sample, experts, reroute, kept) for kept in combinations(range(E), keep)}
    assert losses[best] == pytest.approx(min(losses.values()), rel=1e-5)


@pytest.mark.parametrize(("E", "keep", "sets"), [(8, 4, 70), (6, 2, 15)])
def test_sets_are_tried_one_by_one_only_where_they_are_few(E: int, keep: int, sets: int):
    loss, calls = counted(small_problem(0, E))
    best = fewest_changes(loss, E, keep, sets)
    assert len(calls) == sets
    assert len(set(calls)) == sets
    loss, calls = counted(small_problem(0, E))
    assert loss(fewest_changes(loss, E, keep, sets - 1, least=2)) >= loss(best)
    assert {len(kept) for kept in calls} != {keep}


@pytest.mark.parametrize("renormalised", [False, True])
def test_greedy_search_with_exchanges_is_rarely_worse_than_trying_all(renormalised: bool):
    hits = 0
    for seed in range(12):
        loss = small_problem(seed, 9, renormalised)
        greedy = remove_greedily(loss, 9, 4)
        found = fewest_changes(loss, 9, 4, 100)
        best = exhaustive(loss, 9, 4)
        assert loss(best) <= loss(found) <= loss(greedy)
        hits += found == best
    assert hits >= 10


@pytest.mark.parametrize("seed", range(5))
def test_no_single_exchange_improves_what_was_found(seed: int):
    loss = small_problem(seed, 9)
    start = (0, 1, 2, 3)
    found = exchange(loss, start, 9, 1000)
    assert len(found) == 4
    assert loss(found) <= loss(start)
    for out, into in product(found, set(range(9)) - set(found)):
        assert loss(tuple(sorted((set(found) - {out}) | {into}))) >= loss(found) * (1 - 1e-6)


def test_exchanges_stop_after_so_many_that_do_not_help():
    loss, calls = counted(small_problem(1, 9))
    best = exhaustive(loss, 9, 4)
    assert exchange(loss, (0, 1, 2, 3), 9, 0) == (0, 1, 2, 3)
    calls.clear()
    assert exchange(loss, best, 9, 7) == best
    assert len(calls) == 7 + 9 + 1  # exchanges; each expert left out or added; the set itself
    assert exchange(loss, tuple(range(9)), 9, 1000) == tuple(range(9))


@pytest.mark.parametrize("limit", [0, 1000])
def test_the_router_is_never_left_with_fewer_experts_than_it_chooses(limit: int):
    loss, calls = counted(small_problem(1, 7))
    start = (0, 1)
    assert loss(exchange(loss, start, 7, 1000, least=2)) == pytest.approx(loss(exhaustive(loss, 7, 2)))
    assert loss(fewest_changes(loss, 7, 2, limit, least=2)) <= loss(start)
    assert min(len(kept) for kept in calls) == 2


def plainly_greedy(loss: Loss, E: int, keep: int) -> Kept:
    kept = list(range(E))
    while len(kept) > keep:
        after = {expert: loss(tuple(other for other in kept if other != expert)) for expert in kept}
        kept.remove(min(kept, key=lambda expert: (after[expert], -expert)))
    return tuple(kept)


@pytest.mark.parametrize("seed", range(5))
def test_lazy_removal_is_greedy_removal_where_removals_get_dearer(seed: int):
    """What it costs to answer each of 12 questions by the nearest expert left."""
    cost_QE = torch.rand(12, 10, generator=torch.Generator().manual_seed(seed)).double()
    loss, calls = counted(lambda kept: float(cost_QE[:, list(kept)].amin(dim=1).sum()))
    for keep in (1, 4, 9):
        assert remove_greedily(loss, 10, keep) == plainly_greedy(loss, 10, keep)
    calls.clear()
    remove_greedily(loss, 10, 2)
    assert len(calls) < sum(range(3, 11)), "as many losses as without a memory"


@pytest.mark.parametrize("search", [lambda loss: exhaustive(loss, 6, 3), lambda loss: fewest_changes(loss, 6, 3, 5)])
def test_ties_keep_the_lowest_indices(search: Callable[[Loss], Kept]):
    assert search(lambda kept: 1.0) == (0, 1, 2)


# Skipping ------------------------------------------------------------------------------------------------------------


def test_the_second_expert_is_skipped_on_half_of_the_tokens():
    weight_n2 = torch.rand(101, 2, generator=torch.Generator().manual_seed(0))
    beta = skip_threshold(weight_n2)
    ratios = sorted(min(pair) / max(pair) for pair in weight_n2.double().tolist())
    assert beta == pytest.approx(ratios[50])
    assert skip_threshold(weight_n2.flip(1)) == beta


def test_with_more_experts_the_last_is_compared_with_the_first():
    weight_n4 = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)).sort(dim=1, descending=True).values
    beta = skip_threshold(weight_n4)
    assert int((weight_n4[:, -1] < beta * weight_n4[:, 0]).sum()) == 20
    assert skip_threshold(weight_n4[:, [2, 0, 3, 1]]) == beta


@pytest.mark.parametrize(
    "weight_nk",
    [torch.full((5, 1), 0.3), torch.empty(0, 2), torch.zeros(4, 2)],
    ids=["one expert", "no tokens", "no gates"],
)
def test_nothing_is_skipped_without_two_gates_to_compare(weight_nk: Tensor):
    assert skip_threshold(weight_nk) == 0.0


def test_gates_that_are_equal_are_not_skipped():
    beta = skip_threshold(torch.full((3, 2), 0.5))
    assert 0.99 < beta < 1.0
    assert torch.tensor(beta, dtype=torch.float32) < 1.0
