"""Low-precision matrices as numbers: integers or 8-bit floats, times a scale for each tile of the matrix.

A tile is ``rows x columns`` of the ``O x I`` matrix: the whole of it (per tensor), one row (per channel), some columns
of one row (groups), or a block. All published schemes that are read here differ in their tiles alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows and columns of a tile; 0 stands for all of them.
Tile = tuple[int, int]

_WORD = 32


def grid(shape: tuple[int, ...], tile: Tile) -> tuple[int, int]:
    """How many tiles a matrix has, down and across; those at the edges may be smaller."""
    (O, I), (rows, columns) = shape, tile  # noqa: E741 (shape letters)
    return -(-O // (rows or O)), -(-I // (columns or I))


def dequantise(value_OI: Tensor, scale_MN: Tensor, tile: Tile, zero_MN: Tensor | None = None) -> Tensor:
    """``w_oi = (q_oi - z_mn) * s_mn`` in float32, where tile ``mn`` holds the place ``oi``.

    Tiles have their full size but for the last ones, as in DeepSeek-V3's ``weight_dequant`` (inference/kernel.py of its
    repository). The rest is compressed-tensors' ``dequantize``, in float32 where that computes in the scale's dtype.

    Args:
        value_OI: the stored integers or 8-bit floats.
        scale_MN: what one step of them is worth, by tile.
        tile: rows and columns of a tile.
        zero_MN: the stored number that stands for zero, by tile; None for 0.
    """
    O, I = value_OI.shape  # noqa: E741 (shape letters)
    row_O = torch.arange(O) // (tile[0] or O)
    column_I = torch.arange(I) // (tile[1] or I)
    wide_OI = value_OI.float()
    if zero_MN is not None:
        wide_OI = wide_OI - zero_MN.float()[row_O][:, column_I]
    return wide_OI * scale_MN.float()[row_O][:, column_I]


def unpack(packed_OP: Tensor, bits: int) -> Tensor:
    """The integers of ``bits`` bits that 32-bit words hold, ``q_OI`` in int8: lowest bits first, zero in the middle.

    This is compressed-tensors' "pack-quantized" layout for widths that divide 32.
    """
    shift_f = torch.arange(0, _WORD, bits, dtype=torch.int32)
    unsigned_OPf = (packed_OP.to(torch.int32)[:, :, None] >> shift_f) & (2**bits - 1)
    value_OI: Tensor = unsigned_OPf.flatten(1) - 2 ** (bits - 1)
    return value_OI.to(torch.int8)
