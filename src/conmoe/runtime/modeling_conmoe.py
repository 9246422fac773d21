"""Consolidated Mixture-of-Experts models: stock Transformers classes whose router names more experts than are stored.

``ConmoeOlmoeForCausalLM`` is ``transformers.OlmoeForCausalLM`` with two differences, and so for every other family:

* the routed experts of a layer hold its pool of K prototypes, where the family's own expert count in the config is K;
* the router still scores ``num_logical_experts`` = E experts, then replaces each chosen index by ``expert_map[index]``
  and multiplies its gate by ``expert_gain[index]``. The map lives in the router because engines such as vLLM replace
  a plain router by their own, and leave one with tensors of its own alone.

``expert_pools`` in the config says where layers share a pool or pools differ in size: it maps a decoder layer to
``[owner, size]``, the layer whose tensors hold the pool and the number of prototypes in it.

``consolidated_layers`` says what else a decoder layer departs in:

* ``rows``: its router has so many rows left; the experts of the others were dropped, and the softmax (or whatever the
  family does) runs over the survivors. ``expert_map`` and ``expert_gain`` have one entry for each row.
* ``constants``: so many logical experts answer with a constant vector; they are mapped to ``K`` and above.
* ``static``: the layer is condensed. It has no router: so many experts answer every token, with the gates
  ``static_gate``.
* ``skip``: chosen experts are skipped where their gate is below ``expert_skip`` times the highest of their token.
* ``factors``: each expert matrix is a low rank plus some whole rows or columns; for ``gate``, ``up`` and ``down`` the
  rank, the number of lines kept in all experts together, and their ``structure``.

This file is copied next to the weights, so it needs nothing but torch and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

PREFIX = "Conmoe"
COUNT_FIELDS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
#: The tensors that a consolidated checkpoint has beside those of its family.
OWN_TENSORS = (
    *("expert_map", "expert_gain", "expert_skip", "static_gate", "constant_experts"),
    *(f"{matrix}_{part}" for matrix in ("gate", "up", "down") for part in ("left", "right", "values", "index")),
)


def __getattr__(name: str) -> Any:
    """``ConmoeX`` is the consolidated form of ``transformers.X``: no table of families to keep."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return consolidated(stock, __name__)


@cache
def consolidated(stock: Any, module: str) -> Any:
    """The consolidated form of a stock config or model class; ``module`` is the file that gets saved with it."""
    return _config_class(stock, module) if issubclass(stock, PretrainedConfig) else _model_class(stock, module)


def count_field(config: PretrainedConfig) -> str:
    """The field in which a family stores its number of experts; the others, where present, are aliases of it."""
    for name in COUNT_FIELDS:
        if name not in type(config).attribute_map and hasattr(config, name):
            return name
    raise ValueError(f"The {config.model_type} config has none of the expert counts {', '.join(COUNT_FIELDS)}.")


