"""What a consolidated checkpoint needs to run: Transformers classes, the packaged modelling files, the vLLM plugin."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto import configuration_auto, modeling_auto

from conmoe.types import ConmoeError

#: Families whose consolidated forms are tested; any other one that keeps to the common seam can be registered too.
FAMILIES = (
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
)
MODEL_TYPE_PREFIX = "conmoe_"
CLASS_PREFIX = "Conmoe"
COUNT_FIELDS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class ClassNames:
    """The stock classes of a family, by name."""

    config: str
    model: str
    causal: str


def register() -> None:
    """Make the Auto classes of Transformers load consolidated checkpoints of every family, and DeepSeekMoE itself."""
    for model_type in FAMILIES:
        register_family(model_type)


@cache
def register_family(model_type: str) -> None:
    """Make the Auto classes load consolidated checkpoints of the source family ``model_type``."""
    names = class_names(model_type)
    if model_type == "deepseek":
        _register(importlib.import_module("conmoe.runtime.modeling_deepseek"), names, "")
    _register(_module(model_type), names, CLASS_PREFIX)


def _register(module: Any, names: ClassNames, prefix: str) -> None:
    config = getattr(module, prefix + names.config)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, getattr(module, prefix + names.model), exist_ok=True)
    AutoModelForCausalLM.register(config, getattr(module, prefix + names.causal), exist_ok=True)


def class_names(model_type: str) -> ClassNames:
    """The stock classes of a family, by name; an error if Transformers has no causal language model of it."""
    if model_type == "deepseek":
        return ClassNames("DeepseekConfig", "DeepseekModel", "DeepseekForCausalLM")
    tables = (
        configuration_auto.CONFIG_MAPPING_NAMES,  # type: ignore[attr-defined]
        modeling_auto.MODEL_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    names = [table.get(model_type) for table in tables]
    if not all(isinstance(name, str) for name in names):
        raise ConmoeError(f"Transformers has no causal language model of type {model_type!r}: use another form.")
    return ClassNames(*names)  # type: ignore[arg-type]


def packaged_files(model_type: str) -> tuple[Path, ...]:
    """The modelling files that belong next to the weights of a consolidated checkpoint of a family."""
    own = ("modeling_conmoe_deepseek.py", "modeling_deepseek.py") if model_type == "deepseek" else ()
    return tuple(_HERE / name for name in ("modeling_conmoe.py", *own))


def shared_config(
    source: Mapping[str, Any],
    model_type: str,
    architecture: str,
    *,
    prototypes: int,
    logical: int,
    pools: Mapping[int, tuple[int, int]] | None = None,
    departures: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The config.json of a ``shared`` checkpoint, from that of its source.

    ``prototypes`` is the size of the largest pool. ``pools`` maps a decoder layer to the layer that owns its pool and
    the pool's size; it may be left out where every layer owns a pool of ``prototypes``. ``departures`` says what else
    is particular about a layer, as :mod:`conmoe.runtime.modeling_conmoe` reads it.
    """
    counts = [field for field in COUNT_FIELDS if source.get(field) == logical]
    if not counts:
        raise ConmoeError(f"The config of the source states no expert count of {logical}: looked for {COUNT_FIELDS}.")
    names, module = class_names(model_type), _module_name(model_type)
    classes = {"AutoConfig": names.config, "AutoModel": names.model, "AutoModelForCausalLM": architecture}
    return {
        **source,
        **dict.fromkeys(counts, prototypes),
        "model_type": MODEL_TYPE_PREFIX + model_type,
        "architectures": [CLASS_PREFIX + architecture],
        "auto_map": {auto: f"{module}.{CLASS_PREFIX}{name}" for auto, name in classes.items()},
        "num_logical_experts": logical,
        "expert_pools": None if pools is None else {str(layer): list(pool) for layer, pool in pools.items()},
        "consolidated_layers": {str(layer): dict(found) for layer, found in departures.items()} if departures else None,
    }


def _module_name(model_type: str) -> str:
    return "modeling_conmoe_deepseek" if model_type == "deepseek" else "modeling_conmoe"


def _module(model_type: str) -> Any:
    return importlib.import_module(f"conmoe.runtime.{_module_name(model_type)}")
