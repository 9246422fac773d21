"""Every tensor of a result: copied, cut, computed or left out on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

from conmoe.checkpoint import disk_name, is_stack, renumbered
from conmoe.folding import fold, forget_folded
from conmoe.forms import Stored, is_condensed, own_part, stored_experts
from conmoe.lowprec import REMEDY, Places, is_low
from conmoe.moe import MoeLayer, family_layout, logical_rows, scores_name
from conmoe.mtp import is_head
from conmoe.ops.experts import concatenate, mix, tensors
from conmoe.ops.factors import from_weights
from conmoe.registry import Form
from conmoe.shards import (
    DTYPE_NAMES,
    Held,
    Output,
    bytes_of,
    copies,
    parts_of,
    raw_chunks,
    read_tensor,
    tensor_output,
    torch_dtype,
)
from conmoe.source import Source, read_experts
from conmoe.types import LayerPlan, Plan, ScopePlan, UsageError


def plan_outputs(source: Source, plan: Plan, form: Form) -> tuple[list[Output], tuple[str, ...]]:
    """Every tensor of the result, in the source's order, and the names of those left out on purpose.

    Heads that predict further tokens are not among either: :mod:`conmoe.mtp` sees to them.
    """
    layers = {layer.index: layer for layer in source.layers}
    scope_of = {index: scope for scope in plan.scopes for index in scope.layers}
    outputs: list[Output] = []
    sliced_rows = router_rows(source, plan, form)
    fitted = fitted_rows(source, plan, form)
    replaced = fold(source, plan).replaced if form == "sliced" else {}
    if replaced and source.scheme:
        raise UsageError(
            f"{source.folder} is stored as {source.scheme.name}, which no layer can be folded in; {REMEDY}."
        )
    experts = {f"{layer.experts}.": layer for layer in layers.values()}
    routerless = tuple(f"{layer.router}." for layer in layers.values() if is_condensed(scope_of.get(layer.index)))
    for target, sources in source.layout.sources.items():
        owner = next((layer for prefix, layer in experts.items() if target.startswith(prefix)), None)
        if target in fitted or target in sliced_rows:
            _check_rows(source, sources[0].entry)
        if target in replaced:
            outputs += replaced[target]
        elif owner is not None:
            outputs += _expert_outputs(source, owner, target, scope_of.get(owner.index), form)
        elif target.startswith(routerless):
            continue
        elif target in fitted:
            outputs.append(_fitted_rows(sources[0].entry, fitted[target]))
        elif target in sliced_rows:
            outputs.append(_rows(sources[0].entry, *sliced_rows[target]))
        else:
            outputs += [output for piece in sources for output in copies(piece.entry)]
    if form == "shared":
        for index, layer in layers.items():
            outputs += _maps(source, layer, scope_of.get(index))
    unread = [entry for entry in source.layout.ignored if not is_head(source, entry.name)]
    if form == "expanded":
        return outputs + [output for entry in unread for output in copies(entry)], ()
    return outputs, tuple(part.name for entry in unread for part in parts_of(entry))


def expert_places(source: Source, plan: Plan, form: Form) -> Places:
    """Layer and number of each expert of the source -> where the result holds copies of it."""
    scope_of = {index: scope for scope in plan.scopes for index in scope.layers}
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for layer in source.layers:
        scope = scope_of.get(layer.index)
        stored = stored_experts(layer, scope, form)
        for slot in range(len(stored.prototype_S)) if stored.owner else ():
            origin = stored.origin(slot)
            if origin is not None:
                home = scope.layers[origin // layer.logical] if scope else layer.index
                places.setdefault((home, origin % layer.logical), []).append((layer.index, slot))
    return places


def router_rows(source: Source, plan: Plan, form: Form) -> dict[str, tuple[int, Tensor]]:
    """The parameters of which the form keeps a part of the rows, with their axis and these rows."""
    scope_of = {index: scope for scope in plan.scopes for index in scope.layers}
    kept: dict[str, tuple[int, Tensor]] = {}
    for layer in source.layers:
        rows = stored_experts(layer, scope_of.get(layer.index), form).rows
        if rows is not None:
            kept |= {name: (axis, rows) for name, axis in logical_rows(source.model, layer).items()}
    return kept


def fitted_rows(source: Source, plan: Plan, form: Form) -> dict[str, Tensor]:
    """The routers' parameters whose rows the plan brings itself, and these rows: those of the form, in its order."""
    scope_of = {index: scope for scope in plan.scopes for index in scope.layers}
    found = {}
    for layer in source.layers:
        scope = scope_of.get(layer.index)
        if scope is not None and scope.plan.router_KD is not None and not is_condensed(scope):
            rows = stored_experts(layer, scope, form).rows
            place_E = own_part(scope, layer, (scope.plan.assignment_E >= 0).cumsum(0) - 1)
            name = scores_name(source.model.get_submodule(layer.router), layer.logical)
            found[f"{layer.router}.{name}"] = scope.plan.router_KD[place_E if rows is None else place_E[rows]]
    return found