class ConsolidatedModel(PreTrainedModel):
    """What turns a stock model, named second among the bases, into its consolidated form."""

    _pool_ties: Mapping[str, str] = MappingProxyType({})  # parameter that shares a pool -> parameter that owns it

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        _refuse_unfit_engine(config)
        field = count_field(config)
        prototypes = getattr(config, field)
        logical = getattr(config, "num_logical_experts", None) or prototypes
        # Built with E experts, everything but the experts themselves comes out right: routers, their biases wherever
        # the family keeps them, and the count in the load balancing loss.
        setattr(config, field, logical)
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            setattr(config, field, prototypes)
        self._consolidate(logical, prototypes)
        self.post_init()

    def _consolidate(self, logical: int, prototypes: int) -> None:
        pools = getattr(self.config, "expert_pools", None) or {}
        departures = getattr(self.config, "consolidated_layers", None) or {}
        ties: dict[str, str] = {}
        for name, experts, router in list(routed_experts(self)):
            layer = _decoder_layer(name)
            owner, size = pools.get(str(layer), (layer, prototypes))
            departure = departures.get(str(layer), {})
            block = self.get_submodule(name.rpartition(".")[0])
            if isinstance(router, nn.Linear) and self.config._attn_implementation == "vllm":
                router = _replaced(block, router, ParameterRouter(router))
            if "static" in departure:
                _condense(block, experts, router, logical, departure["static"])
                continue
            _resize(experts, logical, size)
            if "factors" in departure:
                experts = FactoredExperts(experts, departure["factors"])
                block.experts = experts
            rows = departure.get("rows", logical)
            if rows != logical:
                _cut_rows(block, router, logical, rows)
            _remap(router, rows, size + departure.get("constants", 0))
            if "constants" in departure:
                _add_constants(experts, departure["constants"], self.config.hidden_size)
            if departure.get("skip"):
                router.register_buffer("expert_skip", torch.zeros((), dtype=torch.float32))
            if departure.get("skip") or "constants" in departure:
                # The library then takes an index above the experts for a slot that runs none.
                experts._is_expert_parallel = True  # type: ignore[assignment]
            if owner != layer:
                source = name.replace(f"layers.{layer}.", f"layers.{owner}.")
                ties |= {f"{name}.{tensor}": f"{source}.{tensor}" for tensor, _ in experts.named_parameters()}
        exact = {f"{re.escape(sharer)}$": f"{re.escape(owner)}$" for sharer, owner in ties.items()}
        self._pool_ties = ties
        self._tied_weights_keys = {**(self._tied_weights_keys or {}), **exact}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # The stock method ties nothing unless the word embeddings are tied; pools are shared either way.
        return {**super().get_expanded_tied_weights_keys(all_submodels), **self._pool_ties}

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The stock method looks for the experts in the source of the file that defines the model.
        return True

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        resized = {key for key, *_ in info["mismatched_keys"]}
        check_maps(model, set(info["missing_keys"]) | resized)
        return loaded if output_loading_info else model


def routed_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Name and module of each layer's routed experts, and their router."""
    for name, experts in model.named_modules():
        if not hasattr(experts, "is_concatenated"):
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        if not isinstance(router, nn.Module):
            raise ValueError(f"The block around {name} has neither a gate nor a router, so it cannot be consolidated.")
        yield name, experts, router


def check_maps(model: nn.Module, missing: set[str]) -> None:
    """Refuse a checkpoint whose routers would point to experts that are not there; ``missing`` ones were not loaded."""
    absent = sorted(key for key in missing if key.rpartition(".")[2] in OWN_TENSORS)
    if absent:
        raise ValueError(
            f"The checkpoint lacks {', '.join(absent)}, or has them in a length that is not its expert count."
        )
    for name, experts, router in routed_experts(model):
        if isinstance(router, StaticRouter):
            continue
        map_E, size = router.get_buffer("expert_map"), len(next(experts.parameters()))
        size += len(getattr(experts, "constant_experts", ()))
        if map_E.is_meta:
            continue
        lowest, highest = int(map_E.min()), int(map_E.max())
        if lowest < 0 or highest >= size:
            raise ValueError(
                f"The expert_map of the router of {name} names experts {lowest} to {highest}, "
                f"but the checkpoint stores experts 0 to {size - 1} there."
            )


def _refuse_unfit_engine(config: PretrainedConfig) -> None:
    if config._attn_implementation != "vllm":
        return
    pools = getattr(config, "expert_pools", None) or {}
    # vLLM would leave the layers that store no experts of their own uninitialised, without a word.
    if any(int(layer) != owner for layer, (owner, _) in pools.items()):
        raise ValueError("vLLM cannot serve layers that share their experts: write the expanded form instead.")
    if getattr(config, "consolidated_layers", None):
        raise ValueError(
            "vLLM cannot serve layers that are condensed, skip experts, answer with constants, lost router rows or "
            "hold factors: use Transformers, or a uniform plan in the sliced form."
        )


def _decoder_layer(name: str) -> int:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if found is None:
        raise ValueError(f"The experts {name} do not belong to a numbered decoder layer.")
    return int(found.group(1))


