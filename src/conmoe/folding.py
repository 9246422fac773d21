"""Condensed layers as dense ones: the experts that always answer, folded exactly into one wider MLP.

An expert that answers every token with a constant gate is a part of a dense MLP: its gate and up projections are rows
of the wider ones, and its down projection, times the gate, columns. So are shared experts that the layer simply adds.
Where a family's configuration can call a layer dense, stock classes compute the result.

What is known here of families is which fields of their configurations say which layers are dense. Everything else is
asked of the classes themselves: a block tells by running what it adds up, a dense MLP how it activates, and a model
made of the changed configuration whether anything else would change with it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from conmoe.checkpoint import disk_name, read_parameter
from conmoe.forms import is_condensed
from conmoe.moe import MoeLayer, decoder_layers, moe_layers
from conmoe.ops.experts import mix
from conmoe.ops.plans import condense
from conmoe.runtime.modeling_conmoe import StaticRouter
from conmoe.shards import Held, Output, read_tensor, tensor_output, torch_dtype
from conmoe.source import Source, outline_experts, read_experts
from conmoe.types import EXPERT_TENSORS, LayerPlan, Plan, UsageError

Where = Literal["anywhere", "first and last", "first", "nowhere"]

#: Fields by which configurations say which layers are dense: where in a model they can put them, and the value that
#: leaves experts to the layers ``sparse`` alone.
DENSE_FIELDS: Mapping[str, tuple[Where, Callable[[PretrainedConfig, Sequence[int]], Any]]] = {
    "mlp_layer_types": (
        "anywhere",
        lambda config, sparse: [
            kind if index in sparse else "dense" for index, kind in enumerate(config.mlp_layer_types)
        ],
    ),
    "mlp_only_layers": (
        "anywhere",
        lambda config, sparse: [index for index in range(config.num_hidden_layers) if index not in sparse],
    ),
    "moe_layer_start_index": ("first and last", lambda config, sparse: sparse[0]),
    "moe_layer_end_index": ("first and last", lambda config, sparse: sparse[-1]),
    "first_k_dense_replace": ("first", lambda config, sparse: sparse[0]),
    "num_dense_layers": ("first", lambda config, sparse: sparse[0]),
}
#: Fields for the width of all dense layers; the first that a configuration has counts.
WIDTH_FIELDS = ("prefix_dense_intermediate_size", "dense_intermediate_size", "intermediate_size")
#: The gate, up and down projection of an MLP, by name.
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
#: Types of attributes that say how a module computes.
_PLAIN = (bool, int, float, str)


@dataclass(frozen=True, slots=True)
class Folding:
    """How the condensed layers of a plan become dense layers of the stock family."""

    changes: Mapping[str, Any]  # fields of config.json
    replaced: Mapping[str, tuple[Output, ...]]  # parameter of the source -> what the result has in its place
    blocks: tuple[str, ...]  # paths of the blocks that become MLPs


@dataclass(frozen=True, eq=False, slots=True)
class _Block:
    """A condensed block, and what it computes: ``routed`` times its experts plus ``shared`` times one MLP."""

    source: Source
    layer: MoeLayer
    plan: LayerPlan
    routed: float
    shared: float
    mlp: str | None  # path of that MLP, which answers every token

    @property
    def width(self) -> int:
        """Neurons that answer every token."""
        own = self.plan.mixing_KE.shape[0] * outline_experts(self.source, self.layer).gate_EID.shape[1]
        return own + (0 if self.mlp is None else _width(self.source.model.get_submodule(self.mlp)))


def dense_positions(config: PretrainedConfig) -> Where:
    """Which layers a stock model could have as dense ones, by the fields of its configuration."""
    found = [where for field, (where, _) in DENSE_FIELDS.items() if getattr(config, field, None) is not None]
    return found[0] if found else "nowhere"


def can_be_dense(source: Source, condensed: Sequence[int]) -> bool:
    """Whether a stock configuration can call these of the MoE layers dense, and leave others."""
    where = dense_positions(source.config)
    sparse = [layer.index for layer in source.layers if layer.index not in condensed]
    if not sparse or where in ("anywhere", "nowhere"):
        return bool(sparse) and where == "anywhere"
    last = sparse[-1] if where == "first and last" else source.layers[-1].index
    return sparse == [layer.index for layer in source.layers if sparse[0] <= layer.index <= last]


def fold(source: Source, plan: Plan) -> Folding:
    """Fold the condensed layers of ``plan`` into dense ones; without any, nothing changes.

    A configuration has one width for all dense layers. It becomes that of the widest; neurons of zeros, which change
    nothing, fill up the others, and the dense layers that the source has already.

    Raises:
        UsageError: the stock classes of the family have no place for such layers.
    """
    return _fold(source, {index: scope.plan for scope in plan.scopes if is_condensed(scope) for index in scope.layers})


def check_foldable(source: Source) -> None:
    """Raise a UsageError unless at least one layer of ``source`` could be condensed and folded."""
    indices = [layer.index for layer in source.layers]
    possible = [index for index in indices if can_be_dense(source, [index])] or indices
    nobody = torch.zeros(0, dtype=torch.int64)
    _fold(source, {possible[0]: condense(nobody, nobody, source.layers[0].logical)})


def _fold(source: Source, plans: Mapping[int, LayerPlan]) -> Folding:
    if not plans:
        return Folding({}, {}, ())
    check_positions(source, sorted(plans))
    blocks = [_read_block(source, layer, plans[layer.index]) for layer in source.layers if layer.index in plans]
    changes = _changes(source, sorted(plans), max(block.width for block in blocks))
    made = _stock_model(source, changes)
    _check_model(source, made, [block.layer for block in blocks])
    replaced: dict[str, tuple[Output, ...]] = dict(_padded(source, made))
    for block in blocks:
        targets = [target for target in source.layout.sources if target.startswith(f"{block.layer.block}.")]
        replaced |= dict.fromkeys(targets, ()) | {targets[0]: tuple(_folded(block, made))}
    return Folding(changes, replaced, tuple(block.layer.block for block in blocks))


def check_positions(source: Source, condensed: Sequence[int]) -> None:
    """Raise a UsageError unless a stock configuration can call the layers ``condensed`` dense."""
    kind, where = source.config.model_type, dense_positions(source.config)
    if where == "nowhere":
        raise UsageError(
            f"The configuration of type {kind!r} cannot call single layers dense, so its condensed layers have no "
            "sliced form; use --form shared."
        )
    if len(condensed) == len(source.layers):
        raise UsageError("The plan condenses every layer, and no experts would be left; use --form shared.")
    if not can_be_dense(source, condensed):
        raise UsageError(
            f"The configuration of type {kind!r} can call only its {where} layers dense, and the plan condenses "
            f"layers {', '.join(map(str, condensed))}; use --form shared, or choose layers by --layers."
        )


def forget_folded() -> None:
    """Free the layer that was folded last."""
    _always_on.cache_clear()


def _read_block(source: Source, layer: MoeLayer, plan: LayerPlan) -> _Block:
    """Find out what a block adds up by running a copy of it, its parts replaced by known answers.

    What is left of its weights is NaN: whatever else has a say in the output (a gate of the shared expert, a norm)
    shows.
    """
    block = copy.deepcopy(source.model.get_submodule(layer.block))
    own = [path.rpartition(".")[2] for path in (layer.router, layer.experts)]
    mlps = [name for name, child in block.named_children() if name not in own and projections(child)]
    D = outline_experts(source, layer).gate_EID.shape[2]
    answers = torch.eye(2, D)
    setattr(block, own[0], StaticRouter(0))
    for name, answer_D in ((own[1], answers[0]), *((name, answers[1]) for name in mlps)):
        setattr(block, name, _Answer(answer_D))
    unknown = {name: value for name, value in block.state_dict().items() if value.is_meta}
    block.load_state_dict(
        {name: torch.full(value.shape, torch.nan) for name, value in unknown.items()}, strict=False, assign=True
    )
    with torch.no_grad():
        out: Any = block(torch.randn(1, 3, D, generator=torch.Generator().manual_seed(0)))
    out_nD = (out[0] if isinstance(out, tuple) else out).reshape(3, D).float()
    routed, shared = out_nD[0, :2].tolist()
    simple = torch.equal(out_nD, (routed * answers[0] + shared * answers[1]).expand(3, D))
    if not simple or len(mlps) > 1:
        extra = [name for name, child in block.named_children() if name not in own and list(child.parameters())]
        raise UsageError(
            f"Layer {layer.index} of type {source.config.model_type!r} does more than add up its experts"
            f"{f' (it has a {extra[0]})' if extra else ''}, so it cannot be made a dense layer; use --form shared."
        )
    return _Block(source, layer, plan, routed, shared, f"{layer.block}.{mlps[0]}" if mlps else None)


class _Answer(nn.Module):
    """In place of a part of a block: the same answer for every token."""

    def __init__(self, value_D: Tensor) -> None:
        super().__init__()
        self.register_buffer("value_D", value_D)

    def forward(self, hidden: Tensor, *args: Any) -> Tensor:
        return self.get_buffer("value_D").to(hidden.dtype).expand_as(hidden)


class _Take(nn.Module):
    """In place of a projection: a part of its input."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.part = slice(start, stop)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., self.part]


