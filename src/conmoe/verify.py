"""After writing: the result is opened as a user would open it and compared with its plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from conmoe.apply import check_plan, result_config, settle_heads
from conmoe.checkpoint import read_module
from conmoe.folding import Folding, fold
from conmoe.forms import stored_experts
from conmoe.lowprec import is_low
from conmoe.moe import MoeLayer
from conmoe.mtp import Policy
from conmoe.outputs import fitted_rows, forget_prototypes, map_name, maps, plan_outputs, router_rows
from conmoe.preview import preview
from conmoe.registry import Form
from conmoe.runtime import register_family
from conmoe.shards import Held, parts_of, raw_chunks, read_tensor
from conmoe.source import Source, open_source
from conmoe.stream import open_stream
from conmoe.types import ConmoeError, Plan, ScopePlan


def verify(
    result: Path,
    model: Path,
    plan: Plan,
    form: Form,
    *,
    trust_remote_code: bool = False,
    mtp: Policy = "auto",
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Check that ``result`` is what ``plan`` says.

    Its headers must describe a loadable model; every tensor that the plan keeps must equal the source's byte for byte,
    and every other what the plan makes; maps must equal the plan's; a short text must run through it without NaN.

    Raises:
        ConmoeError: it is not.
    """
    source = open_source(model, trust_remote_code=trust_remote_code)
    check_plan(source, plan)
    made = open_source(result, trust_remote_code=trust_remote_code)
    scopes = {index: scope for scope in plan.scopes for index in scope.layers}
    layers = {layer.index: layer for layer in source.layers}
    rows, fitted = router_rows(source, plan, form), fitted_rows(source, plan, form)
    folding = fold(source, plan) if form == "sliced" else Folding({}, {}, ())
    computed = {output.name: output for output in plan_outputs(source, plan, form)[0]}
    folded = {output.name: output for outputs in folding.replaced.values() for output in outputs}
    for target, pieces in made.layout.sources.items():
        if pieces[0].entry.name in folded:
            for piece in pieces:
                _same(piece.entry, folded[piece.entry.name])
                advance(_bytes(piece.entry))
            continue
        layer = next((layer for layer in layers.values() if target.startswith(f"{layer.experts}.")), None)
        scope = scopes.get(layer.index) if layer else None
        if layer is not None and scope is not None and target in source.layout.sources:
            for piece in pieces:
                if not _check_expert(source, layer, scope, form, target, piece.entry, piece.pattern, piece.expert):
                    _same(piece.entry, computed[piece.entry.name], against="what the plan makes")
                advance(_bytes(piece.entry))
        elif target in source.layout.sources:
            for new, old in zip(pieces, source.layout.sources[target], strict=True):
                if target in fitted:
                    _same_value(new.entry, fitted[target])
                elif target in rows:
                    _same_rows(new.entry, old.entry, *rows[target])
                else:
                    _same(new.entry, old.entry)
                advance(_bytes(new.entry))
        else:  # maps and gains, which come next
            advance(sum(_bytes(piece.entry) for piece in pieces))
    if form == "shared":
        for index, layer in layers.items():
            _check_maps(source, made, layer, scopes.get(index))
    for output in settle_heads(source, result_config(source, plan, form), form, mtp).outputs:
        if output.name not in made.entries:
            raise ConmoeError(f"{result} holds no {output.name}; the result is damaged.")
        _same(made.entries[output.name], output, against="what becomes of the source's head for further tokens")
        advance(output.nbytes)
    if folding.blocks:
        _check_folded(source, made, plan, folding.blocks)
    forget_prototypes()
    _check_forward(made)


