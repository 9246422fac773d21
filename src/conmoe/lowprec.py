"""Checkpoints in low precision: which tensors on disk are one matrix, and what numbers they stand for.

A matrix is stored as its integers or 8-bit floats and, beside them, scales and what else belongs to them. It is read
like any other tensor, computed from its parts when its turn comes, and rounded once, to the dtype in which the model
computes. What is written are the parts themselves. Two formats are known: FP8 as DeepSeek-V3 and Qwen3 publish it, and
compressed-tensors as llm-compressor writes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe.ops.dequantise import Tile, dequantise, grid, unpack
from conmoe.shards import DTYPE_NAMES, Held, parts_of, read_tensor, tensor_output
from conmoe.types import ConmoeError, UsageError

#: What can be done with a model in low precision where full precision is needed.
REMEDY = (
    "keep them as they are, as by --method reap --refine none, or dequantise the checkpoint first (conmoe dequantise)"
)

_ORIGINAL = "take the full-precision checkpoint it was made from"
#: Formats of compressed-tensors whose matrices are read.
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_FLOATS = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_WEIGHTS = ("weight", "weight_packed")
#: What stands beside the weights of a matrix. The last three are for activations: they are kept, and not needed here.
_BESIDE = (
    "weight_scale_inv",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "activation_scale",
    "input_scale",
    "input_zero_point",
)
#: Entries of a configuration that list modules by name.
_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "targets")
_EXPERT = re.compile(r"^(.*\blayers\.)(\d+)(\..*\bexperts\.)(\d+)(?![\d])(.*)$")
_ANY_EXPERT = re.compile(r"experts\\?\.\d")

#: Layer and number of an expert of the source -> layer and number of each of its copies in the result.
Places = Mapping[tuple[int, int], Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the matrices of a checkpoint are stored."""

    name: str  # for people
    scale: str  # what their scales are called
    tiles: tuple[Tile, ...]  # the tiles that scales may belong to
    bits: int  # of an integer in a 32-bit word; 0 where none are packed


def read_scheme(folder: Path, config: Any) -> Scheme | None:
    """How a checkpoint says that its matrices are stored, or None if it is in full precision.

    Args:
        folder: the checkpoint.
        config: the ``quantization_config`` of its configuration.

    Raises:
        UsageError: in a way that is not read here.
    """
    if config is None:
        return None
    given = dict(config) if isinstance(config, Mapping) else dict(config.to_dict())
    method = str(getattr(given.get("quant_method"), "value", given.get("quant_method")))
    try:
        if method == "fp8":
            return _fp8(given)
        if method == "compressed-tensors":
            return _compressed(given)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"The quantization_config of {folder} cannot be read: {type(error).__name__} {error}."
        ) from error
    except UsageError as error:
        raise UsageError(f"{folder} is quantised with {error}, which conmoe does not read; {_ORIGINAL}.") from error
    raise UsageError(
        f"{folder} is quantised with {method}, which conmoe does not read (it reads fp8 and compressed-tensors); "
        f"{_ORIGINAL}."
    )


def views(entries: Mapping[str, Held], scheme: Scheme, dtype: torch.dtype) -> dict[str, Held]:
    """The tensors of a checkpoint with every matrix in one piece: its parts are replaced by what they stand for.

    Args:
        entries: the tensors on disk.
        scheme: how the checkpoint says that they are stored.
        dtype: of the matrices when they are read.

    Raises:
        ConmoeError: a part of a matrix is missing, or has a shape or dtype that does not fit.
    """
    parts: dict[str, dict[str, Held]] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        if part in _WEIGHTS or part in _BESIDE:
            parts.setdefault(module, {})[part] = entry
    low = {module: found for module, found in parts.items() if _is_low(found)}
    for module, held in low.items():
        if not held.keys() & set(_WEIGHTS):
            alone = next(iter(held.values()))
            raise ConmoeError(f"{alone.file} holds {alone.name}, but {module}.weight is missing.")
    found: dict[str, Held] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        if module not in low or (part not in _WEIGHTS and part not in _BESIDE):
            if entry.dtype in _FLOATS:
                raise ConmoeError(f"Tensor {name} in {entry.file} is in FP8, and conmoe finds no scale of it.")
            found[name] = entry
        elif part in _WEIGHTS:
            found[f"{module}.weight"] = _view(module, low[module], scheme, dtype)
    return found


