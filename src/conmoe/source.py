"""A checkpoint on disk, opened by its headers: configuration, model without weights, layout, MoE layers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from conmoe.checkpoint import Layout, read_layout, read_module, read_parameter
from conmoe.lowprec import Scheme, is_low, read_scheme, views
from conmoe.moe import MoeLayer, canonical, moe_layers, rerouter, scores_name
from conmoe.shards import DTYPES, Held, read_entries
from conmoe.types import Experts, UsageError


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, opened by its headers: the model is on the meta device, no weight is read."""

    folder: Path
    config: PretrainedConfig
    model: PreTrainedModel
    entries: Mapping[str, Held]
    layout: Layout
    layers: tuple[MoeLayer, ...]
    scheme: Scheme | None = None  # how its matrices are stored, where that is in low precision

    @property
    def vocabulary(self) -> int:
        """How many tokens the model can read."""
        return self.model.get_input_embeddings().get_parameter("weight").shape[0]

    @property
    def files(self) -> list[Path]:
        return [entry.file for entry in self.entries.values()]

    @property
    def tensors(self) -> list[Held]:
        """Every tensor, each matrix in one piece, whatever it is stored as."""
        return [*(piece.entry for pieces in self.layout.sources.values() for piece in pieces), *self.layout.ignored]

    @property
    def low_experts(self) -> bool:
        """Whether weights of routed experts are in low precision."""
        prefixes = tuple(f"{layer.experts}." for layer in self.layers)
        sources = self.layout.sources.items()
        return any(is_low(piece.entry) for name, pieces in sources if name.startswith(prefixes) for piece in pieces)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        UsageError: the folder holds no readable configuration, one of an unknown type, or is quantised in an unknown
            way.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no model: it holds no config.json.")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"The configuration of {folder} cannot be used: {reason}") from error
    read_scheme(folder, getattr(config, "quantization_config", None))
    return config


def open_source(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    experts_implementation: str | None = None,
    trust_remote_code: bool = False,
    entries: Mapping[str, Held] | None = None,
) -> Source:
    """Open a checkpoint by its headers alone and check that every tensor has its place.

    Args:
        folder: a local checkpoint folder.
        dtype: in which to compute; None for the checkpoint's own.
        experts_implementation: a name registered with Transformers; None for its default.
        trust_remote_code: run modelling code that comes with the checkpoint.
        entries: the headers, where they are known already.

    Raises:
        UsageError: no model, a dense model, or an unsupported family.
        ConmoeError: a damaged checkpoint.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    entries = read_entries(folder) if entries is None else entries
    scheme = read_scheme(folder, getattr(config, "quantization_config", None))
    dtype = dtype or _dtype_on_disk(config, entries)
    whole = entries
    if scheme:
        del config.quantization_config  # the model is that of full precision
        whole = views(entries, scheme, dtype)
    model = _meta_model(config, dtype, experts_implementation, trust_remote_code)
    layers = moe_layers(model)
    return Source(folder, config, model, entries, read_layout(model, whole), layers, scheme)


def check_compressible(source: Source) -> None:
    """Raise if ``source`` runs but nothing smaller can be made of it."""
    if getattr(source.config, "num_logical_experts", None) is not None:
        raise UsageError(f"{source.folder} is consolidated already; compress the checkpoint it was made from.")
    if source.config.get_text_config() is not source.config:
        raise UsageError(
            f"{source.folder} holds a language model beside others (type {source.config.model_type!r}); conmoe "
            "compresses language models alone."
        )


def outline_experts(source: Source, layer: MoeLayer) -> Experts:
    """The experts of one layer as shapes without values, for those who do not need the weights."""
    module = source.model.get_submodule(layer.experts)
    return canonical(module, dict(module.named_parameters()))


def read_experts(source: Source, layer: MoeLayer) -> Experts:
    """The experts of one layer, from disk, in their dtype on disk, or the model's if that is low precision."""
    module = source.model.get_submodule(layer.experts)
    values = {}
    for name, _ in module.named_parameters():
        target = f"{layer.experts}.{name}"
        dtype = DTYPES[source.layout.sources[target][0].entry.dtype]
        values[name] = read_parameter(source.layout, source.model, target, dtype)
    router = copy.deepcopy(source.model.get_submodule(layer.router))  # small beside the experts
    router.load_state_dict(read_module(source.layout, source.model, f"{layer.router}.", router), assign=True)
    return replace(
        canonical(module, values),
        reroute=rerouter(router, _router_arguments(source, layer, router), layer.logical, layer.top_k),
        router_ED=router.state_dict()[scores_name(router, layer.logical)],
    )


def _router_arguments(source: Source, layer: MoeLayer, router: nn.Module) -> dict[str, Tensor]:
    """What the block passes to its router beside the hidden states."""
    block = source.model.get_submodule(layer.block)
    names = [name for name in inspect.signature(router.forward).parameters if hasattr(block, name)]
    return {
        name: read_parameter(source.layout, source.model, f"{layer.block}.{name}", getattr(block, name).dtype)
        for name in names
    }


def _meta_model(
    config: PretrainedConfig, dtype: torch.dtype, experts_implementation: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, computed buffers (rotary tables) real."""
    options: dict[str, Any] = {"experts_implementation": experts_implementation} if experts_implementation else {}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"Model type {config.model_type!r} is not supported: {reason}") from error
    owners = {name.rpartition(".")[0] for name, _ in model.named_non_persistent_buffers()}
    with torch.no_grad():
        for name in owners:
            module = model.get_submodule(name)
            for key in module._non_persistent_buffers_set:
                buffer = module._buffers[key]
                if buffer is not None:
                    module._buffers[key] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)
    model.eval().requires_grad_(False)
    return model


def _dtype_on_disk(config: PretrainedConfig, entries: Mapping[str, Held]) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    own = (entry for name, entry in entries.items() if "_scale" not in name)  # scales have a dtype of theirs
    return next((kinds[entry.dtype] for entry in own if entry.dtype in kinds), torch.float32)
