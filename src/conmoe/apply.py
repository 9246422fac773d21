"""A plan and a checkpoint in, a smaller checkpoint out: tensor by tensor, in the memory of one scope at most.

A prototype that is a kept expert is copied as bytes. Only mixtures and new weights are computed, in float32, and cast
once. The names on disk, and their order, stay those of the source family.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from conmoe import runtime
from conmoe.artifacts import building, checkpoint_fingerprint, fingerprint, plan_fingerprint, read_plan, write_plan
from conmoe.checkpoint import MTP_FIELDS, disk_name, is_stack, renumbered
from conmoe.forms import Stored, check_form, stored_experts
from conmoe.moe import MoeLayer, count_field, family_layout, logical_rows
from conmoe.ops.experts import concatenate, mix, tensors
from conmoe.registry import Form
from conmoe.report.card import model_card
from conmoe.shards import (
    DTYPE_NAMES,
    Entry,
    Output,
    bytes_of,
    raw_chunks,
    read_tensor,
    tensor_output,
    torch_dtype,
    write_shards,
)
from conmoe.stream import Source, check_compressible, open_source, read_experts
from conmoe.types import ConmoeError, Plan, ScopePlan, UsageError

PLAN_FOLDER = "conmoe"
SHARD_BYTES = 4 * 2**30
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".tmp")
_OWN_FILES = ("config.json", "README.md", "model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class Applied:
    """What was written."""

    folder: Path
    form: Form
    bytes: int
    source_bytes: int
    dropped: tuple[str, ...]  # tensors of the source that the result leaves out on purpose, beside experts


def apply(
    model: Path,
    plan: Plan | Path,
    out: Path,
    *,
    form: Form | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Applied:
    """Write the checkpoint that ``plan`` describes.

    Args:
        model: the source checkpoint; never written to.
        plan: a plan, or the folder that holds one.
        out: the folder to write, built as ``OUT.partial``; a killed run goes on at the first unfinished shard.
        form: ``shared``, ``sliced`` or ``expanded``; by default what suits the plan's method.
        force: replace ``out`` if it exists.
        trust_remote_code: run modelling code that comes with the source.
        advance: called with the bytes written since the last call, and the bytes to write in all.

    Raises:
        UsageError: the plan belongs to another checkpoint, or the form cannot hold it.
    """
    plan = read_plan(plan) if isinstance(plan, Path) else plan
    with applying(
        model, plan, out, form=form, force=force, trust_remote_code=trust_remote_code, advance=advance
    ) as applied:
        return replace(applied, folder=out)


@contextmanager
def applying(
    model: Path,
    plan: Plan,
    out: Path,
    *,
    form: Form | None,
    force: bool,
    trust_remote_code: bool,
    advance: Callable[[int, int], None],
) -> Iterator[Applied]:
    """Like :func:`apply`, but the folder gets its name when the context ends; until then it can be looked at."""
    source = open_source(model, trust_remote_code=trust_remote_code)
    form = form or plan.default_form  # type: ignore[assignment]
    assert form is not None
    check_plan(source, plan)
    check_form(source.layers, plan, form)
    outputs, dropped = _outputs(source, plan, form)
    config = _config(source, plan, form, without_mtp=bool(dropped))
    total = sum(output.nbytes for output in outputs)
    key = fingerprint([plan_fingerprint(plan), form])
    refuse_overlap(out, model)
    with building(out, force=force, key=key) as partial_folder:
        check_space(partial_folder, total)
        write_shards(outputs, partial_folder, SHARD_BYTES, lambda nbytes: advance(nbytes, total))
        _write_rest(source, plan, form, config, partial_folder)
        yield Applied(partial_folder, form, total, sum(entry.nbytes for entry in source.entries.values()), dropped)


def refuse_overlap(out: Path, model: Path) -> None:
    """Raise if writing ``out`` would touch the source."""
    new, old = out.resolve(), model.resolve()
    if new == old or new in old.parents or old in new.parents:
        raise UsageError(f"{out} is, holds or lies in the source {model}; choose another place.")


def check_plan(source: Source, plan: Plan) -> None:
    """Raise unless ``plan`` was made for this very checkpoint and covers its MoE layers."""
    check_compressible(source)
    name = checkpoint_fingerprint(source.folder, source.files)
    if plan.source != name:
        raise UsageError(f"The plan was made for another checkpoint than {source.folder}; plan again for this one.")
    by_index = {layer.index: layer for layer in source.layers}
    for scope in plan.scopes:
        for index in scope.layers:
            if index not in by_index:
                raise UsageError(f"The plan names layer {index}, which has no experts in {source.folder}.")
        if scope.plan.assignment_E.numel() != sum(by_index[index].logical for index in scope.layers):
            raise UsageError(f"The plan for layer {scope.layers[0]} has another number of experts than the checkpoint.")


def check_space(folder: Path, needed: int) -> None:
    """Raise if the disk cannot hold ``needed`` bytes more (what a killed run already wrote there is counted)."""
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if free < needed - there:
        raise ConmoeError(
            f"The disk of {folder.parent} has {free / 1e9:.1f} GB free, "
            f"the result needs {(needed - there) / 1e9:.1f} GB more."
        )


def _outputs(source: Source, plan: Plan, form: Form) -> tuple[list[Output], tuple[str, ...]]:
    """Every tensor of the result, in the source's order, and the names of those left out on purpose."""
    layers = {layer.index: layer for layer in source.layers}
    scope_of = {index: scope for scope in plan.scopes for index in scope.layers}
    outputs: list[Output] = []
    done: set[str] = set()
    sliced_rows = router_rows(source, plan, form)
    experts = {f"{layer.experts}.": layer for layer in layers.values()}
    for target, sources in source.layout.sources.items():
        owner = next((layer for prefix, layer in experts.items() if target.startswith(prefix)), None)
        if owner is not None:
            outputs += _expert_outputs(source, owner, target, scope_of.get(owner.index), form)
        elif target in sliced_rows:
            outputs.append(_rows(sources[0].entry, *sliced_rows[target]))
        else:
            outputs += [_copy(piece.entry) for piece in sources]
        done.add(target)
    if form == "shared":
        for index, layer in layers.items():
            outputs += _maps(source, layer, scope_of.get(index))
    if form == "expanded":
        return outputs + [_copy(entry) for entry in source.layout.ignored], ()
    return outputs, tuple(entry.name for entry in source.layout.ignored)


