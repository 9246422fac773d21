"""Ridge regression with a prior, from sums over tokens: any number of tokens, in the memory of two matrices.

Minimise ``sum_n w_n ||y_n - W h_n - b||^2 + lam (||W - W0||^2 + s ||b - b0||^2)``. :class:`Gram` holds the sums, which
:func:`add` streams and which may be added to each other; :func:`solve` is the closed form, :func:`squared_error` the
first term of the objective for any ``W``, so that ``lam`` can be chosen on the sums of tokens held out.

``n`` tokens, ``I`` regressors, ``D`` responses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conmoe.types import ConmoeError

#: Eigenvalues of ``inner`` below this share of the largest are taken for zero: singular values of the regressors that
#: are a millionth of the largest, which is what the float32 they come in can tell from rounding.
RANK = 1e-12
#: First jitter, as a share of the mean diagonal, where a matrix is not positive definite to rounding; then 100 times
#: as much.
JITTER = 1e-14


@dataclass(frozen=True, slots=True)
class Gram:
    """Weighted sums over tokens, in float64. With an intercept the last of the regressors is a constant one."""

    inner_II: Tensor  # sum of w h h^T
    cross_DI: Tensor  # sum of w y h^T
    energy: Tensor  # sum of w ||y||^2, a scalar
    intercept: bool


def zeros(regressors: int, responses: int, *, intercept: bool, device: torch.device | None = None) -> Gram:
    """The sums over no tokens; ``regressors`` does not count the constant one."""
    width = regressors + intercept
    inner_II = torch.zeros(width, width, dtype=torch.float64, device=device)
    return Gram(inner_II, inner_II.new_zeros(responses, width), inner_II.new_zeros(()), intercept)


def add(gram: Gram, h_nI: Tensor, y_nD: Tensor, weight_n: Tensor | None = None) -> Gram:
    """The sums over more tokens. Products are float64: squares of float32 regressors lose half of their digits."""
    h_nI, y_nD = h_nI.double(), y_nD.double()
    if gram.intercept:
        h_nI = torch.cat([h_nI, h_nI.new_ones(h_nI.shape[0], 1)], dim=1)
    left_nI = h_nI if weight_n is None else h_nI * weight_n.double().unsqueeze(1)
    square_n = y_nD.square().sum(dim=1)
    return replace(
        gram,
        inner_II=torch.addmm(gram.inner_II, left_nI.T, h_nI),
        cross_DI=torch.addmm(gram.cross_DI, y_nD.T, left_nI),
        energy=gram.energy + (square_n.sum() if weight_n is None else weight_n.double() @ square_n),
    )


def solve(
    gram: Gram, ridge: float, prior_DI: Tensor, prior_bias_D: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``W = (cross + lam W0) (inner + lam)^-1`` by Cholesky in float64, and the intercept, None without one.

    ``lam`` is ``ridge`` times the mean of the diagonal of ``inner``; for the constant regressor, whose scale differs,
    ``ridge`` times its own diagonal element. ``ridge=0`` is the least-squares solution of minimal norm, by the
    pseudo-inverse: the prior has no say. Without any tokens of weight, ``W`` is the prior.

    Raises:
        ConmoeError: the sums are not finite.
    """
    inner_II, prior = gram.inner_II, prior_DI.double()
    if gram.intercept:
        bias_D = prior.new_zeros(prior.shape[0]) if prior_bias_D is None else prior_bias_D.double()
        prior = torch.cat([prior, bias_D.unsqueeze(1)], dim=1)
    diagonal_I = inner_II.diagonal()
    if not (torch.isfinite(inner_II).all() and torch.isfinite(gram.cross_DI).all()):
        raise ConmoeError("Activations of an expert overflow on the calibration tokens; calibrate in a wider dtype.")
    if not (diagonal_I > 0).any():
        solution = prior
    elif ridge == 0:
        solution = gram.cross_DI @ torch.linalg.pinv(inner_II, rtol=RANK, hermitian=True)
    else:
        # as a step away from the prior: what rounding and jitter take away, they take from the step
        lam_I = ridge * _scale(diagonal_I, gram.intercept)
        solution = prior + _divide(gram.cross_DI - prior @ inner_II, inner_II + lam_I.diag())
    return (solution[:, :-1], solution[:, -1]) if gram.intercept else (solution, None)


def effective_tokens(weight_n: Tensor) -> float:
    """``(sum w)^2 / sum w^2``: how many tokens of equal weight would know as much (Kish); 0 without any."""
    weight_n = weight_n.double()
    return float(weight_n.sum().square() / weight_n.square().sum()) if bool((weight_n > 0).any()) else 0.0


def squared_error(gram: Gram, weight_DI: Tensor, bias_D: Tensor | None = None) -> float:
    """``sum_n w_n ||y_n - W h_n - b||^2``, to about 1e-15 of ``energy``."""
    w_DI = weight_DI.double()
    if gram.intercept:
        bias_D = w_DI.new_zeros(w_DI.shape[0]) if bias_D is None else bias_D.double()
        w_DI = torch.cat([w_DI, bias_D.unsqueeze(1)], dim=1)
    return float((gram.energy + ((w_DI @ gram.inner_II - 2 * gram.cross_DI) * w_DI).sum()).clamp_min(0))


def _scale(diagonal_I: Tensor, intercept: bool) -> Tensor:
    scale_I = diagonal_I.mean().expand_as(diagonal_I).clone()
    if intercept:
        scale_I[-1] = diagonal_I[-1]
        if (diagonal_I[:-1] > 0).any():
            scale_I[:-1] = diagonal_I[:-1].mean()
    return scale_I


def _divide(right_DI: Tensor, matrix_II: Tensor) -> Tensor:
    """``right @ matrix^-1`` of a matrix that is positive definite but for rounding."""
    jitter = 0.0
    while True:
        factor_II, failed = torch.linalg.cholesky_ex(matrix_II + jitter * torch.eye(matrix_II.shape[0]).to(matrix_II))
        if not failed:
            return torch.cholesky_solve(right_DI.T, factor_II).T
        jitter = max(100 * jitter, JITTER * float(matrix_II.diagonal().mean()))