def _resize(experts: nn.Module, logical: int, size: int) -> None:
    for name, tensor in list(experts.named_parameters()):
        if tensor.shape[0] != logical:
            raise ValueError(f"The expert tensor {name} has {tensor.shape[0]} rows, not one per expert ({logical}).")
        rows = torch.arange(size, device=tensor.device) % logical
        holder, _, leaf = name.rpartition(".")
        resized = nn.Parameter(tensor.detach()[rows], requires_grad=tensor.requires_grad)
        setattr(experts.get_submodule(holder), leaf, resized)
    experts.num_experts = size  # type: ignore[assignment]


def _cut_rows(block: nn.Module, router: nn.Module, logical: int, rows: int) -> None:
    """Leave ``rows`` of the router's logical experts, in every tensor of one row each, wherever the family keeps it."""
    for holder in (block, *router.modules()):
        own = [*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False)]
        for name, tensor in own:
            axis = next((axis for axis, size in enumerate(tensor.shape) if size == logical), None)
            if axis is not None:
                cut = tensor.detach().narrow(axis, 0, rows).clone()
                setattr(holder, name, nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut)
    for module in router.modules():
        for field in COUNT_FIELDS:
            if getattr(module, field, None) == logical:
                setattr(module, field, rows)


def _condense(block: nn.Module, experts: nn.Module, router: nn.Module, logical: int, size: int) -> None:
    _replaced(block, router, StaticRouter(size))
    if size:
        _resize(experts, logical, size)
    else:
        block.experts = NoExperts()


