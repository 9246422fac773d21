"""Budget x method over layers: statistics and weights in, a checked plan out.

What every method would have to know otherwise is done here, around it: scopes become one wide layer, protected experts
are taken out and kept, and each group of a grouped router is planned for itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe import __version__
from conmoe.allocate import experts_kept, parse_keep, uniform
from conmoe.artifacts import (
    PLAN_JSON,
    Manifest,
    building,
    checkpoint_fingerprint,
    fingerprint,
    read_layer,
    read_manifest,
    read_plan,
    refuse_overlap,
    write_plan,
)
from conmoe.forms import check_groups
from conmoe.methods import DEFAULT_METHOD
from conmoe.moe import MoeLayer
from conmoe.ops.experts import select, tensors
from conmoe.ops.outliers import super_experts
from conmoe.ops.plans import embed, identity
from conmoe.ops.subsets import join_layers, restrict
from conmoe.registry import Form, Method, bind_options, get_method
from conmoe.source import check_compressible, open_source, outline_experts, read_experts
from conmoe.types import Experts, LayerPlan, LayerStatistics, Plan, ScopePlan, UsageError, sample_tensors

Protected = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a plan."""

    method: str = DEFAULT_METHOD
    keep: str = "0.5"
    options: Mapping[str, Any] | None = None
    protect: tuple[str, ...] = ("super",)
    scope: int = 1
    form: Form | None = None
    device: str = "cpu"
    trust_remote_code: bool = False


def plan(
    model: Path,
    statistics: Path,
    out: Path | None = None,
    request: Request = Request(),
    *,
    force: bool = False,
    advance: Callable[[int], None] = lambda layers: None,
) -> Plan:
    """Decide which prototypes stay and who answers for whom.

    Args:
        model: the checkpoint that was calibrated.
        statistics: the folder that :func:`conmoe.calibrate` wrote.
        out: a folder for the plan; None to return it only. A killed run goes on at the first unplanned layer.
        request: method, budget and options.
        force: replace ``out`` if it exists.
        advance: called with the number of layers planned since the last call.

    Raises:
        UsageError: the statistics belong to another model, or the request cannot be met.
    """
    source = open_source(model, trust_remote_code=request.trust_remote_code)
    check_compressible(source)
    manifest = read_manifest(statistics)
    name = checkpoint_fingerprint(source.folder, source.files)
    if manifest.model != name:
        raise UsageError(f"{statistics} was made from another checkpoint than {model}; calibrate this one.")
    method, options, budgets, scopes = check_request(source.layers, request)
    _check_needs(method, read_layer(statistics, source.layers[0].index), statistics)
    if out is not None:
        refuse_overlap(out, model)
    protected = _protected(source.layers, statistics, request.protect)

    def decide(layers: list[MoeLayer], keep: int) -> ScopePlan:
        read = read_experts if "weights" in method.needs else outline_experts
        loaded = [_load(read(source, layer), read_layer(statistics, layer.index), request.device) for layer in layers]
        wide_statistics, wide_experts = join_layers([part for part, _ in loaded], [part for _, part in loaded])
        cut = "sliced" in (request.form, method.form_with(options))  # router rows are
        groups = layers[0].groups if cut else 1
        held = _positions(layers, protected)
        layer_plan = plan_layer(method, wide_statistics, wide_experts, keep, held, groups, options)
        return ScopePlan(tuple(layer.index for layer in layers), layer_plan)

    def assemble(done: list[ScopePlan]) -> Plan:
        return _assemble(done, request, method, options, protected, manifest)

    key = fingerprint([manifest.fingerprint, asdict(request)])
    with nullcontext(None) if out is None else building(out, force=force, key=key) as folder:
        done: list[ScopePlan] = []
        for layers, keep in zip(scopes, budgets, strict=True):
            part = folder and folder / f"layer-{layers[0].index:05}"
            if part and (part / PLAN_JSON).is_file():
                done += read_plan(part).scopes
            else:
                done.append(decide(layers, keep))
                if part:
                    part.mkdir(exist_ok=True)
                    write_plan(part, assemble(done[-1:]))
            advance(len(layers))
        if folder:
            write_plan(folder, assemble(done))
            for part in folder.glob("layer-*"):
                shutil.rmtree(part)
    return assemble(done)


def check_request(
    layers: Sequence[MoeLayer], request: Request
) -> tuple[Method, dict[str, Any], list[int], list[list[MoeLayer]]]:
    """Everything about a request that can be refused before any work: method, options, budget, scopes.

    Returns:
        the method, its options, the prototypes of each scope, and the layers of each scope.
    """
    method = get_method(request.method)
    options = bind_options(method, request.options or {})
    keep = parse_keep(request.keep)
    first = layers[0]
    if request.scope < 1:
        raise UsageError(f"--scope takes a number of neighbouring layers, not {request.scope}.")
    form = request.form or method.form_with(options)
    drops = method.form_with(options) == "sliced" and experts_kept(keep, first.logical) < first.logical
    if drops and form == "expanded":
        raise UsageError(
            f"{method.name!r} drops experts, which the expanded form cannot take out of the router; use --form sliced "
            "or --form shared."
        )
    if request.scope > 1 and form == "sliced":
        raise UsageError("Layers that share a pool of prototypes have no sliced form; use --form shared.")
    if form == "sliced" or drops:
        count = experts_kept(keep, first.logical)
        if count < first.top_k:
            raise UsageError(
                f"--keep {request.keep} leaves {count} experts, but every token goes to {first.top_k}; keep at least "
                f"{first.top_k} in the sliced form, or use --form shared with a method that remaps."
            )
        if first.groups > 1:
            check_groups(first, count)
    scopes = [list(layers[start : start + request.scope]) for start in range(0, len(layers), request.scope)]
    budgets = uniform(keep, first.logical, [len(scope) for scope in scopes])
    named = _named(layers, request.protect)
    groups = first.groups if form == "sliced" or drops else 1
    for scope, budget in zip(scopes, budgets, strict=True):
        check_protected(_positions(scope, named), budget, groups, len(scope) * first.logical)
    return method, options, budgets, scopes


