"""Matrices as a low-rank part and a few whole rows or columns: ``W = left right + S`` (MC-SMoE, arXiv 2310.01334).

``K`` experts, ``O`` outputs and ``I`` inputs of a matrix (of gate, up or down: here ``I`` is not the experts' width),
``r`` rank, ``S`` rows (``structure="rows"``, of ``I`` numbers each) or columns (of ``O``) kept of what the low rank
leaves over, all experts together; ``A`` is the length of such a line, ``L`` their number in one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from conmoe.ops.lines import count_of, highest
from conmoe.types import ConmoeError, UsageError

Structure = Literal["rows", "columns"]
#: ``(tensor name, expert) -> x_nI``: what one matrix is multiplied by on calibration tokens.
Inputs = Callable[[str, int], Tensor]


@dataclass(frozen=True, slots=True)
class Factors:
    """``W_k = left_k @ right_k``, plus ``values_SA[s]`` on the line that ``index_S[s]`` names.

    ``index_S`` ascends: ``expert * O + row`` with ``structure="rows"``, ``expert * I + column`` with ``"columns"``.
    """

    left_KOr: Tensor
    right_KrI: Tensor
    values_SA: Tensor
    index_S: Tensor  # int64
    structure: Structure

    def __post_init__(self) -> None:
        K, _, r = self.left_KOr.shape
        length = self.right_KrI.shape[2] if self.structure == "rows" else self.left_KOr.shape[1]
        fits = self.right_KrI.shape[:2] == (K, r) and self.values_SA.shape == (self.index_S.numel(), length)
        if not fits or self.index_S.dtype != torch.int64:
            raise ConmoeError("The factors of a matrix do not fit together; this is a bug.")
        inside = self.index_S.numel() == 0 or 0 <= int(self.index_S[0]) <= int(self.index_S[-1]) < K * self.lines
        if not inside or not bool((self.index_S.diff() > 0).all()):
            raise ConmoeError("The rows or columns beside a low rank are not in order; this is a bug.")

    @property
    def lines(self) -> int:
        """Rows, or columns, of one expert's matrix."""
        return self.left_KOr.shape[1] if self.structure == "rows" else self.right_KrI.shape[2]


@torch.no_grad()
def decompose(
    matrices: Mapping[str, Tensor],
    rank: int,
    ratio: float,
    structure: Structure = "rows",
    inputs: Inputs | None = None,
) -> dict[str, Factors]:
    """Each ``W_KOI`` as its best approximation of ``rank`` and the most important lines of the residual.

    Of all lines of all matrices together, the share ``ratio`` stays: those whose energy per stored number is highest,
    ties to the first matrix, expert and line. With ``inputs``, energy is that of the output: of ``R x`` for the
    residual ``R``, summed over the tokens, as a share of that of ``W x`` in all matrices of the same name, since the
    outputs of gate, up and down have no common unit. A column's is what losing it alone costs.

    The paper learns importance, by tuning; this needs no gradient. The residual is what the *stored* factors leave,
    so a kept row is exact to the rounding of one sum. Cost of one matrix: ``2 O I min(O, I)`` operations and an
    eigenproblem of ``min(O, I)``, and ``2 O I n`` with inputs. Holds one residual at a time.

    Args:
        matrices: by name, ``K`` matrices each; the factors have their dtype.
        rank: at most; never more than a matrix has.
        ratio: share of the lines to keep, 0 to 1.
        structure: keep rows or columns.
        inputs: see above.

    Raises:
        UsageError: a rank below 0, or a ratio that is no share.
        ConmoeError: a matrix is not finite.
    """
    if rank < 0 or not 0 <= ratio <= 1:
        raise UsageError(f"A rank is at least 0 and a ratio between 0 and 1, not {rank} and {ratio:g}.")
    low = {name: [_low_rank(matrix_OI, rank) for matrix_OI in matrix_KOI] for name, matrix_KOI in matrices.items()}
    importance = {name: _importance(name, matrices[name], low[name], structure, inputs) for name in matrices}
    kept = _highest(importance, ratio)
    return {name: _gather(matrices[name], low[name], kept[name], structure) for name in matrices}


def exact(matrix_KOI: Tensor, structure: Structure, rank: int = 0) -> Factors:
    """Matrices as they are, bit for bit: a low-rank part of zeros, and every row or column kept."""
    K, O, I = matrix_KOI.shape  # noqa: E741
    lines_KLA = matrix_KOI if structure == "rows" else matrix_KOI.mT
    values_SA = lines_KLA.reshape(-1, lines_KLA.shape[2])
    left_KOr, right_KrI = matrix_KOI.new_zeros(K, O, rank), matrix_KOI.new_zeros(K, rank, I)
    return Factors(left_KOr, right_KrI, values_SA, torch.arange(values_SA.shape[0]), structure)


