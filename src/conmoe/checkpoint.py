"""Names on disk: which tensors of a checkpoint make up which parameter of the model.

Transformers declares how the names and pieces of a checkpoint become the parameters of a model. That declaration is
read here, and nowhere else in the project, and never retyped.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from conmoe.shards import Held, parts_of, read_into, read_tensor
from conmoe.types import ConmoeError, UsageError

#: How configurations count the layers that predict further tokens (MTP), whose tensors no decoder of ours reads.
MTP_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
_EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_ROTARY = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor on disk as a piece of a parameter: ``pattern`` names its role where the parameter has several."""

    entry: Held
    pattern: str | None

    @property
    def expert(self) -> int | None:
        """The expert whose own tensor this is; None where all experts share one tensor."""
        found = _EXPERT_NUMBER.search(self.entry.name)
        return int(found.group()) if found else None


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint's tensors become a model's parameters (and persistent buffers)."""

    sources: Mapping[str, tuple[Piece, ...]]  # parameter -> the tensors it is made of, experts in order
    converters: Mapping[str, WeightConverter]  # parameter -> how, where it is not one tensor under another name
    ignored: tuple[Held, ...]  # tensors that the model's class declares it does not read (e.g. MTP layers)
    tied: Mapping[str, str]  # parameter -> the parameter whose tensor it shares

    def parameter_of(self) -> dict[str, str]:
        """Name on disk -> parameter."""
        return {
            part.name: target
            for target, sources in self.sources.items()
            for source in sources
            for part in parts_of(source.entry)
        }


def read_layout(model: PreTrainedModel, entries: Mapping[str, Held]) -> Layout:
    """Match every tensor of a checkpoint with a parameter of ``model`` (which may be on the meta device).

    Raises:
        ConmoeError: a parameter has no tensor, a tensor belongs to nothing, or has another shape than configured.
    """
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings: list[Any] = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state: dict[str, Tensor] = model.state_dict()
    ignore = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    ignore += [_ROTARY, *_further_layers(model)]

    sources: dict[str, list[Piece]] = defaultdict(list)
    used: dict[str, WeightConverter] = {}
    ignored = []
    for name in sorted(entries, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target in state:
            sources[target].append(Piece(entries[name], pattern))
            if pattern is not None:
                used[target] = by_pattern[pattern]
        elif any(pattern.search(name) for pattern in ignore):
            ignored.append(entries[name])
        else:
            raise ConmoeError(
                f"Tensor {name} in {entries[name].file} belongs to no part of {type(model).__name__}; "
                "conmoe does not write a checkpoint with tensors it cannot place."
            )
    tied = {target: source for target, source in model.all_tied_weights_keys.items() if target not in sources}
    missing = [name for name in state if name not in sources and name not in tied]
    if missing:
        raise ConmoeError(f"The checkpoint holds no tensor for {missing[0]} ({len(missing)} missing in all).")
    for target, pieces in sources.items():
        _check_pieces(target, pieces, used.get(target), tuple(state[target].shape))
    return Layout({target: tuple(found) for target, found in sources.items()}, used, tuple(ignored), tied)


def read_parameter(layout: Layout, model: PreTrainedModel, target: str, dtype: torch.dtype) -> Tensor:
    """The value of one parameter, put together as Transformers would, in ``dtype``.

    Stacked experts are read straight into their place, so that no second copy of a layer exists.

    Raises:
        ConmoeError: a tensor is cut off, has the wrong shape, or holds a NaN or an infinity.
    """
    target = layout.tied.get(target, target)
    sources = layout.sources[target]
    converter = layout.converters.get(target)
    wanted = model.get_parameter_or_buffer(target)
    if converter is None:
        out = torch.empty(wanted.shape, dtype=dtype)
        read_into(sources[0].entry, out)
    elif is_stack(converter):
        out = torch.empty(wanted.shape, dtype=dtype)
        for piece in sources:
            read_into(piece.entry, _share(out, piece, converter))
    else:
        out = _convert(target, sources, converter, model).to(dtype)
    if not _finite(out):
        _refuse_non_finite(sources)
    return out


def split_parameter(layout: Layout, target: str, value: Tensor) -> Iterator[tuple[Held, Tensor]]:
    """The inverse of :func:`read_parameter`: every tensor on disk that makes up a parameter, its share of ``value``.

    Raises:
        UsageError: the parameter is stored in a layout that can be read, but not written.
    """
    converter = layout.converters.get(target)
    for piece in layout.sources[target]:
        if converter is None:
            yield piece.entry, value
        elif is_stack(converter):
            yield piece.entry, _share(value, piece, converter)
        else:
            raise UsageError(f"{target} is stored in a layout that conmoe reads but does not write yet.")


def read_module(layout: Layout, model: PreTrainedModel, prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent buffers below ``prefix`` in the dtypes in which ``model`` computes."""
    plan = model._get_dtype_plan(model.dtype)
    matcher, patterns, _ = build_glob_alternation(list(plan))

    def dtype(name: str, value: Tensor) -> torch.dtype:
        found = matcher.search(name) if plan else None
        return plan[patterns[str(found.lastgroup)]] if found else value.dtype

    return {
        name: read_parameter(layout, model, prefix + name, dtype(prefix + name, value))
        for name, value in module.state_dict().items()
    }


