"""Tiny checkpoints with heads that predict further tokens, under the names of the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families import TINY, save_tiny

#: family -> how published checkpoints name a head: its decoder layer, what is beside it, the field that counts heads.
LAYOUTS: dict[str, tuple[str, dict[str, str], str]] = {
    family: (
        "model.layers.{last}.",
        {
            "model.layers.{last}.eh_proj.weight": "wide",
            "model.layers.{last}.enorm.weight": "norm",
            "model.layers.{last}.hnorm.weight": "norm",
            "model.layers.{last}.shared_head.norm.weight": "norm",
            "model.layers.{last}.shared_head.head.weight": "vocabulary",
            "model.layers.{last}.embed_tokens.weight": "vocabulary",
        },
        "num_nextn_predict_layers",
    )
    for family in ("deepseek_v3", "glm4_moe")
} | {
    family: (
        "mtp.layers.0.",
        {
            "mtp.fc.weight": "wide",
            "mtp.norm.weight": "norm",
            "mtp.pre_fc_norm_embedding.weight": "norm",
            "mtp.pre_fc_norm_hidden.weight": "norm",
        },
        field,
    )
    for family, field in (("qwen3_next", "num_nextn_predict_layers"), ("qwen3_5_moe_text", "mtp_num_hidden_layers"))
}


def with_head(family: str, folder: Path, **overrides: Any) -> tuple[Path, dict[str, Tensor]]:
    """A tiny checkpoint with a head, made of its last layer with other numbers; and the tensors of the head."""
    save_tiny(family, folder, **overrides)
    tensors = load_file(folder / "model.safetensors")
    config = TINY[family](**overrides)
    depth, D = config.num_hidden_layers, config.hidden_size
    layer, beside, field = LAYOUTS[family]
    generator = torch.Generator().manual_seed(1)
    head = {
        name.replace(f"model.layers.{depth - 1}.", layer.format(last=depth)): value
        + 0.1 * torch.randn(value.shape, generator=generator) ** (1 + 2 * (number % 3))
        for number, (name, value) in enumerate(sorted(tensors.items()))
        if name.startswith(f"model.layers.{depth - 1}.")
    }
    shapes = {"wide": (D, 2 * D), "norm": (D,), "vocabulary": tuple(tensors["lm_head.weight"].shape)}
    for name, kind in beside.items():
        value = torch.randn(shapes[kind], generator=generator) * 0.2
        head[name.format(last=depth)] = 1 + value if kind == "norm" else value
    save_file({**tensors, **head}, folder / "model.safetensors", {"format": "pt"})
    stated = json.loads((folder / "config.json").read_text())
    stated.pop("num_mtp_layers", None)
    (folder / "config.json").write_text(json.dumps({**stated, field: 1}))
    return folder, head
