"""Sums at places that may be named more than once, in an order that does not change from run to run."""

from __future__ import annotations

from torch import Tensor


def add_at(total: Tensor, axis: int, index_n: Tensor, values: Tensor) -> Tensor:
    """``total``, with ``values`` added along ``axis`` at ``index_n``, in place.

    ``index_add_`` does that on a CPU one after the other. On a GPU it lets threads race, so that the last bits of a sum
    differ between two runs and with them, now and then, a choice between experts that are alike; there ``index_put_``
    sorts the places first.
    """
    if total.device.type == "cpu":
        return total.index_add_(axis, index_n, values)
    total.movedim(axis, 0).index_put_((index_n,), values.movedim(axis, 0), accumulate=True)
    return total