def check_protected(held: Sequence[int], keep: int, groups: int, experts: int) -> None:
    """Raise a UsageError if the protected experts leave a method nothing to choose, in any group of the router."""
    size = experts // groups
    for group in range(groups):
        count = sum(group * size <= expert < (group + 1) * size for expert in held)
        if count >= keep // groups and count < size:
            raise UsageError(
                f"{count} experts are protected where {keep // groups} may stay; keep more, or protect fewer "
                "(--protect none protects nobody)."
            )


def plan_layer(
    method: Method,
    statistics: LayerStatistics,
    experts: Experts,
    keep: int,
    protected: Sequence[int],
    groups: int,
    options: Mapping[str, Any],
) -> LayerPlan:
    """Run a method on one layer (or scope), its protected experts and router groups handled around it.

    Raises:
        UsageError: the protected experts leave nothing to choose.
    """
    E = statistics.owner_E.numel()
    if keep == E:
        return identity(E)
    check_protected(protected, keep, groups, E)
    held = torch.zeros(E, dtype=torch.bool)
    held[list(protected)] = True
    parts: list[LayerPlan] = []
    subsets: list[Tensor] = []
    for members in torch.arange(E).chunk(groups):
        free, kept = members[~held[members]], members[held[members]]
        left = keep // groups - kept.numel()
        for subset, part in ((free, left), (kept, kept.numel())):
            if subset.numel():
                subsets.append(subset)
                parts.append(_run(method, statistics, experts, subset, part, options))
    if len(parts) == 1:
        return parts[0]
    return embed(parts, subsets, E, energy_E=statistics.sums["gate_norm_squared"], experts=experts)


def _run(
    method: Method, statistics: LayerStatistics, experts: Experts, subset: Tensor, keep: int, options: Mapping[str, Any]
) -> LayerPlan:
    if keep == subset.numel():
        return identity(keep)
    if subset.numel() < statistics.owner_E.numel():
        statistics, experts = restrict(statistics, subset), select(experts, subset)
    return method.function(statistics, experts, keep, **options)


def _load(experts: Experts, statistics: LayerStatistics, device: str) -> tuple[LayerStatistics, Experts]:
    if device != "cpu":
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in tensors(experts).items() if not value.is_meta
        }
        experts = replace(experts, **moved)
        sample = statistics.sample
        moved = {name: value.to(device) for name, value in sample_tensors(sample).items()}
        statistics = replace(statistics, sample=replace(sample, **moved))
    return statistics, experts


def _check_needs(method: Method, found: LayerStatistics, folder: Path) -> None:
    missing = [name for name in method.needs if name not in ("sample", "weights") and name not in found.sums]
    if missing:
        raise UsageError(f"{folder} lacks the statistic {missing[0]!r}, which {method.name!r} needs; calibrate again.")


def _protected(layers: Sequence[MoeLayer], folder: Path, protect: Sequence[str]) -> Protected:
    """Decoder layer -> experts that must stay, from ``super``, ``none`` and ``LAYER:EXPERT``."""
    chosen = {index: set(experts) for index, experts in _named(layers, protect).items()}
    if "super" in protect:
        peaks = torch.stack([read_layer(folder, layer.index).sums["peak"] for layer in layers])
        for position, expert in super_experts(peaks).nonzero().tolist():
            chosen.setdefault(layers[position].index, set()).add(expert)
    return {index: tuple(sorted(chosen[index])) for index in sorted(chosen)}


def _named(layers: Sequence[MoeLayer], protect: Sequence[str]) -> Protected:
    """Decoder layer -> experts that are protected by name, which can be told before any statistics."""
    chosen: dict[int, set[int]] = {}
    known = {layer.index: layer.logical for layer in layers}
    for text in protect:
        if text not in ("super", "none"):
            index, _, expert = text.partition(":")
            if not (index.isdecimal() and expert.isdecimal() and int(expert) < known.get(int(index), 0)):
                raise UsageError(f"--protect takes 'super', 'none' or LAYER:EXPERT of this model, not {text!r}.")
            chosen.setdefault(int(index), set()).add(int(expert))
    return {index: tuple(sorted(experts)) for index, experts in chosen.items()}


def _positions(layers: Sequence[MoeLayer], protected: Protected) -> list[int]:
    return [
        position * layer.logical + expert
        for position, layer in enumerate(layers)
        for expert in protected.get(layer.index, ())
    ]


def _assemble(
    scopes: list[ScopePlan],
    request: Request,
    method: Method,
    options: dict[str, Any],
    protected: Protected,
    manifest: Manifest,
) -> Plan:
    return Plan(
        scopes=tuple(scopes),
        method=method.name,
        options={**options, "scope": request.scope} if request.scope > 1 else options,
        keep=request.keep,
        default_form=request.form or method.form_with(options),
        protected=protected,
        source=manifest.model,
        statistics=manifest.fingerprint,
        version=__version__,
    )
