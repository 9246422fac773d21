"""Checkpoints in low precision, made of full ones by plain loops: what the package must read is written without it.

``quantised(folder, out, kind)`` writes the matrices of the decoder layers as ``kind`` says, but for routers and norms,
and puts the numbers that they stand for, worked out number by number, into ``out`` + ``-numbers``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: Some matrices of the tiny models are no whole number of these, as 576 rows of DeepSeek-V3 are not of 128.
BLOCK = (16, 8)
#: All of them are of these, which Transformers asks for where it dequantises.
EVEN = (8, 8)
GROUP = 8
Parts = dict[str, Tensor]


def fp8_block(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Parts, Tensor]:
    """FP8 with a float32 scale for each block, as DeepSeek-V3 and Qwen3 publish it."""
    rows, columns = weight.shape
    value = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    numbers = torch.zeros(weight.shape)
    for m in range(scale.shape[0]):
        for n in range(scale.shape[1]):
            place = slice(m * block[0], (m + 1) * block[0]), slice(n * block[1], (n + 1) * block[1])
            scale[m, n] = weight[place].abs().max() / 448
            value[place] = (weight[place] / scale[m, n]).to(torch.float8_e4m3fn)
            numbers[place] = value[place].float() * scale[m, n]
    return {"weight": value, "weight_scale_inv": scale}, numbers


def fp8_tensor(weight: Tensor) -> tuple[Parts, Tensor]:
    """FP8 with one scale, and one for activations, which is only carried along."""
    scale = weight.abs().max() / 448
    value = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": value, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, value.float() * scale


def fp8_channel(weight: Tensor) -> tuple[Parts, Tensor]:
    """FP8 with a bfloat16 scale for each row, as llm-compressor's FP8_DYNAMIC writes it."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    value = (weight / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": value, "weight_scale": scale}, value.float() * scale.float()


def int8_channel(weight: Tensor) -> tuple[Parts, Tensor]:
    """Integers of 8 bits with a scale for each row, as llm-compressor's W8A8 writes it."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    value = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": value, "weight_scale": scale}, value.float() * scale.float()


def int4_group(weight: Tensor) -> tuple[Parts, Tensor]:
    """Integers of 4 bits, eight to a word, with a scale for each group of columns: llm-compressor's W4A16."""
    rows, columns = weight.shape
    scale = (weight.view(rows, -1, GROUP).abs().amax(2) / 7).bfloat16()
    wide = scale.float().repeat_interleave(GROUP, 1)
    value = (weight / wide).round().clamp(-8, 7)
    return {
        "weight_packed": packed(value + 8, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }, value * wide


def int4_asymmetric(weight: Tensor) -> tuple[Parts, Tensor]:
    """The same with a zero point for each group, packed down the columns: W4A16_ASYM."""
    rows, columns = weight.shape
    grouped = weight.view(rows, -1, GROUP)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    scale = ((high - low) / 15).bfloat16()
    zero = (-8 - low / scale.float()).round().clamp(-8, 7)
    wide, wide_zero = scale.float().repeat_interleave(GROUP, 1), zero.repeat_interleave(GROUP, 1)
    value = (weight / wide + wide_zero).round().clamp(-8, 7)
    return {
        "weight_packed": packed(value + 8, 4),
        "weight_scale": scale,
        "weight_zero_point": packed((zero + 8).t(), 4).t().contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }, (value - wide_zero) * wide


def packed(value: Tensor, bits: int) -> Tensor:
    """Non-negative integers in 32-bit words, the first in the lowest bits; a last word is filled up with zeros."""
    size = 32 // bits
    words = torch.zeros(value.shape[0], -(-value.shape[1] // size), dtype=torch.int64)
    for column in range(value.shape[1]):
        words[:, column // size] += value[:, column].long() << (bits * (column % size))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _group(form: str, bits: int, kind: str, strategy: str, symmetric: bool = True) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False}
    if strategy == "group":
        weights["group_size"] = GROUP
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
KINDS: Mapping[str, tuple[Callable[[Tensor], tuple[Parts, Tensor]], dict[str, Any]]] = {
    "fp8-block": (fp8_block, {**_FP8, "weight_block_size": list(BLOCK), "modules_to_not_convert": ["lm_head"]}),
    "fp8-even": (partial(fp8_block, block=EVEN), {**_FP8, "weight_block_size": list(EVEN)}),
    "fp8-tensor": (fp8_tensor, {**_FP8, "activation_scheme": "static"}),
    "ct-fp8": (fp8_channel, _group("float-quantized", 8, "float", "channel")),
    "ct-int8": (int8_channel, _group("int-quantized", 8, "int", "channel")),
    "ct-int4": (int4_group, _group("pack-quantized", 4, "int", "group")),
    "ct-int4-asym": (int4_asymmetric, _group("pack-quantized", 4, "int", "group", symmetric=False)),
}


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether quantisers would store this tensor in low precision."""
    return tensor.ndim == 2 and ".layers." in name and not name.endswith((".gate.weight", ".router.weight"))


def quantised(folder: Path, out: Path, kind: str, **changes: Any) -> Path:
    """The checkpoint in ``folder`` stored as ``kind``; ``changes`` go into its quantization_config.

    Modules that the configuration lists by name stay in full precision.
    """
    function, config = KINDS[kind]
    config = {**config, **changes}
    left = [*config.get("ignore", ()), *(config.get("modules_to_not_convert") or ())]
    numbers = out.with_name(out.name + "-numbers")
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if is_matrix(name, tensor) and name.removesuffix(".weight") not in left:
                parts, plain[name] = function(tensor.float())
                plain[name] = plain[name].to(tensor.dtype)
                stored |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
            else:
                stored[name] = plain[name] = tensor
    for where, tensors in ((out, stored), (numbers, plain)):
        shutil.copytree(folder, where, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file({name: value.contiguous() for name, value in tensors.items()}, where / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
    return out


def numbers_of(folder: Path) -> Path:
    """The full-precision checkpoint of the numbers that a quantised one stands for."""
    return folder.with_name(folder.name + "-numbers")