def renumbered_modules(config: Any, places: Places, heads: Mapping[str, Sequence[int]] = {}) -> Any:
    """A ``quantization_config`` whose lists of modules name the experts of the result.

    An expert that is not stored is named no more, one that is copied is named as often.

    Args:
        config: the source's.
        places: where the result holds the experts of the layers.
        heads: block of a head that predicts further tokens -> its experts that the result holds, in order.

    Raises:
        UsageError: a list names an expert without its layer, or by a pattern.
    """
    if isinstance(config, Mapping):
        return {
            key: _renamed(key, value, places, heads)
            if key in _LISTS and isinstance(value, list)
            else renumbered_modules(value, places, heads)
            for key, value in config.items()
        }
    return config


def is_low(entry: Held) -> bool:
    """Whether a tensor is a matrix in low precision."""
    return parts_of(entry) != (entry,)


def _renamed(field: str, names: list[Any], places: Places, heads: Mapping[str, Sequence[int]]) -> list[Any]:
    found: list[Any] = []
    for name in names:
        expert = _EXPERT.match(name) if isinstance(name, str) and not name.startswith("re:") else None
        if expert:
            before, layer, between, number, after = expert.groups()
            head = heads.get(f"{before}{layer}{between}".removesuffix(".experts."))
            if head is None:
                homes = places.get((int(layer), int(number)), [])
            else:
                homes = [(int(layer), slot) for slot, kept in enumerate(head) if kept == int(number)]
            found += [f"{before}{home}{between}{slot}{after}" for home, slot in homes]
        elif isinstance(name, str) and _ANY_EXPERT.search(name):
            raise UsageError(
                f"The quantization_config names experts by number in {field}, as {name!r}, which cannot be followed to "
                "their new numbers; name them one by one, with their layers."
            )
        else:
            found.append(name)
    return found


def _fp8(config: Mapping[str, Any]) -> Scheme:
    if config.get("expert_dtype", "fp8") != "fp8":
        raise UsageError(f"{config['expert_dtype']} experts")
    block = config.get("weight_block_size")
    if block is None:
        return Scheme("FP8, a scale for each matrix or row", "weight_scale", ((0, 0), (1, 0)), 0)
    rows, columns = map(int, block)
    if rows < 1 or columns < 1:
        raise ValueError(f"weight_block_size {block}")
    return Scheme(f"FP8, blocks of {rows} x {columns}", "weight_scale_inv", ((rows, columns),), 0)


def _compressed(config: Mapping[str, Any]) -> Scheme:
    """The union of what the groups of a compressed-tensors configuration say; a scale's shape tells which it is."""
    for field, what in (("kv_cache_scheme", "a quantised cache"), ("transform_config", "rotated weights")):
        if config.get(field):
            raise UsageError(f"compressed-tensors and {what}")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise UsageError(f"compressed-tensors in the sparse format {sparsity}")
    groups = [group for group in config["config_groups"].values() if group.get("weights")]
    tiles, bits, names = [], set(), []
    for group in groups:
        form, weights = group.get("format") or config["format"], group["weights"]
        if form not in FORMATS:
            raise UsageError(f"compressed-tensors in the format {form}")
        if weights.get("actorder") in ("group", "dynamic"):
            raise UsageError("compressed-tensors and groups of columns that are no neighbours")
        width, strategy = int(weights["num_bits"]), str(weights["strategy"])
        if form == "pack-quantized":
            bits.add(width)
        tiles.append(_tile(strategy, weights))
        names.append(f"{'FP' if weights['type'] == 'float' else 'INT'}{width} by {strategy}")
    if len(bits) > 1 or bits - {4, 8}:
        raise UsageError(f"compressed-tensors and words of {' and '.join(map(str, sorted(bits)))} bits")
    label = ", ".join(dict.fromkeys(names))
    return Scheme(f"compressed-tensors, {label}", "weight_scale", tuple(dict.fromkeys(tiles)), max(bits, default=0))


def _tile(strategy: str, weights: Mapping[str, Any]) -> Tile:
    if strategy == "block":
        rows, columns = map(int, weights["block_structure"])
        return rows, columns
    if strategy == "group":
        return 1, int(weights["group_size"])
    if strategy not in ("tensor", "channel"):
        raise UsageError(f"compressed-tensors by {strategy}")
    return (0, 0) if strategy == "tensor" else (1, 0)