def projections(module: nn.Module) -> tuple[str, str, str] | None:
    """The names of the gate, up and down projection of an MLP that has nothing else; None for other modules."""
    parts = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
    return next((names for names in PROJECTIONS if parts == set(names)), None)


def _width(mlp: nn.Module) -> int:
    names = projections(mlp)
    assert names is not None
    return mlp.get_parameter(f"{names[0]}.weight").shape[0]


def _changes(source: Source, condensed: Sequence[int], needed: int) -> dict[str, Any]:
    """The fields of a configuration that call the condensed layers dense, and say how wide dense layers are then."""
    config = source.config
    sparse = [layer.index for layer in source.layers if layer.index not in condensed]
    changes = {
        field: value(config, sparse)
        for field, (_, value) in DENSE_FIELDS.items()
        if getattr(config, field, None) is not None
    }
    field = next(field for field in WIDTH_FIELDS if hasattr(config, field))
    dense_already = [_width(source.model.get_submodule(path)) for path in _dense_blocks(source)]
    return changes | {field: max(needed, *dense_already, 1)}


def _stock_model(source: Source, changes: Mapping[str, Any]) -> PreTrainedModel:
    """The model of the changed configuration, without weights."""
    stated = json.loads((source.folder / "config.json").read_text())
    try:
        config = type(source.config).from_dict({**stated, **changes})
        with torch.device("meta"):
            made: PreTrainedModel = type(source.model)._from_config(config, dtype=source.model.dtype)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _unfit(source, str(error).strip().split("\n")[0]) from error
    made.eval()
    return made