def _expert_outputs(
    source: Source, layer: MoeLayer, target: str, scope: ScopePlan | None, form: Form
) -> Iterator[Output]:
    """The stored experts' share of one expert parameter: a tensor for each, or one for all, as the source has it."""
    sources = source.layout.sources[target]
    if scope is None:
        for piece in sources:
            yield from copies(piece.entry)
        return
    stored = stored_experts(layer, scope, form)
    if not stored.owner or not len(stored.prototype_S) or from_weights(scope.plan.weights)[0]:
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
                    yield from copies(tables[origin // layer.logical][origin % layer.logical], output_name)
                elif any(is_low(piece.entry) for piece in sources):
                    raise UsageError(
                        f"{source.folder} stores the experts of layer {layer.index} in low precision, and this plan "
                        f"makes new ones in the {form} form; {REMEDY}."
                    )
                else:
                    parts = len(converter.source_patterns)
                    make = partial(_computed_part, source, like, scope, stored, slot, name, part, parts)
                    yield tensor_output(output_name, like.dtype, like.shape, make)
    else:
        raise UsageError(f"{target} is stored in a layout that conmoe reads but does not write yet.")


def _by_expert(source: Source, target: str, pattern: str) -> dict[int, Held]:
    pieces = source.layout.sources[target]
    return {int(piece.expert or 0): piece.entry for piece in pieces if piece.pattern == pattern}


def _fused(source: Source, like: Held, targets: list[str], name: str, stored: Stored, scope: ScopePlan) -> Output:
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
    source: Source, like: Held, scope: ScopePlan, stored: Stored, slot: int, name: str, part: int, parts: int
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


def forget_prototypes() -> None:
    """Free the scope that was computed last."""
    _prototypes.cache_clear()
    forget_folded()


def _rows(entry: Held, axis: int, rows: Tensor) -> Output:
    shape = (*entry.shape[:axis], len(rows), *entry.shape[axis + 1 :])
    return tensor_output(entry.name, entry.dtype, shape, lambda: read_tensor(entry).index_select(axis, rows))


def _fitted_rows(entry: Held, rows_KD: Tensor) -> Output:
    return tensor_output(entry.name, entry.dtype, rows_KD.shape, lambda: rows_KD.to(torch_dtype(entry)).clone())


def maps(source: Source, layer: MoeLayer, scope: ScopePlan | None) -> dict[str, Tensor]:
    """What a ``shared`` checkpoint holds of one layer beside the tensors of its family, by the parameter's path.

    These are the map and the gains in its router (a layer that is not planned maps to itself), or the static gates in
    its place, constants, the threshold of skipping, and experts as factors.
    """
    if scope is None:
        found = {"expert_map": torch.arange(layer.logical), "expert_gain": torch.ones(layer.logical)}
        return {f"{layer.router}.{name}": value for name, value in found.items()}
    plan = scope.plan
    if plan.static_K is not None:
        return {f"{layer.router}.static_gate": plan.static_K.float()}
    map_E, gain_E = own_part(scope, layer, plan.assignment_E), own_part(scope, layer, plan.gain_E)
    found = {"expert_map": map_E[map_E >= 0], "expert_gain": gain_E[map_E >= 0].float()}
    if plan.skip:
        found["expert_skip"] = torch.tensor(plan.skip, dtype=torch.float32)
    named = {f"{layer.router}.{name}": value for name, value in found.items()}
    if plan.constant_CD is not None:
        named[f"{layer.experts}.constant_experts"] = plan.constant_CD
    return named | {f"{layer.experts}.{name}": value for name, value in _factored(source, layer, plan).items()}


def _factored(source: Source, layer: MoeLayer, plan: LayerPlan) -> dict[str, Tensor]:
    """Experts as factors, rounded to the dtype on disk, under the names of ``FactoredExperts``."""
    factors, others = from_weights(plan.weights)
    if not factors:
        return {}
    if source.low_experts:
        raise UsageError(f"{source.folder} stores its experts in low precision, not as factors; {REMEDY}.")
    first = next(target for target in source.layout.sources if target.startswith(f"{layer.experts}."))
    dtype = torch_dtype(source.layout.sources[first][0].entry)
    found: dict[str, Tensor] = {}
    for name, item in factors.items():
        matrix = name.partition("_")[0]
        parts = {"left": item.left_KOr, "right": item.right_KrI, "values": item.values_SA}
        found |= {f"{matrix}_{part}": value.to(dtype) for part, value in parts.items()}
        found[f"{matrix}_index"] = item.index_S
    if source.model.get_submodule(layer.experts).has_bias:
        experts = tensors(read_experts(source, layer))
        for name in (name for name in experts if "_bias_" in name):
            value = others[name] if name in others else mix(experts[name], plan.mixing_KE)
            found[f"{name.partition('_')[0]}_bias"] = value.to(dtype)
    return found


def map_name(source: Source, path: str, value: Tensor) -> str:
    """The name on disk of a tensor of :func:`maps`."""
    return disk_name(source.model, path, value)


def _maps(source: Source, layer: MoeLayer, scope: ScopePlan | None) -> Iterator[Output]:
    for path, value in maps(source, layer, scope).items():
        disk, kind = map_name(source, path, value), DTYPE_NAMES[value.dtype]
        yield tensor_output(disk, kind, value.shape, partial(torch.clone, value))


def _check_rows(source: Source, entry: Held) -> None:
    """Raise a UsageError if rows of a router would have to be taken out of a matrix in low precision."""
    if is_low(entry):
        raise UsageError(
            f"{source.folder} stores the router's {entry.name} in low precision, of which no rows can be cut or "
            "changed; use --form shared with a method that remaps."
        )