def _is_low(parts: Mapping[str, Held]) -> bool:
    """Whether these are the parts of a matrix in low precision, or what is left of one."""
    weight = parts.get("weight")
    return weight is None or weight.dtype in (*_FLOATS, "I8") or bool(parts.keys() - {"weight"})


def _view(module: str, parts: Mapping[str, Held], scheme: Scheme, dtype: torch.dtype) -> Held:
    """The matrix that is stored as ``parts``."""
    weight = parts.get("weight_packed") or parts["weight"]
    ratio = 32 // scheme.bits if "weight_packed" in parts and scheme.bits else 1
    known = ratio > 1 and weight.dtype == "I32" if "weight_packed" in parts else weight.dtype in (*_FLOATS, "I8")
    if len(weight.shape) != 2 or not known:
        raise ConmoeError(f"Tensor {weight.name} in {weight.file} is no matrix as its configuration describes them.")
    shape = (weight.shape[0], weight.shape[1] * ratio)
    scale = parts.get(scheme.scale) or parts.get("weight_scale_inv") or parts.get("weight_scale")
    if scale is None:
        raise ConmoeError(
            f"Tensor {weight.name} in {weight.file} is in low precision, and its scale {module}.{scheme.scale} is "
            "missing; the checkpoint is incomplete."
        )
    tile = _fitting(weight, scale, shape, scheme)
    make = partial(_matrix, dict(parts), weight, scale, shape, tile, scheme, dtype)
    view = tensor_output(f"{module}.weight", DTYPE_NAMES[dtype], shape, make)
    beside = [parts[name] for name in sorted(parts) if parts[name] is not weight]
    return replace(view, parts=(weight, *beside))


def _fitting(weight: Held, scale: Held, shape: tuple[int, int], scheme: Scheme) -> Tile:
    """The tiles that ``scale`` has a number for."""
    if scale.dtype not in _SCALES:
        raise ConmoeError(
            f"Scale {scale.name} in {scale.file} has dtype {scale.dtype}, not one of {', '.join(_SCALES)}."
        )
    for tile in scheme.tiles:
        down, across = grid(shape, tile)
        if scale.shape == (down, across) or (across == 1 and scale.shape in ((down,), ())[: 2 if down == 1 else 1]):
            return tile
    wanted = " or ".join(str(list(grid(shape, tile))) for tile in scheme.tiles)
    raise ConmoeError(
        f"Scale {scale.name} in {scale.file} has shape {list(scale.shape)}, but {weight.name} of shape "
        f"{list(weight.shape)} asks for {wanted}."
    )


def _matrix(
    parts: Mapping[str, Held],
    weight: Held,
    scale: Held,
    shape: tuple[int, int],
    tile: Tile,
    scheme: Scheme,
    dtype: torch.dtype,
) -> Tensor:
    """The numbers that the parts of a matrix stand for."""
    value_OI = read_tensor(weight)
    if "weight_packed" in parts:
        value_OI = unpack(value_OI, scheme.bits)
    if "weight_shape" in parts and tuple(read_tensor(parts["weight_shape"]).tolist()) != shape:
        raise ConmoeError(
            f"{parts['weight_shape'].name} in {weight.file} is not the shape {list(shape)} of {weight.name}."
        )
    M, N = grid(shape, tile)
    zero_MN = _zeros(parts.get("weight_zero_point"), (M, N), scheme)
    return dequantise(value_OI, read_tensor(scale).float().reshape(M, N), tile, zero_MN).to(dtype)


def _zeros(zero: Held | None, shape: tuple[int, int], scheme: Scheme) -> Tensor | None:
    """Zero points by tile; packed ones are packed down the columns."""
    if zero is None:
        return None
    value = read_tensor(zero)
    if zero.dtype == "I32" and scheme.bits:
        value = unpack(value.reshape(-1, shape[1]).t(), scheme.bits).t()[: shape[0]]
    if value.numel() != shape[0] * shape[1]:
        raise ConmoeError(f"{zero.name} in {zero.file} has shape {list(zero.shape)}, not one number for each scale.")
    return value.reshape(shape)