def is_stack(converter: WeightConverter | None) -> bool:
    """Whether experts are stored one by one, and the parameter is their stack (gate and up side by side)."""
    if converter is None:
        return False
    kinds = [(type(operation), operation.dim) for operation in converter.operations if hasattr(operation, "dim")]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def disk_name(model: PreTrainedModel, target: str, value: Tensor) -> str:
    """The name under which the source family would store a parameter of its model."""
    (name,) = revert_weight_conversion(model, {target: value})
    return str(name)


def renumbered(name: str, expert: int) -> str:
    """The name on disk of the same tensor of another expert."""
    return _EXPERT_NUMBER.sub(str(expert), name)


def _further_layers(model: PreTrainedModel) -> list[re.Pattern[str]]:
    """The layers after the last that predict further tokens; the class knows their number in one size of a family."""
    last = getattr(model.config, "num_hidden_layers", 0)
    further = max(int(getattr(model.config, field, None) or 0) for field in MTP_FIELDS)
    return [re.compile(rf"(?:^|\.)layers\.{last + extra}\.") for extra in range(further)]


def _check_pieces(target: str, pieces: list[Piece], converter: WeightConverter | None, shape: tuple[int, ...]) -> None:
    """Raise unless the tensors on disk, by their headers, make up exactly the parameter that the model has."""
    if converter is None:
        wanted = shape
    elif is_stack(converter):
        parts = len(converter.source_patterns)
        found = sorted((str(piece.pattern), piece.expert) for piece in pieces)
        if found != sorted((pattern, expert) for pattern in converter.source_patterns for expert in range(shape[0])):
            last = pieces[-1].entry
            raise ConmoeError(
                f"{target} is stored as {len(pieces)} tensors, but the configuration asks for {parts} for each of "
                f"{shape[0]} experts; the last one is {last.name} in {last.file}."
            )
        wanted = (shape[1] // parts, *shape[2:])
    else:
        return
    for entry in (piece.entry for piece in pieces):
        if entry.shape != wanted:
            raise ConmoeError(
                f"Tensor {entry.name} in {entry.file} has shape {list(entry.shape)}, but the configuration of the "
                f"model asks for {list(wanted)}."
            )


def _share(value: Tensor, piece: Piece, converter: WeightConverter) -> Tensor:
    """The view of stacked experts that one tensor on disk holds."""
    parts = converter.source_patterns
    height = value.shape[1] // len(parts)
    part, expert = parts.index(str(piece.pattern)), int(piece.expert or 0)
    return value[expert, part * height : (part + 1) * height]


def _convert(target: str, sources: tuple[Piece, ...], converter: WeightConverter, model: PreTrainedModel) -> Tensor:
    working: Any = copy.deepcopy(converter)
    for source in sources:
        working.add_tensor(target, source.entry.name, source.pattern, read_tensor(source.entry))
    converted: dict[str, Any] = working.convert(target, model=model, config=model.config)
    value = converted[target]
    result: Tensor = value[0] if isinstance(value, list) else value
    return result


def _finite(value: Tensor) -> bool:
    """Extremes let a NaN or an infinity through, and are found twenty times faster than a sum of bf16."""
    if not value.is_floating_point() or not value.numel():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in value.aminmax())


def _refuse_non_finite(sources: tuple[Piece, ...]) -> None:
    for source in sources:
        if not bool(torch.isfinite(read_tensor(source.entry).float()).all()):
            raise ConmoeError(
                f"Tensor {source.entry.name} in {source.entry.file} holds a NaN or an infinity; "
                "the checkpoint is damaged."
            )
