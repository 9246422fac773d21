"""Consolidated checkpoints written by hand, key by key: what the runtime is tested with, whatever ``apply`` does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conmoe.runtime import packaged_files, shared_config
from tests.families import EXPERTS, save_tiny

#: Eight logical experts on five prototypes, which are the experts 1, 2, 3, 5 and 6.
KEPT = (1, 2, 3, 5, 6)
MAP = (0, 0, 1, 2, 1, 3, 4, 2)

_ONE_EXPERT = re.compile(r"^(.*\.experts\.)(\d+)(\..*)$")
_FUSED = re.compile(r"\.experts\.\w+$|\.(input|output)_linear\.weight$")
_ROUTER = re.compile(r"^(.*\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.)(gate|router)(?:\.layer)?\.weight$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def write_shared(
    family: str,
    folder: Path,
    *,
    kept: Sequence[int] = KEPT,
    expert_map: Sequence[int] = MAP,
    gains: Sequence[float] | None = None,
    **overrides: Any,
) -> Path:
    """A ``shared`` checkpoint of the tiny model of ``family``; every MoE layer keeps the same experts."""
    save_tiny(family, folder, **overrides)
    config = json.loads((folder / "config.json").read_text())
    stock = load_file(folder / "model.safetensors")
    tensors = _keep(stock, kept)
    for key in stock:
        if router := _ROUTER.match(key):
            # The one family that renames its router renames the weight alone.
            module = router[1] + ("router" if family == "phimoe" else router[3])
            tensors[f"{module}.expert_map"] = torch.tensor(expert_map)
            tensors[f"{module}.expert_gain"] = torch.tensor(gains or [1.0] * len(expert_map))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    architecture = config["architectures"][0]
    shared = shared_config(config, family, architecture, prototypes=len(kept), logical=EXPERTS)
    return _finish(folder, family, shared)


def write_scope(family: str, folder: Path, pools: dict[int, tuple[int, int]], **overrides: Any) -> Path:
    """A ``shared`` checkpoint whose pools hold the first experts of their owners, of any size up to E."""
    save_tiny(family, folder, **overrides)
    config = json.loads((folder / "config.json").read_text())
    stock = load_file(folder / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for key, tensor in stock.items():
        layer = _LAYER.search(key)
        owner, size = pools.get(int(layer[1]), (-1, 0)) if layer else (-1, 0)
        if owner < 0 or not _is_expert(key):
            tensors[key] = tensor
        elif owner == int(layer[1]):  # type: ignore[index]
            tensors |= _keep({key: tensor}, range(size))
    for key in stock:
        if router := _ROUTER.match(key):
            size = pools[int(router[2])][1]
            tensors[f"{router[1]}{router[3]}.expert_map"] = torch.arange(EXPERTS) % size
            tensors[f"{router[1]}{router[3]}.expert_gain"] = torch.ones(EXPERTS)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    largest = max(size for _, size in pools.values())
    architecture = config["architectures"][0]
    shared = shared_config(config, family, architecture, prototypes=largest, logical=EXPERTS, pools=pools)
    return _finish(folder, family, shared)


def write_expanded(family: str, folder: Path, *, expert_map: Sequence[int] = MAP, **overrides: Any) -> Path:
    """The stock model that must answer as the ``shared`` one does: every expert is a copy of its prototype."""
    save_tiny(family, folder, **overrides)
    prototypes = [KEPT[prototype] for prototype in expert_map]
    tensors = _keep(load_file(folder / "model.safetensors"), prototypes)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _is_expert(key: str) -> bool:
    return bool(_ONE_EXPERT.match(key) or _FUSED.search(key))


def _keep(tensors: dict[str, Tensor], experts: Sequence[int]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if one := _ONE_EXPERT.match(key):
            places = [place for place, expert in enumerate(experts) if expert == int(one[2])]
            kept |= {f"{one[1]}{place}{one[3]}": tensor.clone() for place in places}
        elif _FUSED.search(key):
            kept[key] = tensor[list(experts)].clone()
        else:
            kept[key] = tensor
    return kept


def _finish(folder: Path, family: str, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in packaged_files(family):
        shutil.copy(file, folder / file.name)
    return folder
