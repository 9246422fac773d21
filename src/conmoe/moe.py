"""Find the MoE layers of a model, and translate between a family's expert layout and the canonical one.

The structural rule (Transformers 5): the experts are the module that ``use_experts_implementation`` decorated, their
block is its parent, the router is the block's ``gate`` or ``router``. It needs no table of families; what departs from
it is refused in one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from conmoe.runtime import COUNT_FIELDS
from conmoe.types import Experts, Reroute, UsageError


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One MoE layer of a model: where its parts are in the module tree, and its numbers."""

    index: int  # decoder layer
    decoder: str  # path of the decoder layer
    block: str
    experts: str
    router: str
    logical: int  # E
    stored: int  # experts whose weights are stored: E, or the pool of a consolidated checkpoint
    top_k: int
    groups: int  # router groups, 1 where the router knows none
    groups_used: int  # groups a token may choose from


def count_field(config: PretrainedConfig) -> str:
    """The name under which this configuration stores its number of routed experts (never an alias of it)."""
    for name in COUNT_FIELDS:
        if name not in type(config).attribute_map and getattr(config, name, None) is not None:
            return name
    raise UsageError(f"The configuration of type {config.model_type!r} names no number of routed experts.")


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder layers."""
    base = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is base)
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UsageError(
            f"{type(model).__name__} has no list of decoder layers named 'layers'; conmoe cannot stream it."
        )
    return f"{prefix}.layers" if prefix else "layers", layers


def moe_layers(model: PreTrainedModel) -> tuple[MoeLayer, ...]:
    """The MoE layers of ``model`` in depth order.

    Raises:
        UsageError: the model is dense, or its MoE layers depart from the common rule.
    """
    kind = model.config.model_type
    if not any("expert" in name.lower() for name, _ in model.named_modules()):
        raise UsageError(f"This is a dense model (type {kind!r}): it has no experts to consolidate.")
    path, layers = decoder_layers(model)
    found, condensed = [], 0
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if hasattr(module, "static_gate"):
                condensed += 1
            elif hasattr(module, "is_concatenated"):
                experts = f"{path}.{index}.{name}"
                if not is_condensed_block(model.get_submodule(experts.rpartition(".")[0])):
                    found.append(_moe_layer(model, index, f"{path}.{index}", experts, module))
    if not found and not condensed:
        raise UsageError(f"The experts of model type {kind!r} are built in a way that conmoe does not support yet.")
    if len({layer.index for layer in found}) != len(found):
        raise UsageError(f"Model type {kind!r} has two sets of experts in one layer; not supported.")
    return tuple(found)


def is_condensed_block(block: nn.Module) -> bool:
    """Whether a block has lost its router: its experts answer every token."""
    return any(hasattr(child, "static_gate") for child in block.children())


def scores_name(router: nn.Module, E: int) -> str:
    """Of a router's parameters, the one that has a row for each of ``E`` experts by which it scores them."""
    return next(name for name, value in router.state_dict().items() if value.ndim == 2 and value.shape[0] == E)


