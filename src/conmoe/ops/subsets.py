"""Statistics of a part of a layer, and of several layers as one: so that methods need to know neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conmoe.ops.experts import concatenate, rows
from conmoe.registry import get_statistic
from conmoe.types import ConmoeError, Experts, LayerStatistics, TokenSample, sample_tensors

OUTSIDE = -1


def restrict(statistics: LayerStatistics, subset: Tensor) -> LayerStatistics:
    """What is known about the experts ``subset``, renumbered in that order.

    Slots of the token sample that went to any other expert become -1; no token is removed.
    """
    E = statistics.owner_E.numel()
    renumbered_E = torch.full((E + 1,), OUTSIDE, dtype=torch.int64)
    renumbered_E[subset] = torch.arange(subset.numel())
    sample = statistics.sample
    return LayerStatistics(
        statistics.tokens,
        {name: _restrict_sum(name, tensor, subset) for name, tensor in statistics.sums.items()},
        replace(
            sample,
            # an index of -1 reads the last element, which says -1 again
            index_nk=renumbered_E.to(sample.index_nk.device)[sample.index_nk.long()],
            logits_nE=rows(sample.logits_nE, subset, axis=1),
        ),
        rows(statistics.owner_E, subset),
    )


def thinned(sample: TokenSample, limit: int) -> TokenSample:
    """The ``limit`` tokens of lowest priority, in that order: a sample of the sample."""
    order = torch.argsort(sample.priority_n, stable=True)[:limit]
    return TokenSample(**{name: value[order.to(value.device)] for name, value in sample_tensors(sample).items()})


def join_layers(layers: Sequence[LayerStatistics], experts: Sequence[Experts]) -> tuple[LayerStatistics, Experts]:
    """The ``W`` layers of a scope as one layer of ``M = W * E`` experts, layer by layer; one layer stays as it is.

    A token of layer ``w`` has logits for the experts of that layer only, NaN for the others; experts of two layers are
    never selected together, so an "EE" sum is block-diagonal.
    """
    if len(layers) == 1:
        return layers[0], experts[0]
    if len({layer.tokens for layer in layers}) > 1:
        raise ConmoeError("The layers of a scope were calibrated on different numbers of tokens; calibrate them again.")
    sizes = [layer.owner_E.numel() for layer in layers]
    names = set.intersection(*(set(layer.sums) for layer in layers))
    joined = LayerStatistics(
        layers[0].tokens,
        {name: _join_sums(name, [layer.sums[name] for layer in layers]) for name in sorted(names)},
        _join_samples([layer.sample for layer in layers], sizes),
        torch.repeat_interleave(torch.arange(len(layers)), torch.tensor(sizes)),
    )
    return joined, concatenate(experts)


def _restrict_sum(name: str, tensor: Tensor, subset: Tensor) -> Tensor:
    for axis, letter in enumerate(get_statistic(name).shape):
        if letter == "E":
            tensor = rows(tensor, subset, axis)
    return tensor


def _join_sums(name: str, parts: Sequence[Tensor]) -> Tensor:
    if get_statistic(name).shape.count("E") < 2:
        return torch.cat(list(parts))
    size = sum(part.shape[0] for part in parts)
    joined, first = parts[0].new_zeros(size, size), 0
    for part in parts:
        last = first + part.shape[0]
        joined[first:last, first:last] = part
        first = last
    return joined


def _join_samples(samples: Sequence[TokenSample], sizes: Sequence[int]) -> TokenSample:
    starts = [sum(sizes[:position]) for position in range(len(sizes))]
    index_nk = [
        torch.where(sample.index_nk < 0, OUTSIDE, sample.index_nk + start)
        for sample, start in zip(samples, starts, strict=True)
    ]
    logits_nE = [
        torch.nn.functional.pad(sample.logits_nE, (start, sum(sizes) - start - size), value=torch.nan)
        for sample, start, size in zip(samples, starts, sizes, strict=True)
    ]
    return TokenSample(
        torch.cat([sample.hidden_nD for sample in samples]),
        torch.cat(index_nk),
        torch.cat([sample.weight_nk for sample in samples]),
        torch.cat(logits_nE),
        torch.cat([sample.priority_n for sample in samples]),
        _join_rest([sample.rest_nD for sample in samples]),
    )


def _join_rest(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if len(found) == len(parts) else None