def reconstruct(factors: Factors) -> Tensor:
    """``W_KOI`` in float32 or better."""
    precision = torch.promote_types(factors.left_KOr.dtype, torch.float32)
    matrix_KOI = factors.left_KOr.to(precision) @ factors.right_KrI.to(precision)
    lines_KLA = matrix_KOI if factors.structure == "rows" else matrix_KOI.mT
    expert_S, line_S = factors.index_S // factors.lines, factors.index_S % factors.lines
    lines_KLA[expert_S, line_S] += factors.values_SA.to(precision)
    return matrix_KOI


def elements(factors: Factors) -> int:
    """Numbers stored, without the ``S`` integers of the index."""
    return factors.left_KOr.numel() + factors.right_KrI.numel() + factors.values_SA.numel()


def stable_rank(matrix_OI: Tensor) -> float:
    """``||W||_F^2 / ||W||_2^2``, between 1 and the rank; 0 for a matrix of zeros. Low where few directions matter.

    The paper finds it lower in merged experts than in their members, and decomposes them for that reason.
    """
    gram = _gram(matrix_OI)
    largest = float(scipy.linalg.eigh(gram, eigvals_only=True, subset_by_index=2 * [gram.shape[0] - 1])[0])
    return float(gram.trace()) / largest if largest > 0 else 0.0