def rerouter(router: nn.Module, arguments: Mapping[str, Tensor], experts: int, top_k: int) -> Reroute:
    """What a router chooses when only some experts are left, by its own code.

    The scores of the others are minus infinity, wherever they enter: as logits, and in biases of one number for each
    expert. That is what a router without their rows computes.

    Args:
        router: a router with its weights, ours to change.
        arguments: tensors that the block passes to it beside the hidden states, by name.
        experts: how many it chooses from.
        top_k: experts for each token.
    """
    E, name_of_scores = experts, scores_name(router, experts)
    scores = router.state_dict()[name_of_scores]

    def reroute(hidden_nD: Tensor, kept_K: Tensor, router_KD: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
        device, kept_K = hidden_nD.device, kept_K.to(scores.device)
        dropped_E = torch.ones(E, dtype=torch.bool, device=scores.device)
        dropped_E[kept_K] = False
        biases = {name: value for name, value in router.state_dict().items() if value.numel() == E}
        masked = {name: value.masked_fill(dropped_E.view(value.shape), -torch.inf) for name, value in biases.items()}
        given = {
            name: value.masked_fill(dropped_E.view(value.shape), -torch.inf) if value.numel() == E else value
            for name, value in arguments.items()
        }
        dtype = torch.promote_types(hidden_nD.dtype, scores.dtype if router_KD is None else router_KD.dtype)
        if not hidden_nD.dtype == scores.dtype == dtype:  # as in a model of that dtype; not all routers convert
            masked = {name: value.to(dtype) for name, value in (router.state_dict() | masked).items()}
        if router_KD is not None:
            rows_KD = router_KD.to(scores.device, dtype)
            masked[name_of_scores] = scores.to(dtype).index_copy(0, kept_K, rows_KD)
        hidden_nD = hidden_nD.to(scores.device, dtype)
        with _Masked(dropped_E), torch.set_grad_enabled(router_KD is not None and router_KD.requires_grad):
            outputs = torch.func.functional_call(router, masked, (hidden_nD,), given)
        index_nk = outputs[-1] if outputs[0].is_floating_point() else outputs[0]
        index_nk, weight_nk = index_nk.reshape(-1, top_k), outputs[1].reshape(-1, top_k).float()
        return index_nk.to(device), weight_nk.to(device)

    return reroute


class _Masked(TorchFunctionMode):
    """While it lasts, linear maps onto the experts' scores give minus infinity for those that are dropped."""

    def __init__(self, dropped_E: Tensor) -> None:
        super().__init__()
        self._dropped_E = dropped_E

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and out.shape[-1] == len(self._dropped_E):
            return out.masked_fill(self._dropped_E, -torch.inf)
        return out


def canonical(module: nn.Module, values: Mapping[str, Tensor]) -> Experts:
    """The experts module of any family as :class:`Experts`; the tensors are views of ``values``.

    Args:
        module: the experts module (its weights may be on the meta device).
        values: its parameters, by name.
    """
    gate_up, down = values["gate_up_proj"], values["down_proj"]
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    gate, up = _split(module, gate_up)
    gate_bias, up_bias = _split(module, values["gate_up_proj_bias"]) if module.has_bias else (None, None)
    return Experts(
        gate, up, down, lambda g, u: _activate(module, g, u), gate_bias, up_bias, values.get("down_proj_bias")
    )


def family_layout(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`canonical`: canonical tensors (of ``K`` prototypes) as the family's parameters."""
    gate_up = _join(module, tensors["gate_EID"], tensors["up_EID"])
    down = tensors["down_EDI"]
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    values = {"gate_up_proj": gate_up.contiguous(), "down_proj": down.contiguous()}
    if module.has_bias:
        values["gate_up_proj_bias"] = _join(module, tensors["gate_bias_EI"], tensors["up_bias_EI"])
        values["down_proj_bias"] = tensors["down_bias_ED"]
    return values


def logical_rows(model: PreTrainedModel, layer: MoeLayer) -> dict[str, int]:
    """Every tensor of the block that holds one row per logical expert, outside the experts, and the axis of the rows.

    These are the router's weight and biases wherever the family keeps them, also those the block owns itself.
    """
    block, router = model.get_submodule(layer.block), layer.router.removeprefix(layer.block + ".")
    rows = {}
    for name, value in block.state_dict().items():
        own = "." not in name or name.startswith(router + ".")
        axes = [axis for axis, size in enumerate(value.shape) if size == layer.logical]
        if own and axes:
            rows[f"{layer.block}.{name}"] = axes[0]
    return rows


def _moe_layer(model: PreTrainedModel, index: int, decoder: str, experts: str, module: nn.Module) -> MoeLayer:
    kind = model.config.model_type
    block_path = experts.rpartition(".")[0]
    block = model.get_submodule(block_path)
    router = next((name for name in ("gate", "router") if isinstance(getattr(block, name, None), nn.Module)), None)
    if router is None:
        raise UsageError(f"Model type {kind!r} keeps no router beside its experts ({block_path}); not supported.")
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        raise UsageError(f"The experts of model type {kind!r} are not gated MLPs of the common form; not supported.")
    gate = getattr(block, router)
    logical = int(
        getattr(model.config, "num_logical_experts", None) or getattr(model.config, count_field(model.config))
    )
    scores = gate.state_dict()
    if "expert_map" in scores:  # a consolidated router may have lost rows
        logical = len(scores["expert_map"])
    if not any(value.ndim == 2 and value.shape[0] == logical for value in scores.values()):
        raise UsageError(f"The router of model type {kind!r} does not have one row for each expert; not supported.")
    if any(not value.is_floating_point() for name, value in scores.items() if name != "expert_map"):
        raise UsageError(f"The router of model type {kind!r} chooses experts by a table; not supported.")
    top_k = getattr(gate, "top_k", None) or getattr(block, "top_k", None)
    if not isinstance(top_k, int):
        raise UsageError(
            f"The router of model type {kind!r} does not say how many experts a token gets; not supported."
        )
    grouped = getattr(gate, "topk_method", "group_limited_greedy") == "group_limited_greedy"
    groups = int(getattr(gate, "num_group", None) or 1) if grouped else 1
    used = int(getattr(gate, "topk_group", None) or 1) if groups > 1 else 1
    stored = int(module.num_experts)  # type: ignore[arg-type]
    return MoeLayer(index, decoder, block_path, experts, f"{block_path}.{router}", logical, stored, top_k, groups, used)


def _split(module: nn.Module, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up of a fused tensor whose axis 1 holds both."""
    if module.is_concatenated:
        gate, up = gate_up.chunk(2, dim=1)
        return gate, up
    return gate_up[:, ::2], gate_up[:, 1::2]


def _join(module: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat((gate, up), dim=1) if module.is_concatenated else torch.stack((gate, up), dim=2).flatten(1, 2)


def _activate(module: nn.Module, gate_nI: Tensor, up_nI: Tensor) -> Tensor:
    hidden: Tensor = module._apply_gate(_join(module, gate_nI, up_nI))  # type: ignore[operator]
    return hidden
