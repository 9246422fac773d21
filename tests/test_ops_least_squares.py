"""Ridge with a prior from streamed sums, against the same problem written out as one large least-squares system."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conmoe.ops import least_squares
from conmoe.ops.least_squares import Gram
from conmoe.types import ConmoeError

WIDTH, RESPONSES = 6, 4


def problem(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Regressors (float32, one of them far smaller than the others), responses, weights, a prior and its bias."""
    generator = torch.Generator().manual_seed(seed)
    h_nI, y_nD = torch.randn(n, WIDTH, generator=generator), torch.randn(n, RESPONSES, generator=generator)
    h_nI[:, 0] *= 1e-3
    weight_n = torch.rand(n, generator=generator)
    prior_DI, bias_D = torch.randn(RESPONSES, WIDTH, generator=generator), torch.randn(RESPONSES, generator=generator)
    return h_nI, y_nD, weight_n, prior_DI, bias_D


def sums(h_nI: Tensor, y_nD: Tensor, weight_n: Tensor | None = None, *, intercept: bool = False) -> Gram:
    gram = least_squares.zeros(h_nI.shape[1], y_nD.shape[1], intercept=intercept)
    return least_squares.add(gram, h_nI, y_nD, weight_n)


def stacked(h_nI: Tensor, y_nD: Tensor, weight_n: Tensor, lam_I: Tensor, prior_DI: Tensor) -> Tensor:
    """The minimiser, as ordinary least squares: one more row for every penalised coefficient."""
    root_n1 = weight_n.double().sqrt().unsqueeze(1)
    left = torch.cat([root_n1 * h_nI.double(), lam_I.sqrt().diag()])
    right = torch.cat([root_n1 * y_nD.double(), lam_I.sqrt().unsqueeze(1) * prior_DI.double().T])
    return torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("ridge", [1e-4, 0.3])
@pytest.mark.parametrize("intercept", [False, True])
def test_ridge_equals_the_stacked_least_squares_problem(n: int, ridge: float, intercept: bool):
    h_nI, y_nD, weight_n, prior_DI, bias_D = problem(n)
    square_I = (weight_n.double().unsqueeze(1) * h_nI.double().square()).sum(dim=0)
    lam_I = ridge * square_I.mean().expand(WIDTH)
    wide_nI, wide_DI = h_nI, prior_DI
    if intercept:
        wide_nI = torch.cat([h_nI, torch.ones(n, 1)], dim=1)
        wide_DI = torch.cat([prior_DI, bias_D.unsqueeze(1)], dim=1)
        lam_I = torch.cat([lam_I, ridge * weight_n.double().sum().reshape(1)])
    expected = stacked(wide_nI, y_nD, weight_n, lam_I, wide_DI)
    weight_DI, found_D = least_squares.solve(
        sums(h_nI, y_nD, weight_n, intercept=intercept), ridge, prior_DI, bias_D if intercept else None
    )
    torch.testing.assert_close(weight_DI, expected[:, :WIDTH], rtol=1e-8, atol=1e-8)
    if intercept:
        torch.testing.assert_close(found_D, expected[:, -1], rtol=1e-8, atol=1e-8)
    else:
        assert found_D is None