def _replaced(block: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    name = next(name for name, child in block.named_children() if child is old)
    setattr(block, name, new)
    return new


def _add_constants(experts: nn.Module, constants: int, width: int) -> None:
    experts.constant_experts = nn.Parameter(torch.zeros(constants, width))
    stock: Any = type(experts)
    experts.__class__ = _with_constants(stock)


@cache
def _with_constants(stock: Any) -> Any:
    return type(f"{PREFIX}{stock.__name__}", (ConstantExperts, stock), {"__module__": __name__})


class ConstantExperts(nn.Module):
    """Stock experts, named second, beside experts that are constant vectors: indices from ``num_experts`` on."""

    constant_experts: nn.Parameter
    num_experts: int

    def forward(self, hidden_TD: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        constant_Tk = index_Tk >= self.num_experts
        number_Tk = (index_Tk - self.num_experts).clamp(min=0, max=len(self.constant_experts) - 1)
        gate_TC = weight_Tk.new_zeros(len(index_Tk), len(self.constant_experts))
        gate_TC = gate_TC.scatter_add(1, number_Tk, weight_Tk.masked_fill(~constant_Tk, 0))
        # The one index above the experts is the library's own mark for a slot that runs none.
        silent = index_Tk.clamp(max=self.num_experts), weight_Tk.masked_fill(constant_Tk, 0)
        out_TD: Tensor = super().forward(hidden_TD, *silent)
        return out_TD + gate_TC.to(out_TD.dtype) @ self.constant_experts.to(out_TD.dtype)


class FactoredExperts(nn.Module):
    """Experts whose matrices are ``left @ right`` plus some whole rows or columns; no matrix is ever put together.

    ``values`` holds these lines of all experts one after the other, ``index`` says which they are: ``expert * lines +
    line``, ascending, where ``lines`` is the number of rows (or columns) of one matrix.
    """

    def __init__(self, dense: nn.Module, factors: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.num_experts = len(next(dense.parameters()))
        self.is_concatenated, self.has_gate, self.has_bias = dense.is_concatenated, True, dense.has_bias
        self.structures = {matrix: str(found["structure"]) for matrix, found in factors.items()}
        down = next(tensor for name, tensor in dense.named_parameters() if name.endswith("down_proj"))
        out_features, inner = down.shape[1:] if not dense.is_transposed else down.shape[:0:-1]
        self.shapes = {"gate": (inner, out_features), "up": (inner, out_features), "down": (out_features, inner)}
        for matrix, found in factors.items():
            outputs, inputs = self.shapes[matrix]
            rank, kept, rows = found["rank"], found["kept"], found["structure"] == "rows"
            for name, shape in {
                "left": (self.num_experts, outputs, rank),
                "right": (self.num_experts, rank, inputs),
                "values": (kept, inputs if rows else outputs),
            }.items():
                empty = torch.zeros(shape, dtype=down.dtype, device=down.device)
                self.register_parameter(f"{matrix}_{name}", nn.Parameter(empty))
            self.register_buffer(f"{matrix}_index", torch.zeros(kept, dtype=torch.int64))
            if self.has_bias:
                empty = torch.zeros(self.num_experts, outputs, dtype=down.dtype, device=down.device)
                self.register_parameter(f"{matrix}_bias", nn.Parameter(empty))
        for name, _ in list(dense.named_parameters()):
            delattr(dense, name)
        self.__dict__["_dense"] = dense  # for its activation; not a submodule, it has no tensors left

    def forward(self, hidden_TD: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        out_TD = torch.zeros_like(hidden_TD)
        for expert in index_Tk.unique().tolist():
            if expert < self.num_experts:
                token_n, slot_n = torch.where(index_Tk == expert)
                x_nD = hidden_TD[token_n]
                gate_nI, up_nI = self._product("gate", expert, x_nD), self._product("up", expert, x_nD)
                hidden_nI = self.__dict__["_dense"]._apply_gate(self._joined(gate_nI, up_nI))
                answer_nD = self._product("down", expert, hidden_nI) * weight_Tk[token_n, slot_n, None]
                out_TD.index_add_(0, token_n, answer_nD.to(out_TD.dtype))
        return out_TD

    def _joined(self, gate_nI: Tensor, up_nI: Tensor) -> Tensor:
        if self.is_concatenated:
            return torch.cat((gate_nI, up_nI), dim=-1)
        return torch.stack((gate_nI, up_nI), dim=-1).flatten(-2)

    def _product(self, matrix: str, expert: int, x_nI: Tensor) -> Tensor:
        # Not get_parameter: where they are tuned, the values of this pass are plain tensors.
        left_Or, right_rI = getattr(self, f"{matrix}_left")[expert], getattr(self, f"{matrix}_right")[expert]
        values_SA, index_S = getattr(self, f"{matrix}_values"), getattr(self, f"{matrix}_index")
        rows = self.structures[matrix] == "rows"
        lines = self.shapes[matrix][0 if rows else 1]
        bounds = torch.tensor([expert, expert + 1], device=index_S.device) * lines
        first, last = torch.searchsorted(index_S, bounds).tolist()
        values_sA, line_s = values_SA[first:last], index_S[first:last] - expert * lines
        y_nO = nn.functional.linear(nn.functional.linear(x_nI, right_rI), left_Or)
        if rows:
            y_nO = y_nO.index_add(1, line_s, nn.functional.linear(x_nI, values_sA))
        else:
            y_nO = y_nO + x_nI[:, line_s] @ values_sA
        return y_nO + getattr(self, f"{matrix}_bias")[expert] if self.has_bias else y_nO


class StaticRouter(nn.Module):
    """In place of the router of a condensed layer: every expert answers every token, with the same gate."""

    static_gate: Tensor

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.register_buffer("static_gate", torch.zeros(experts, dtype=torch.float32))

    def forward(self, hidden_states: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden_states.numel() // hidden_states.shape[-1]
        gate_TK = self.static_gate.to(hidden_states.dtype).expand(tokens, -1)
        index_TK = torch.arange(len(self.static_gate), device=gate_TK.device).expand(tokens, -1)
        return gate_TK, gate_TK, index_TK


class NoExperts(nn.Module):
    """In place of the experts of a layer that was condensed to none."""

    def forward(self, hidden_TD: Tensor, *args: Any) -> Tensor:
        return torch.zeros_like(hidden_TD)


class ParameterRouter(nn.Module):
    """A stock router that is a linear layer itself, as one that only has parameters of the same names.

    vLLM replaces every linear layer by one of its own, and what this one adds to being linear would be lost.
    """

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__()
        for name, parameter in stock.named_parameters():
            self.register_parameter(name, parameter)
        self.__dict__["_stock"] = stock  # not a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stock = self.__dict__["_stock"].train(self.training)
        return torch.func.functional_call(stock, dict(self.named_parameters()), args, kwargs)


def _remap(router: nn.Module, logical: int, size: int) -> None:
    router.register_buffer("expert_map", torch.arange(logical) % size)
    router.register_buffer("expert_gain", torch.ones(logical, dtype=torch.float32))
    router.answers = size  # type: ignore[assignment]
    stock: Any = type(router)
    router.__class__ = _remapping(stock)


@cache
def _remapping(stock: Any) -> Any:
    # Still an instance of the stock router, which initialisation and the recording of router logits look for.
    return type(f"{PREFIX}{stock.__name__}", (RemappingRouter, stock), {"__module__": __name__})


class RemappingRouter(nn.Module):
    """Answers with the prototypes of the logical experts that the stock router, named second, has chosen."""

    expert_map: Tensor
    expert_gain: Tensor
    expert_skip: Tensor
    answers: int  # prototypes and constants; as an index, it is the library's mark for a slot that runs no expert

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        first, weight_Tk, last = super().forward(*args, **kwargs)
        # (logits, weights, indices), except that some families of older releases put the indices first.
        if last.is_floating_point():
            return *self._answer(first, weight_Tk), last
        index_Tk, weight_Tk = self._answer(last, weight_Tk)
        return first, weight_Tk, index_Tk

    def _answer(self, index_Tk: Tensor, weight_Tk: Tensor) -> tuple[Tensor, Tensor]:
        mapped_Tk = self.expert_map[index_Tk]
        if "expert_skip" in self._buffers:
            mapped_Tk, weight_Tk = self._skipped(mapped_Tk, weight_Tk)
        return mapped_Tk, weight_Tk * self.expert_gain[index_Tk].to(weight_Tk.dtype)

    def _skipped(self, mapped_Tk: Tensor, weight_Tk: Tensor) -> tuple[Tensor, Tensor]:
        skipped_Tk = weight_Tk < self.expert_skip.to(weight_Tk.dtype) * weight_Tk.amax(-1, keepdim=True)
        left_Tk = weight_Tk.masked_fill(skipped_Tk, 0)
        # The others take over its share of the token's gates, which is renormalising where the sum was one.
        left_Tk = left_Tk * (weight_Tk.sum(-1, keepdim=True) / left_Tk.sum(-1, keepdim=True))
        return mapped_Tk.masked_fill(skipped_Tk, self.answers), left_Tk


def _config_class(stock: Any, module: str) -> Any:
    fields = {name: "dict | None" for name in ("expert_pools", "consolidated_layers")}
    fields["num_logical_experts"] = "int | None"
    body: dict[str, Any] = {
        "__module__": module,
        "__doc__": f"{stock.__name__} of a consolidated model.",
        "__annotations__": fields,
        **dict.fromkeys(fields),
        "model_type": f"conmoe_{stock.model_type}",
        "_auto_class": "AutoConfig",
    }
    return type(f"{PREFIX}{stock.__name__}", (stock,), body)


def _model_class(stock: Any, module: str) -> Any:
    config = consolidated(stock.config_class, module)
    body: dict[str, Any] = {
        "__module__": module,
        "__doc__": f"{stock.__name__} with fewer stored experts than its routers name.",
        "config_class": config,
        "_keep_in_fp32_modules_strict": {
            *(stock._keep_in_fp32_modules_strict or ()),
            "expert_gain",
            "expert_skip",
            "static_gate",
        },
        "_auto_class": "AutoModelForCausalLM" if stock.__name__.endswith("ForCausalLM") else "AutoModel",
    }
    model = type(f"{PREFIX}{stock.__name__}", (ConsolidatedModel, stock), body)
    # The names on disk stay those of the family; without this they would be skipped for a class outside Transformers.
    _inherit_conversion(stock.__name__, model.__name__)
    _inherit_conversion(stock.config_class.model_type, config.model_type)
    return model


def _inherit_conversion(stock: str, name: str) -> None:
    mapping = get_checkpoint_conversion_mapping(stock)
    if mapping is not None:
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