def take(factors: Factors, order_K: Tensor) -> Factors:
    """The experts ``order_K``, each at most once, in that order."""
    lines, order_K = factors.lines, order_K.to(factors.index_S.device)
    place_K = torch.full((factors.left_KOr.shape[0],), -1, dtype=torch.int64, device=order_K.device)
    place_K[order_K] = torch.arange(order_K.numel(), device=order_K.device)
    place_S = place_K[factors.index_S // lines]
    index_S, order_S = (place_S * lines + factors.index_S % lines)[place_S >= 0].sort()
    return replace(
        factors,
        left_KOr=factors.left_KOr[order_K],
        right_KrI=factors.right_KrI[order_K],
        values_SA=factors.values_SA[place_S >= 0][order_S],
        index_S=index_S,
    )


def concatenate(parts: Sequence[Factors]) -> Factors:
    """The experts of several parts in one row; a lower rank is filled up with zeros.

    Raises:
        ConmoeError: some parts keep rows, others columns.
    """
    if len({part.structure for part in parts}) > 1:
        raise ConmoeError("Factors that keep rows cannot be joined with factors that keep columns.")
    rank = max(part.left_KOr.shape[2] for part in parts)
    missing = [rank - part.left_KOr.shape[2] for part in parts]
    starts = torch.tensor([0, *(part.left_KOr.shape[0] * part.lines for part in parts)]).cumsum(0).tolist()
    return Factors(
        torch.cat([pad(part.left_KOr, (0, more)) for part, more in zip(parts, missing, strict=True)]),
        torch.cat([pad(part.right_KrI, (0, 0, 0, more)) for part, more in zip(parts, missing, strict=True)]),
        torch.cat([part.values_SA for part in parts]),
        torch.cat([part.index_S + start for part, start in zip(parts, starts[:-1], strict=True)]),
        parts[0].structure,
    )


def to_weights(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Factors by canonical tensor name ``T`` as weights of a plan: ``T.left``, ``T.right``, ``T.values_rows`` (or
    ``T.values_columns``) and ``T.index``.
    """
    return {
        f"{name}.{part}": tensor
        for name, item in factors.items()
        for part, tensor in (
            ("left", item.left_KOr),
            ("right", item.right_KrI),
            (f"values_{item.structure}", item.values_SA),
            ("index", item.index_S),
        )
    }


def from_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The factors among the weights of a plan, by canonical tensor name, and the other weights."""
    names = [name.removesuffix(".left") for name in weights if name.endswith(".left")]
    factors = {name: _from_weights(weights, name) for name in names}
    return factors, {name: tensor for name, tensor in weights.items() if name.partition(".")[0] not in factors}


def _from_weights(weights: Mapping[str, Tensor], name: str) -> Factors:
    structure: Structure = "rows" if f"{name}.values_rows" in weights else "columns"
    left_KOr, right_KrI, values_SA, index_S = (
        weights[f"{name}.{part}"] for part in ("left", "right", f"values_{structure}", "index")
    )
    return Factors(left_KOr, right_KrI, values_SA, index_S, structure)


def _low_rank(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``left_Or, right_rI`` of the nearest matrix of this rank, in the matrix's dtype, both of like size.

    From the eigenvectors of the smaller Gram matrix, ten times as fast as a singular value decomposition at real
    sizes; with ``U`` of orthonormal columns ``U (U^T W)`` is the best matrix with these columns, whatever the Gram
    matrix lost to rounding.
    """
    O, I = matrix_OI.shape  # noqa: E741
    gram = _gram(matrix_OI)
    size = gram.shape[0]
    rank = min(rank, size)
    if rank == 0:
        return matrix_OI.new_zeros(O, 0), matrix_OI.new_zeros(0, I)
    vectors = scipy.linalg.eigh(gram, subset_by_index=(size - rank, size - 1))[1]
    basis_sr = torch.from_numpy(vectors).to(matrix_OI.device, _precision(matrix_OI))
    if O <= I:
        left_Or, right_rI = basis_sr, basis_sr.T @ matrix_OI.to(basis_sr.dtype)
        scale_r = right_rI.norm(dim=1).sqrt()
        left_Or, right_rI = left_Or * scale_r, right_rI / _nonzero(scale_r).unsqueeze(1)
    else:
        left_Or, right_rI = matrix_OI.to(basis_sr.dtype) @ basis_sr, basis_sr.T
        scale_r = left_Or.norm(dim=0).sqrt()
        left_Or, right_rI = left_Or / _nonzero(scale_r), right_rI * scale_r.unsqueeze(1)
    return left_Or.to(matrix_OI.dtype), right_rI.to(matrix_OI.dtype)


def _importance(
    name: str,
    matrix_KOI: Tensor,
    low_K: Sequence[tuple[Tensor, Tensor]],
    structure: Structure,
    inputs: Inputs | None,
) -> Tensor:
    """``[K, L]``: the energy of each line of the residuals per number that storing it takes, in float64."""
    lines_KL, energy = [], 0.0
    for expert, (matrix_OI, factors) in enumerate(zip(matrix_KOI, low_K, strict=True)):
        residual_OI = _residual(matrix_OI, factors)
        if inputs is None:
            line_L = residual_OI.square().sum(dim=1 if structure == "rows" else 0, dtype=torch.float64)
        else:
            x_nI = inputs(name, expert).to(residual_OI)
            energy += float((x_nI @ matrix_OI.to(x_nI.dtype).T).square().sum(dtype=torch.float64))
            line_L = _output_energy(residual_OI, x_nI, structure)
        lines_KL.append(line_L.cpu())
    length = matrix_KOI.shape[2 if structure == "rows" else 1]
    return torch.stack(lines_KL) / length / (1.0 if inputs is None else energy or 1.0)


def _output_energy(residual_OI: Tensor, x_nI: Tensor, structure: Structure) -> Tensor:
    if structure == "rows":
        return (x_nI @ residual_OI.T).square().sum(dim=0, dtype=torch.float64)
    input_I, column_I = (part.square().sum(dim=0, dtype=torch.float64) for part in (x_nI, residual_OI))
    return input_I * column_I


def _highest(importance: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """``index_S`` of each name: the highest of all lines of all names."""
    count = count_of(ratio, sum(lines_KL.numel() for lines_KL in importance.values()))
    masks = highest(list(importance.values()), count)
    return {name: mask.flatten().nonzero().flatten() for name, mask in zip(importance, masks, strict=True)}


def _gather(
    matrix_KOI: Tensor, low_K: Sequence[tuple[Tensor, Tensor]], index_S: Tensor, structure: Structure
) -> Factors:
    """The factors with the residual lines ``index_S``."""
    K, O, I = matrix_KOI.shape  # noqa: E741
    lines, length = (O, I) if structure == "rows" else (I, O)
    values = [matrix_KOI.new_empty(0, length)]
    for expert in range(K):
        line_s = (index_S[index_S // lines == expert] % lines).to(matrix_KOI.device)
        residual_OI = _residual(matrix_KOI[expert], low_K[expert])
        values.append((residual_OI if structure == "rows" else residual_OI.T)[line_s].to(matrix_KOI.dtype))
    left_KOr, right_KrI = (torch.stack(parts) for parts in zip(*low_K, strict=True))
    return Factors(left_KOr, right_KrI, torch.cat(values), index_S.to(matrix_KOI.device), structure)


def _residual(matrix_OI: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    left_Or, right_rI = (factor.to(_precision(factor)) for factor in factors)
    return matrix_OI.to(left_Or.dtype) - left_Or @ right_rI


def _gram(matrix_OI: Tensor) -> NDArray[np.float64]:
    """The smaller of ``W W^T`` and ``W^T W``: multiplied in float32 or better, on the CPU in float64."""
    matrix_OI = matrix_OI.to(_precision(matrix_OI))
    wide = matrix_OI.shape[0] <= matrix_OI.shape[1]
    gram: NDArray[np.float64] = (matrix_OI @ matrix_OI.T if wide else matrix_OI.T @ matrix_OI).cpu().double().numpy()
    if not np.isfinite(gram).all():
        raise ConmoeError("A matrix that is to be decomposed is not finite.")
    return gram


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _nonzero(scale_r: Tensor) -> Tensor:
    return torch.where(scale_r > 0, scale_r, 1.0)