@pytest.mark.parametrize("n", [3, 6, 40])
def test_without_ridge_the_solution_is_that_of_minimal_norm(n: int):
    h_nI, y_nD, _, prior_DI, _ = problem(n)
    expected = y_nD.double().T @ torch.linalg.pinv(h_nI.double().T)
    found, _ = least_squares.solve(sums(h_nI, y_nD), 0.0, prior_DI)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_sums_do_not_depend_on_how_tokens_are_split():
    h_nI, y_nD, weight_n, _, _ = problem()
    whole, parts = sums(h_nI, y_nD, weight_n, intercept=True), least_squares.zeros(WIDTH, RESPONSES, intercept=True)
    for start in (0, 7, 8):
        block = slice(start, {0: 7, 7: 8, 8: None}[start])
        parts = least_squares.add(parts, h_nI[block], y_nD[block], weight_n[block])
    for name in ("inner_II", "cross_DI", "energy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_a_weight_of_two_is_the_token_twice():
    h_nI, y_nD, _, prior_DI, _ = problem(10)
    twice = torch.cat([torch.arange(10), torch.tensor([3])])
    weight_n = torch.ones(10)
    weight_n[3] = 2.0
    weighted, _ = least_squares.solve(sums(h_nI, y_nD, weight_n), 0.1, prior_DI)
    repeated, _ = least_squares.solve(sums(h_nI[twice], y_nD[twice]), 0.1, prior_DI)
    torch.testing.assert_close(weighted, repeated)


def test_the_solution_leaves_the_prior_as_the_ridge_falls():
    h_nI, y_nD, _, prior_DI, _ = problem()
    gram = sums(h_nI, y_nD)
    solutions = [least_squares.solve(gram, ridge, prior_DI)[0] for ridge in (1e-6, 1e-3, 1.0, 1e3, 1e9)]
    away = [float((solution - prior_DI).norm()) for solution in solutions]
    errors = [least_squares.squared_error(gram, solution) for solution in solutions]
    assert away == sorted(away, reverse=True)
    assert errors == sorted(errors)
    assert away[-1] < 1e-6


@pytest.mark.parametrize("intercept", [False, True])
def test_squared_error_equals_its_definition(intercept: bool):
    h_nI, y_nD, weight_n, weight_DI, bias_D = problem()
    gram = sums(h_nI, y_nD, weight_n, intercept=intercept)
    given_D = bias_D if intercept else None
    expected = 0.0
    for h_I, y_D, weight in zip(h_nI.double(), y_nD.double(), weight_n.double(), strict=True):
        error_D = y_D - weight_DI.double() @ h_I - (bias_D.double() if intercept else 0)
        expected += float(weight * (error_D @ error_D))
    assert least_squares.squared_error(gram, weight_DI, given_D) == pytest.approx(expected, rel=1e-9)
    solution = least_squares.solve(gram, 0.0, weight_DI, given_D)
    assert least_squares.squared_error(gram, *solution) <= least_squares.squared_error(gram, weight_DI, given_D)


def test_a_true_prior_is_found_again_from_any_number_of_tokens():
    h_nI, _, _, prior_DI, bias_D = problem(3)
    y_nD = h_nI.double() @ prior_DI.double().T + bias_D.double()
    for ridge in (1e-6, 1e-3):
        weight_DI, found_D = least_squares.solve(sums(h_nI, y_nD, intercept=True), ridge, prior_DI, bias_D)
        torch.testing.assert_close(weight_DI, prior_DI.double(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found_D, bias_D.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("intercept", [False, True])
def test_without_tokens_the_answer_is_the_prior(ridge: float, intercept: bool):
    h_nI, y_nD, weight_n, prior_DI, bias_D = problem()
    nothing = least_squares.zeros(WIDTH, RESPONSES, intercept=intercept)
    weightless = sums(h_nI, y_nD, torch.zeros_like(weight_n), intercept=intercept)
    for gram in (nothing, weightless):
        weight_DI, found_D = least_squares.solve(gram, ridge, prior_DI, bias_D)
        assert torch.equal(weight_DI, prior_DI.double())
        assert found_D is None or torch.equal(found_D, bias_D.double())


def test_regressors_that_are_always_zero_keep_the_prior():
    h_nI, y_nD, _, prior_DI, bias_D = problem()
    h_nI[:, 2] = 0
    weight_DI, _ = least_squares.solve(sums(h_nI, y_nD), 1e-3, prior_DI)
    torch.testing.assert_close(weight_DI[:, 2], prior_DI[:, 2].double())
    weight_DI, found_D = least_squares.solve(sums(torch.zeros_like(h_nI), y_nD, intercept=True), 1e-9, prior_DI, bias_D)
    torch.testing.assert_close(weight_DI, prior_DI.double())
    torch.testing.assert_close(found_D, y_nD.double().mean(dim=0))


def test_a_ridge_too_small_for_the_rank_gives_numbers():
    h_nI, y_nD, _, prior_DI, _ = problem(2)
    weight_DI, _ = least_squares.solve(sums(h_nI, y_nD), 1e-300, prior_DI)
    assert torch.isfinite(weight_DI).all()
    torch.testing.assert_close(h_nI.double() @ weight_DI.T, y_nD.double(), rtol=1e-4, atol=1e-4)


def test_overflowing_activations_are_an_error():
    h_nI, y_nD, _, prior_DI, _ = problem()
    h_nI[0, 0] = torch.inf
    with pytest.raises(ConmoeError, match="overflow"):
        least_squares.solve(sums(h_nI, y_nD), 1e-3, prior_DI)


def test_effective_tokens():
    assert least_squares.effective_tokens(torch.full((7,), 0.3)) == pytest.approx(7)
    assert least_squares.effective_tokens(torch.tensor([1.0, 0.0, 0.0])) == 1
    assert least_squares.effective_tokens(torch.tensor([3.0, 1.0])) == pytest.approx(1.6)
    assert least_squares.effective_tokens(torch.zeros(4)) == 0
    assert least_squares.effective_tokens(torch.zeros(0)) == 0