def router_rows(source: Source, plan: Plan, form: Form) -> dict[str, tuple[int, Tensor]]:
    """The parameters of which the form keeps a part of the rows, with their axis and these rows."""
    scope_of = {index: scope for scope in plan.scopes for index in scope.layers}
    kept: dict[str, tuple[int, Tensor]] = {}
    for layer in source.layers:
        rows = stored_experts(layer, scope_of.get(layer.index), form).rows
        if rows is not None:
            kept |= {name: (axis, rows) for name, axis in logical_rows(source.model, layer).items()}
    return kept


def _expert_outputs(
    source: Source, layer: MoeLayer, target: str, scope: ScopePlan | None, form: Form
) -> Iterator[Output]:
    """The stored experts' share of one expert parameter: a tensor for each, or one for all, as the source has it."""
    sources = source.layout.sources[target]
    if scope is None:
        yield from (_copy(piece.entry) for piece in sources)
        return
    stored = stored_experts(layer, scope, form)
    if not stored.owner:
        return
    name = target.removeprefix(f"{layer.experts}.")
    neighbours = {other.index: f"{other.experts}.{name}" for other in source.layers}
    targets = [neighbours[index] for index in scope.layers]
    converter = source.layout.converters.get(target)
    if converter is None:
        yield _fused(source, sources[0].entry, targets, name, stored, scope)
    elif is_stack(converter):
        for part, pattern in enumerate(converter.source_patterns):
            tables = [_by_expert(source, other, pattern) for other in targets]
            like = _by_expert(source, target, pattern)[0]
            for slot in range(len(stored.prototype_S)):
                output_name = renumbered(like.name, slot)
                origin = stored.origin(slot)
                if origin is not None:
                    entry = tables[origin // layer.logical][origin % layer.logical]
                    yield Output(output_name, like.dtype, entry.shape, entry.nbytes, partial(raw_chunks, entry))
                else:
                    parts = len(converter.source_patterns)
                    make = partial(_computed_part, source, like, scope, stored, slot, name, part, parts)
                    yield tensor_output(output_name, like.dtype, like.shape, make)
    else:
        raise UsageError(f"{target} is stored in a layout that conmoe reads but does not write yet.")


def _by_expert(source: Source, target: str, pattern: str) -> dict[int, Entry]:
    pieces = source.layout.sources[target]
    return {int(piece.expert or 0): piece.entry for piece in pieces if piece.pattern == pattern}


def _fused(source: Source, like: Entry, targets: list[str], name: str, stored: Stored, scope: ScopePlan) -> Output:
    """One tensor that holds all stored experts, put together row by row."""
    entries = [source.layout.sources[target][0].entry for target in targets]
    E, slots = like.shape[0], len(stored.prototype_S)
    row = like.nbytes // E

    def chunks() -> Iterator[bytes | memoryview]:
        for slot in range(slots):
            origin = stored.origin(slot)
            if origin is not None:
                yield from raw_chunks(entries[origin // E], (origin % E) * row, row)
            else:
                value = _computed_part(source, like, scope, stored, slot, name, 0, 1)
                yield bytes_of(value.contiguous())

    return Output(like.name, like.dtype, (slots, *like.shape[1:]), slots * row, chunks)


def _computed_part(
    source: Source, like: Entry, scope: ScopePlan, stored: Stored, slot: int, name: str, part: int, parts: int
) -> Tensor:
    """One prototype's share of a tensor on disk, scaled if it is a down projection, and only then rounded."""
    scale, scaled = float(stored.scale_S[slot]), bool((stored.scale_S != 1).any())
    value = _prototypes(_Scope(source, scope), scaled)[name][int(stored.prototype_S[slot])]
    if scale != 1.0 and name.startswith("down_proj"):
        value = value * scale
    value = value.to(torch_dtype(like))
    height = value.shape[0] // parts
    return value[part * height : (part + 1) * height]


class _Scope:
    """A scope of a source as a cache key: the same objects, the same prototypes."""

    def __init__(self, source: Source, scope: ScopePlan) -> None:
        self.source, self.scope = source, scope

    def __hash__(self) -> int:
        return hash((id(self.source), id(self.scope)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Scope) and self.source is other.source and self.scope is other.scope


@lru_cache(maxsize=1)
def _prototypes(key: _Scope, scaled: bool) -> dict[str, Tensor]:
    """The prototypes of a scope in the family's layout: in the dtype on disk, or unrounded if they will be scaled."""
    source, scope = key.source, key.scope
    layers = [layer for layer in source.layers if layer.index in scope.layers]
    experts = concatenate([read_experts(source, layer) for layer in layers])
    mixed = {name: mix(tensor, scope.plan.mixing_KE, rounded=not scaled) for name, tensor in tensors(experts).items()}
    mixed |= {name: value.to(mixed[name].dtype) for name, value in scope.plan.weights.items()}
    return family_layout(source.model.get_submodule(layers[0].experts), mixed)


def _rows(entry: Entry, axis: int, rows: Tensor) -> Output:
    shape = (*entry.shape[:axis], len(rows), *entry.shape[axis + 1 :])
    return tensor_output(entry.name, entry.dtype, shape, lambda: read_tensor(entry).index_select(axis, rows))


def maps(layer: MoeLayer, scope: ScopePlan | None) -> dict[str, Tensor]:
    """The map and the gains in the router of one layer, by name; a layer that is not planned maps to itself."""
    if scope is None:
        return {"expert_map": torch.arange(layer.logical), "expert_gain": torch.ones(layer.logical)}
    position = scope.layers.index(layer.index)
    mine = slice(position * layer.logical, (position + 1) * layer.logical)
    return {"expert_map": scope.plan.assignment_E[mine], "expert_gain": scope.plan.gain_E[mine].float()}


def map_name(source: Source, layer: MoeLayer, name: str, value: Tensor) -> str:
    """The name on disk of a map or its gains."""
    return disk_name(source.model, f"{layer.router}.{name}", value)


def _maps(source: Source, layer: MoeLayer, scope: ScopePlan | None) -> Iterator[Output]:
    for name, value in maps(layer, scope).items():
        disk, kind = map_name(source, layer, name, value), DTYPE_NAMES[value.dtype]
        yield tensor_output(disk, kind, value.shape, partial(torch.clone, value))


def _copy(entry: Entry) -> Output:
    return Output(entry.name, entry.dtype, entry.shape, entry.nbytes, partial(raw_chunks, entry))


def _config(source: Source, plan: Plan, form: Form, *, without_mtp: bool) -> dict[str, Any]:
    """The config.json of the result."""
    config: dict[str, Any] = json.loads((source.folder / "config.json").read_text())
    if without_mtp:
        for field in MTP_FIELDS:
            if field in config or getattr(source.config, field, None):
                config |= dict.fromkeys(_stated(source.config, config, field), 0)
    if form == "expanded":
        return config
    counts = _stated(source.config, config, count_field(source.config))
    if form == "sliced":
        return config | dict.fromkeys(counts, plan.scopes[0].plan.mixing_KE.shape[0])
    logical = source.layers[0].logical
    return runtime.shared_config(
        config | dict.fromkeys(counts, logical),
        source.config.model_type,
        type(source.model).__name__,
        prototypes=max(scope.plan.mixing_KE.shape[0] for scope in plan.scopes),
        logical=logical,
        pools=_pools(source, plan),
    )


def _stated(config: PretrainedConfig, file: Mapping[str, Any], field: str) -> list[str]:
    """Every name, the field's own or an alias, by which a config.json states it; its own if it is left to a default."""
    aliases = sorted(alias for alias, name in type(config).attribute_map.items() if name == field)
    return [name for name in (field, *aliases) if name in file] or [field]


def _write_rest(source: Source, plan: Plan, form: Form, config: Mapping[str, Any], out: Path) -> None:
    """Configuration, tokenizer, licence and everything else beside the weights, the plan, and the model card."""
    for file in sorted(source.folder.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_FILES) and file.name not in _OWN_FILES:
            shutil.copy(file, out / file.name)
    if (source.folder / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(source.folder / CHAT_TEMPLATE_DIR, out / CHAT_TEMPLATE_DIR, dirs_exist_ok=True)
    if form == "shared":
        for file in runtime.packaged_files(source.config.model_type):
            shutil.copy(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / PLAN_FOLDER).mkdir(exist_ok=True)
    write_plan(out / PLAN_FOLDER, plan)
    (out / "README.md").write_text(model_card(source.folder, plan, form))


def _pools(source: Source, plan: Plan) -> dict[int, tuple[int, int]] | None:
    """Which layer owns the pool of each layer, and its size; None where each has its own and all are equal."""
    sizes = {scope.plan.mixing_KE.shape[0] for scope in plan.scopes}
    planned = {index for scope in plan.scopes for index in scope.layers}
    whole = planned == {layer.index for layer in source.layers}
    if whole and len(sizes) == 1 and all(len(scope.layers) == 1 for scope in plan.scopes):
        return None
    pools = {layer.index: (layer.index, layer.logical) for layer in source.layers}
    for scope in plan.scopes:
        for index in scope.layers:
            pools[index] = (scope.layers[0], scope.plan.mixing_KE.shape[0])
    return pools
