"""What a written checkpoint must be, worked out from its source without the package: on disk and in its logits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from conmoe import __version__
from conmoe.artifacts import checkpoint_fingerprint
from conmoe.source import open_source
from conmoe.types import LayerPlan, Plan, ScopePlan
from tests.conftest import token_data
from tests.families import EXPERTS

_ONE_EXPERT = re.compile(r"^(.*\.layers\.(\d+)\..*\.experts\.)(\d+)(\..*)$")
_ALL_EXPERTS = re.compile(r"^.*\.layers\.(\d+)\..*(?:\.experts\.\w+|\.(?:input|output)_linear\.weight)$")
_ROUTER = re.compile(
    r"^(.*\.layers\.(\d+)\..*?)(?:(?:gate|router|router\.layer)\.(?:weight|bias)|e_score_correction_bias)$"
)
FORMS = ("sliced", "shared", "expanded")


def on_disk(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_bits(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def kept(plan: LayerPlan) -> list[int]:
    """The source expert of each prototype of a plan without mixtures."""
    assert bool(((plan.mixing_KE == 1).sum(dim=1) == 1).all())
    return plan.mixing_KE.argmax(dim=1).tolist()


def expected_disk(source: Path, plan: Plan, form: str) -> dict[str, Tensor]:
    """The tensors of the result of a plan without mixtures, maps and gains aside."""
    stock = on_disk(source)
    stored: dict[int, list[int]] = {}  # rows of the experts of the scope, laid one layer after the other
    scopes = {layer: scope for scope in plan.scopes for layer in scope.layers}
    for layer, scope in scopes.items():
        rows = kept(scope.plan)
        position = scope.layers.index(layer)
        if form == "expanded":
            assignment = scope.plan.assignment_E[position * EXPERTS : (position + 1) * EXPERTS].tolist()
            rows = [rows[prototype] for prototype in assignment]
        stored[layer] = rows if form == "expanded" or position == 0 else []
    expected: dict[str, Tensor] = {}
    for name, tensor in stock.items():
        one, every, router = _ONE_EXPERT.match(name), _ALL_EXPERTS.match(name), _ROUTER.match(name)
        if one and int(one[2]) in scopes:
            # Which tensors exist is decided once for each kind of tensor, at expert 0.
            if int(one[3]) == 0:
                for slot, row in enumerate(stored[int(one[2])]):
                    home = scopes[int(one[2])].layers[row // EXPERTS]
                    prefix = one[1].replace(f".layers.{one[2]}.", f".layers.{home}.")
                    expected[f"{one[1]}{slot}{one[4]}"] = stock[f"{prefix}{row % EXPERTS}{one[4]}"]
        elif every and int(every[1]) in scopes:
            layer = int(every[1])
            names = [name.replace(f".layers.{layer}.", f".layers.{home}.") for home in scopes[layer].layers]
            if stored[layer]:
                expected[name] = torch.cat([stock[each] for each in names])[stored[layer]]
        elif router and form == "sliced" and int(router[2]) in scopes and EXPERTS in tensor.shape:
            expected[name] = tensor.index_select(tensor.shape.index(EXPERTS), torch.tensor(stored[int(router[2])]))
        else:
            expected[name] = tensor
    return expected


def without_maps(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.endswith((".expert_map", ".expert_gain"))}


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """The model as Transformers loads it, every tensor of the checkpoint used and none missing."""
    options = {"experts_implementation": "batched_mm", "dtype": "auto", **options}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    model.eval()
    return model


def load_stock(folder: Path, **options: Any) -> PreTrainedModel:
    """The same, by classes of Transformers alone (but for the one family that it does not have)."""
    model = load(folder, **options)
    assert type(model).__module__.startswith("transformers.") or model.config.model_type == "deepseek"
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    return model(token_data(4, seed=9).ids_NS if ids is None else ids).logits


def blocks(model: PreTrainedModel) -> Iterator[tuple[int, nn.Module, Any, Any]]:
    """Layer, block, router and experts of every MoE layer, found by their names."""
    for index, layer in enumerate(model.get_decoder().layers):
        for block in layer.modules():
            router = getattr(block, "gate", None) or getattr(block, "router", None)
            experts = getattr(block, "experts", None)
            if isinstance(router, nn.Module) and isinstance(experts, nn.Module):
                yield index, block, router, experts


def by_layer(plan: Plan) -> dict[int, LayerPlan]:
    return {layer: scope.plan for scope in plan.scopes for layer in scope.layers}


@contextmanager
def silenced(model: PreTrainedModel, dropped: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Every router's logits are minus infinity at the dropped experts, and so is what it adds to choose among them."""

    def quiet(forward: Callable[..., Any], rows: list[int]) -> Callable[..., Any]:
        product = nn.functional.linear

        def linear(*args: Any, **kwargs: Any) -> Tensor:
            out = product(*args, **kwargs)
            out[..., rows] = float("-inf")
            return out

        def answer(*args: Any, **kwargs: Any) -> Any:
            with patch.object(nn.functional, "linear", linear):
                return forward(*args, **kwargs)

        return answer

    routers, biases = [], []
    for index, block, router, _ in blocks(model):
        rows = list(dropped[index])
        for name, value in [*block.named_buffers(), *block.named_parameters()]:
            if name.endswith("e_score_correction_bias"):
                biases.append((value, value.detach().clone()))
                value.data[..., rows] = float("-inf")
        router.forward = quiet(router.forward, rows)
        routers.append(router)
    try:
        yield
    finally:
        for router in routers:
            del router.forward
        for value, before in biases:
            value.data.copy_(before)


@contextmanager
def redirected(model: PreTrainedModel, answers: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """In the source model itself, expert ``answers[layer][e]`` works wherever the router of a layer chose ``e``."""

    def redirect(answers_E: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, index_Tk, weight_Tk = args
        return hidden, answers_E[index_Tk], weight_Tk

    hooks = []
    for layer, _, _, experts in blocks(model):
        table = torch.tensor(answers[layer])
        hooks.append(experts.register_forward_pre_hook(lambda module, args, table=table: redirect(table, module, args)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def hand_made(source: Path, scopes: Mapping[tuple[int, ...], LayerPlan], form: str = "shared") -> Plan:
    """A plan of somebody's own for the checkpoint in ``source``."""
    opened = open_source(source)
    parts = tuple(ScopePlan(layers, layer_plan) for layers, layer_plan in scopes.items())
    name = checkpoint_fingerprint(source, opened.files)
    return Plan(parts, "conmoe", {}, "by hand", form, {}, name, "none", __version__)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def edit_config(folder: Path, **values: Any) -> None:
    """Set fields of a config.json; None takes them away."""
    config = {**config_of(folder), **values}
    config = {name: value for name, value in config.items() if value is not None or name not in values}
    (folder / "config.json").write_text(json.dumps(config))