def _check_model(source: Source, made: PreTrainedModel, condensed: Sequence[MoeLayer]) -> None:
    """Raise unless ``made`` is the source with MLPs for the condensed blocks, and perhaps wider dense layers."""
    gone = {layer.index for layer in condensed}
    left = [layer.index for layer in source.layers if layer.index not in gone]
    if [layer.index for layer in moe_layers(made)] != left:
        raise _unfit(source, "other layers would be dense")
    for layer in condensed:
        module = made.get_submodule(layer.block)
        if projections(module) is None:
            raise _unfit(source, f"{layer.block} would be a {type(module).__name__}")
    outside = {f"{layer.block}." for layer in condensed} | {f"{path}." for path in _dense_blocks(source)}
    flags = {f"{layer.decoder}." for layer in condensed}  # whether a layer is dense, it may note itself
    before, after = _facts(source.model, tuple(outside), flags), _facts(made, tuple(outside), flags)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise _unfit(source, f"{changed[0]} would change too")


def _facts(model: PreTrainedModel, outside: tuple[str, ...], flags: Collection[str]) -> dict[str, Any]:
    """Shapes of all parameters and plain attributes of all parts of decoder layers, by path."""
    path, _ = decoder_layers(model)
    facts: dict[str, Any] = {name: value.shape for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if name.startswith(f"{path}.") and f"{name}." not in flags:
            facts |= {f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
    return {name: fact for name, fact in facts.items() if not name.startswith(outside)}


def _dense_blocks(source: Source) -> list[str]:
    """Paths of the MLPs of those layers that are dense already."""
    path, layers = decoder_layers(source.model)
    first = source.layers[0]
    place = first.block.removeprefix(f"{first.decoder}.")
    sparse = {layer.index for layer in source.layers}
    paths = [f"{path}.{index}.{place}" for index in range(len(layers)) if index not in sparse]
    return [path for path in paths if projections(source.model.get_submodule(path))]


def _unfit(source: Source, reason: str) -> UsageError:
    return UsageError(
        f"Condensed layers of type {source.config.model_type!r} cannot be made dense ones ({reason}); use --form "
        "shared."
    )


def _padded(source: Source, made: PreTrainedModel) -> Iterator[tuple[str, tuple[Output, ...]]]:
    """The parameters of dense layers that the source has already, as wide as the folded ones."""
    for path in _dense_blocks(source):
        for name, value in made.get_submodule(path).state_dict().items():
            target = f"{path}.{name}"
            (piece,) = source.layout.sources[target]
            if piece.entry.shape != tuple(value.shape):
                make = partial(_pad, piece.entry, tuple(value.shape))
                yield target, (tensor_output(piece.entry.name, piece.entry.dtype, value.shape, make),)


def _pad(entry: Held, shape: tuple[int, ...]) -> Tensor:
    wide, value = torch.zeros(shape, dtype=torch_dtype(entry)), read_tensor(entry)
    wide[tuple(slice(0, size) for size in value.shape)] = value
    return wide


def _folded(block: _Block, made: PreTrainedModel) -> Iterator[Output]:
    """The tensors of the dense layer that a condensed block becomes."""
    layer, source = block.layer, block.source
    mlp = made.get_submodule(layer.block)
    _check_activation(block, mlp)
    names = projections(mlp)
    assert names is not None
    role = dict(zip(names, ("gate", "up", "down"), strict=True))
    shapes = {name: tuple(value.shape) for name, value in mlp.state_dict().items()}
    if f"{names[2]}.bias" not in shapes and _has_bias(block):
        raise _unfit(source, "its dense layers have no biases, and its experts have")
    entry = next(pieces for name, pieces in source.layout.sources.items() if name.startswith(layer.experts))[0].entry
    for name, shape in shapes.items():
        projection, _, kind = name.rpartition(".")
        target = f"{layer.block}.{name}"
        disk = disk_name(made, target, torch.empty(shape, device="meta"))
        make = partial(_wide_part, block, role[projection], kind, shape, torch_dtype(entry))
        yield tensor_output(disk, entry.dtype, shape, make)


def _has_bias(block: _Block) -> bool:
    shared = [] if block.mlp is None else list(block.source.model.get_submodule(block.mlp).state_dict())
    own = outline_experts(block.source, block.layer)
    return own.down_bias_ED is not None or any(name.endswith("bias") for name in shared)


def _check_activation(block: _Block, mlp: nn.Module) -> None:
    """Raise unless a dense MLP makes of its gate and up projections what the experts, and the shared one, make."""
    shared = [] if block.mlp is None else [block.source.model.get_submodule(block.mlp)]
    generator = torch.Generator().manual_seed(0)
    gate_nI, up_nI = (20 * torch.randn(64, 4, generator=generator) for _ in range(2))
    expected = outline_experts(block.source, block.layer).activate(gate_nI, up_nI)
    for module in (mlp, *shared):
        probe, names = copy.deepcopy(module), projections(module)
        assert names is not None
        for name, part in zip(names, (_Take(0, 4), _Take(4, 8), _Take(0, 4)), strict=True):
            setattr(probe, name, part)
        got = probe(torch.cat((gate_nI, up_nI), dim=1)[None])
        if not torch.allclose(got.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6):
            raise _unfit(block.source, "its dense layers activate otherwise than its experts")


def _wide_part(block: _Block, projection: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One tensor of the dense layer: experts, the shared MLP, zeros. Only down projections are computed, and rounded
    once."""
    static_K = block.plan.static_K
    assert static_K is not None
    scale_K = static_K.double() * block.routed
    own, wide = _always_on(block), torch.zeros(shape, dtype=dtype)
    value = own[f"{projection}_{kind}"]
    if projection != "down":
        parts = [value.flatten(0, 1)]
    elif kind == "weight":
        parts = [(value.double() * scale_K[:, None, None]).permute(1, 0, 2).flatten(1)]
    else:
        parts = [scale_K @ value.double()]
    if block.mlp is not None:
        parts.append(_shared(block, projection, kind))
    if (projection, kind) == ("down", "bias"):
        return torch.stack([part.double() for part in parts]).sum(0).to(dtype)
    axis, start = int(projection == "down"), 0
    for part in parts:
        wide.narrow(axis, start, part.shape[axis]).copy_(part)
        start += part.shape[axis]
    return wide


@lru_cache(maxsize=1)
def _always_on(block: _Block) -> dict[str, Tensor]:
    """The experts that stay, unrounded: projection and kind -> tensor of one row each, zero for a bias they lack."""
    experts, plan = read_experts(block.source, block.layer), block.plan
    K = plan.mixing_KE.shape[0]
    found = {}
    for name in EXPERT_TENSORS:
        projection, kind = name.partition("_")[0], "bias" if "_bias_" in name else "weight"
        source = getattr(experts, name)
        if name in plan.weights:
            found[f"{projection}_{kind}"] = plan.weights[name].to(source.dtype)
        elif source is None or not K:
            size = experts.gate_EID.shape[2 if projection == "down" else 1]
            shape = (size,) if source is None else source.shape[1:]
            found[f"{projection}_{kind}"] = torch.zeros(K, *shape)
        else:
            found[f"{projection}_{kind}"] = mix(source, plan.mixing_KE, rounded=False)
    return found


def _shared(block: _Block, projection: str, kind: str) -> Tensor:
    """A tensor of the MLP that answers every token beside the experts; zeros for a bias that it lacks."""
    mlp = block.source.model.get_submodule(str(block.mlp))
    names = projections(mlp)
    assert names is not None
    name = names[("gate", "up", "down").index(projection)]
    if f"{name}.{kind}" not in mlp.state_dict():
        return torch.zeros(mlp.get_parameter(f"{name}.weight").shape[0])
    target = f"{block.mlp}.{name}.{kind}"
    dtype = torch_dtype(block.source.layout.sources[target][0].entry)
    value = read_parameter(block.source.layout, block.source.model, target, dtype)
    return value if projection != "down" else value.double() * block.shared
