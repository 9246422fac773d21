"""Low rank plus lines: against the singular value decomposition, naive rankings and brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from conmoe.ops import factors as F
from conmoe.ops import plans
from conmoe.types import ConmoeError, UsageError
from tests.layers import factored, random_experts


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def truncated(matrix_OI: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix_OI.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def dense(factors: F.Factors) -> Tensor:
    return factored(F.to_weights({"w": factors}), "w")


@pytest.mark.parametrize("shape", [(3, 9, 14), (2, 14, 9), (2, 8, 8)])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_the_low_rank_part_is_the_truncated_singular_value_decomposition(shape: tuple[int, ...], rank: int):
    matrix_KOI = draw(*shape)
    found = F.decompose({"w": matrix_KOI}, rank, 0.0)["w"]
    assert found.values_SA.shape[0] == 0
    assert found.left_KOr.shape == (shape[0], shape[1], rank)
    for k in range(shape[0]):
        torch.testing.assert_close(F.reconstruct(found)[k].double(), truncated(matrix_KOI[k], rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("structure", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(3, 6, 10), (3, 10, 6)])
def test_everything_kept_or_full_rank_is_the_matrix_itself(structure: F.Structure, shape: tuple[int, ...]):
    matrix_KOI = draw(*shape)
    for rank, ratio in ((2, 1.0), (6, 0.0), (99, 0.0), (0, 1.0)):
        found = F.decompose({"w": matrix_KOI}, rank, ratio, structure)["w"]
        assert found.left_KOr.shape[2] == min(rank, 6)
        torch.testing.assert_close(F.reconstruct(found), matrix_KOI, rtol=0, atol=1e-5)
    assert torch.equal(F.reconstruct(F.decompose({"w": matrix_KOI}, 0, 1.0, structure)["w"]), matrix_KOI)


@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_lines_of_highest_mean_energy_stay_over_all_matrices(structure: F.Structure):
    matrices = {"a": draw(3, 6, 10), "b": 1.2 * draw(3, 10, 6, seed=1)}
    found = F.decompose(matrices, 2, 0.25, structure)
    scored = []
    for name, matrix_KOI in matrices.items():
        for k in range(3):
            residual = matrix_KOI[k].double() - truncated(matrix_KOI[k], 2)
            lines = residual if structure == "rows" else residual.T
            scored += [(float((line**2).mean()), name, k * len(lines) + place) for place, line in enumerate(lines)]
    kept = sorted(scored, reverse=True)[: round(0.25 * len(scored))]
    assert 0 < sum(owner == "a" for _, owner, _ in kept) < len(kept) / 2, "ragged counts are the point"
    for name in matrices:
        assert found[name].index_S.tolist() == sorted(place for _, owner, place in kept if owner == name)
        torch.testing.assert_close(F.reconstruct(found[name]).double(), dense(found[name]), rtol=0, atol=1e-6)


def test_the_lines_kept_are_the_best_of_all_choices():
    matrix_KOI = draw(2, 4, 5, seed=3)
    found = F.decompose({"w": matrix_KOI}, 1, 3 / 8)["w"]
    residual_LI = (matrix_KOI.double() - torch.stack([truncated(matrix, 1) for matrix in matrix_KOI])).flatten(0, 1)

    def error(kept: tuple[int, ...]) -> float:
        return float(residual_LI[[line for line in range(8) if line not in kept]].square().sum())

    best = min(combinations(range(8), 3), key=error)
    assert tuple(found.index_S.tolist()) == best
    wrong = (F.reconstruct(found).double() - matrix_KOI.double()).square().sum()
    assert float(wrong) == pytest.approx(error(best), rel=1e-5)


@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_with_inputs_the_lines_kept_leave_the_least_output_error(structure: F.Structure):
    matrix_KOI = draw(2, 4, 4, seed=4)
    x_KnI = draw(2, 30, 4, seed=6) * torch.tensor([0.1, 3.0, 1.0, 0.5]) * torch.tensor([1.0, 2.0]).view(2, 1, 1)
    weighted = F.decompose({"w": matrix_KOI}, 1, 2 / 8, structure, lambda name, k: x_KnI[k])["w"]
    residual_KOI = matrix_KOI.double() - torch.stack([truncated(matrix, 1) for matrix in matrix_KOI])

    def error(kept: tuple[int, ...]) -> float:
        total = 0.0
        for k in range(2):
            for line in set(range(4 * k, 4 * k + 4)) - set(kept):
                part = torch.zeros(4, 4, dtype=torch.float64)
                if structure == "rows":
                    part[line % 4] = residual_KOI[k, line % 4]
                else:
                    part[:, line % 4] = residual_KOI[k, :, line % 4]
                total += float((x_KnI[k].double() @ part.T).square().sum())
        return total

    assert tuple(weighted.index_S.tolist()) == min(combinations(range(8), 2), key=error)
    assert weighted.index_S.tolist() != F.decompose({"w": matrix_KOI}, 1, 2 / 8, structure)["w"].index_S.tolist()


def test_with_inputs_names_are_compared_by_shares_of_their_own_outputs():
    matrix_KOI = draw(2, 4, 6)
    x_nI = draw(9, 6, seed=1)
    small, large = {"a": matrix_KOI, "b": matrix_KOI}, {"a": matrix_KOI, "b": 64 * matrix_KOI}
    by_share = [F.decompose(both, 1, 0.5, "rows", lambda name, k: x_nI) for both in (small, large)]
    for name in "ab":
        assert torch.equal(by_share[0][name].index_S, by_share[1][name].index_S)
    assert F.decompose(large, 1, 0.5)["a"].index_S.numel() == 0


def test_inputs_nobody_sent_are_no_reason_for_nan():
    found = F.decompose({"w": draw(2, 4, 6)}, 1, 0.5, "rows", lambda name, k: torch.zeros(0, 6))["w"]
    assert found.index_S.tolist() == [0, 1, 2, 3]
    assert torch.isfinite(F.reconstruct(found)).all()


@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_matrices_of_zeros_and_of_low_rank(structure: F.Structure):
    low = draw(1, 7, 2) @ draw(1, 2, 9)
    found = F.decompose({"w": torch.cat([torch.zeros(1, 7, 9), low])}, 4, 0.2, structure)["w"]
    torch.testing.assert_close(F.reconstruct(found), torch.cat([torch.zeros(1, 7, 9), low]), rtol=0, atol=1e-5)
    assert not F.reconstruct(found)[0].any()


def test_half_precision_rows_make_good_what_rounding_the_factors_cost():
    matrix_KOI = draw(2, 24, 40, dtype=torch.bfloat16)
    found = F.decompose({"w": matrix_KOI}, 8, 0.5)["w"]
    assert found.left_KOr.dtype == found.right_KrI.dtype == found.values_SA.dtype == torch.bfloat16
    kept = found.index_S
    wrong_LI = (F.reconstruct(found) - matrix_KOI.float()).flatten(0, 1).abs()
    assert float((wrong_LI[kept] / found.values_SA.float().abs().clamp_min(1e-6)).max()) < 2**-7
    assert float(F.reconstruct(found).sub(matrix_KOI).norm()) < float(matrix_KOI.float().norm())


def test_elements_are_what_is_stored():
    found = F.decompose({"w": draw(3, 6, 10)}, 2, 0.5)["w"]
    assert F.elements(found) == 3 * (6 * 2 + 2 * 10) + 9 * 10
    assert F.elements(F.decompose({"w": draw(3, 6, 10)}, 2, 0.5, "columns")["w"]) == 3 * (6 * 2 + 2 * 10) + 15 * 6


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4)])
def test_stable_rank_equals_its_definition(shape: tuple[int, int]):
    matrix_OI = draw(*shape)
    values = torch.linalg.svdvals(matrix_OI.double())
    assert F.stable_rank(matrix_OI) == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-5)
    assert F.stable_rank(torch.eye(6)) == pytest.approx(6)
    assert F.stable_rank(torch.ones(3, 4)) == pytest.approx(1)
    assert F.stable_rank(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("structure", ["rows", "columns"])
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2], [0]])
def test_taking_experts_takes_their_lines(structure: F.Structure, order: list[int]):
    found = F.decompose({"w": draw(3, 6, 10)}, 2, 0.4, structure)["w"]
    torch.testing.assert_close(dense(F.take(found, torch.tensor(order))), dense(found)[order])


@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_joining_parts_of_different_rank(structure: F.Structure):
    parts = [
        F.decompose({"w": draw(2, 6, 10)}, 2, 0.4, structure)["w"],
        F.exact(draw(1, 6, 10, seed=1), structure),
        F.decompose({"w": draw(2, 6, 10, seed=2)}, 3, 0.0, structure)["w"],
    ]
    joined = F.concatenate(parts)
    torch.testing.assert_close(dense(joined), torch.cat([dense(part) for part in parts]))
    assert torch.equal(F.reconstruct(joined)[2], draw(1, 6, 10, seed=1)[0])


@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_factors_travel_among_the_weights_of_a_plan(structure: F.Structure):
    made = F.decompose({"gate_EID": draw(2, 6, 10), "down_EDI": draw(2, 10, 6)}, 2, 0.3, structure)
    weights = F.to_weights(made) | {"gate_bias_EI": torch.ones(2, 6)}
    assert {f"gate_EID.{part}" for part in ("left", "right", f"values_{structure}", "index")} < weights.keys()
    found, others = F.from_weights(weights)
    assert list(others) == ["gate_bias_EI"]
    assert found.keys() == made.keys()
    for name, item in made.items():
        assert found[name].structure == structure
        assert torch.equal(F.reconstruct(found[name]), F.reconstruct(item))


@pytest.mark.parametrize("structure", ["rows", "columns"])
def test_plans_of_parts_keep_their_factors_and_everything_else_exactly(structure: F.Structure):
    experts = random_experts(7)
    names = ("gate_EID", "down_EDI")
    made = [
        F.decompose({name: getattr(random_experts(2, seed=seed), name) for name in names}, rank, 0.3, structure)
        for seed, rank in ((1, 3), (2, 4))
    ]
    refitted_KDI = draw(2, 16, 12, seed=9)
    parts = [
        replace(plans.prune(torch.tensor([0, 1]), 2), weights=F.to_weights(made[0])),
        replace(plans.identity(2), weights=F.to_weights(made[1])),
        plans.identity(1),
        replace(plans.identity(2), weights={"down_EDI": refitted_KDI}),
    ]
    subsets = [torch.tensor([5, 0]), torch.tensor([3, 1]), torch.tensor([4]), torch.tensor([6, 2])]
    joined = plans.embed(parts, subsets, 7, experts=experts)
    assert joined.assignment_E.tolist() == list(range(7))
    found, others = F.from_weights(joined.weights)
    assert found.keys() == set(names)
    assert not others
    for name in names:
        matrix_KOI = dense(found[name])
        assert found[name].left_KOr.shape[2] == 4
        for item, subset in zip(made, subsets, strict=False):
            torch.testing.assert_close(matrix_KOI[subset], dense(item[name]))
        assert torch.equal(matrix_KOI[4], getattr(experts, name)[4].double())
        last = refitted_KDI if name == "down_EDI" else getattr(experts, name)[[6, 2]]
        assert torch.equal(matrix_KOI[[6, 2]], last.double())
    with pytest.raises(ConmoeError, match="experts are at hand"):
        plans.embed(parts, subsets, 7)


def test_refusals():
    with pytest.raises(UsageError, match="rank"):
        F.decompose({"w": draw(1, 3, 3)}, -1, 0.5)
    with pytest.raises(UsageError, match="ratio"):
        F.decompose({"w": draw(1, 3, 3)}, 1, 1.5)
    with pytest.raises(ConmoeError, match="finite"):
        F.decompose({"w": torch.full((1, 3, 3), torch.nan)}, 1, 0.5)
    with pytest.raises(ConmoeError, match="rows cannot"):
        F.concatenate([F.exact(draw(1, 3, 3), "rows"), F.exact(draw(1, 3, 3), "columns")])
    whole = F.exact(draw(1, 3, 4), "rows")
    for broken in ([2, 1, 0], [0, 1, 3], [0, 0, 1], [-1, 0, 1]):
        with pytest.raises(ConmoeError, match="in order"):
            F.Factors(whole.left_KOr, whole.right_KrI, whole.values_SA, torch.tensor(broken), "rows")
    with pytest.raises(ConmoeError, match="fit together"):
        F.Factors(whole.left_KOr, whole.right_KrI, whole.values_SA, whole.index_S, "columns")