def _check_expert(
    source: Source,
    layer: MoeLayer,
    scope: ScopePlan,
    form: Form,
    target: str,
    entry: Held,
    pattern: str | None,
    expert: int | None,
) -> bool:
    """Each stored expert that is a copy must be one; whether all of them are."""
    stored = stored_experts(layer, scope, form)
    name = target.removeprefix(f"{layer.experts}.")
    by_index = {other.index: other for other in source.layers}
    copies = True
    for slot in range(len(stored.prototype_S)) if expert is None else [expert]:
        origin = stored.origin(slot)
        if origin is None:
            copies = False
            continue
        home = by_index[scope.layers[origin // layer.logical]]
        pieces = source.layout.sources[f"{home.experts}.{name}"]
        number = origin % layer.logical
        if expert is None:
            old, row = pieces[0].entry, entry.nbytes // entry.shape[0]
            _same(entry, old, slot * row, number * row, row)
        else:
            (old,) = [piece.entry for piece in pieces if piece.pattern == pattern and piece.expert == number]
            _same(entry, old)
    return copies


def _same(
    new: Held,
    old: Held,
    new_start: int = 0,
    old_start: int = 0,
    nbytes: int | None = None,
    *,
    against: str = "",
) -> None:
    if is_low(old):  # what is stored has to be the same, which is more than what it stands for
        for part, other in zip_longest(parts_of(new), parts_of(old), fillvalue=old):
            _same(part, other, against=against)
        return
    length = new.nbytes if nbytes is None else nbytes
    pairs = zip(raw_chunks(new, new_start, length), raw_chunks(old, old_start, length), strict=True)
    if new.dtype != old.dtype or (nbytes is None and new.nbytes != old.nbytes) or any(a != b for a, b in pairs):
        against = against or f"the source's {old.name}"
        raise ConmoeError(f"{new.name} in {new.file} differs from {against}; the result is damaged.")


def _bytes(entry: Held) -> int:
    return sum(part.nbytes for part in parts_of(entry))


def _same_rows(new: Held, old: Held, axis: int, rows: Tensor) -> None:
    if new.dtype != old.dtype or not torch.equal(read_tensor(new), read_tensor(old).index_select(axis, rows)):
        raise ConmoeError(f"{new.name} in {new.file} differs from the source's {old.name}; the result is damaged.")


def _same_value(new: Held, value: Tensor) -> None:
    found = read_tensor(new)
    if not torch.equal(found, value.to(found.dtype)):
        raise ConmoeError(f"{new.name} in {new.file} differs from the plan; the result is damaged.")


def _check_maps(source: Source, made: Source, layer: MoeLayer, scope: ScopePlan | None) -> None:
    for path, value in maps(source, layer, scope).items():
        entry = made.entries[map_name(source, path, value)]
        if not torch.equal(read_tensor(entry), value):
            raise ConmoeError(f"{entry.name} in {entry.file} differs from the plan; the result is damaged.")


def _check_folded(source: Source, made: Source, plan: Plan, blocks: Sequence[str]) -> None:
    """Dense layers must compute what the experts with static gates compute that they were folded from."""
    register_family(source.config.model_type)
    condensed = preview(source, plan, "shared")
    for path in blocks:
        before, after = (_loaded(each, path) for each in (condensed, made))
        D = source.model.get_decoder().config.hidden_size
        hidden = torch.randn(1, 8, D, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs = [module(hidden) for module in (before, after)]
        expected, got = (out[0] if isinstance(out, tuple) else out for out in outputs)
        rounding = max(4 * torch.finfo(source.model.dtype).eps, 1e-4)
        if not float((got - expected).norm()) <= rounding * float(expected.norm()):
            raise ConmoeError(f"The dense layer {path} of {made.folder} does not answer as its experts do.")


def _loaded(source: Source, path: str) -> nn.Module:
    """A copy of one module, with its weights in float32."""
    module = copy.deepcopy(source.model.get_submodule(path))
    weights = read_module(source.layout, source.model, f"{path}.", module)
    float32 = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    module.load_state_dict(float32, assign=True)
    return module


def _check_forward(made: Source) -> None:
    vocabulary = made.vocabulary
    ids = torch.arange(16, dtype=torch.int64).remainder(vocabulary).unsqueeze(0)
    with open_stream(made, ids) as stream:
        stream.run()
        with stream.head() as head:
            if not bool(torch.isfinite(head(stream.final(0, 1))).all()):
                raise ConmoeError(f"{made.folder} gives logits that are not finite.")
