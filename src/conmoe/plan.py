"""Budget x method over layers: statistics and weights in, a plan out.

What every method would have to know otherwise is done here, around it: scopes become one wide layer, protected experts
are taken out and kept, and each group of a grouped router is planned for itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe import __version__
from conmoe.artifacts import (
    PLAN_JSON,
    Manifest,
    building,
    checkpoint_fingerprint,
    fingerprint,
    read_layer,
    read_manifest,
    read_plan,
    read_tokens,
    refuse_overlap,
    write_plan,
)
from conmoe.budgets import Context
from conmoe.fit import fitted
from conmoe.folding import check_foldable
from conmoe.forms import is_condensed, without_map
from conmoe.keeping import check_keeps
from conmoe.moe import MoeLayer
from conmoe.ops.experts import select, tensors
from conmoe.ops.outliers import super_experts
from conmoe.ops.plans import embed, identity
from conmoe.ops.subsets import join_layers, restrict
from conmoe.progress import SILENT, Progress
from conmoe.refine import NONE, refine
from conmoe.registry import Form, Method, bind_options, get_refinement
from conmoe.request import (
    Asked,
    Protected,
    Request,
    check_floor,
    check_protected,
    check_request,
    floor,
    named_experts,
    positions,
)
from conmoe.sequential import PASSAGE, Passage, clear_layers, open_passage
from conmoe.source import Source, check_compressible, open_source, outline_experts, read_experts
from conmoe.types import ConmoeError, Experts, LayerPlan, LayerStatistics, Plan, ScopePlan, UsageError, sample_tensors


def plan(
    model: Path,
    statistics: Path,
    out: Path | None = None,
    request: Request = Request(),
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> Plan:
    """Decide which prototypes stay and who answers for whom.

    Args:
        model: the checkpoint that was calibrated.
        statistics: the folder that :func:`conmoe.calibrate` wrote.
        out: a folder for the plan; None to return it only. A killed run goes on at the first unplanned layer.
        request: method, budget and options.
        force: replace ``out`` if it exists.
        progress: where the stages report to: the budget's own, if it has any, and ``plan``.

    Raises:
        UsageError: the statistics belong to another model, or the request cannot be met.
    """
    source = open_source(model, trust_remote_code=request.trust_remote_code)
    check_compressible(source)
    request = fitted(source, request, progress)
    manifest = read_manifest(statistics)
    name = checkpoint_fingerprint(source.folder, source.files)
    if manifest.model != name:
        raise UsageError(f"{statistics} was made from another checkpoint than {model}; calibrate this one.")
    asked = check_request(source.layers, request)
    check_keeps(source, asked, request)
    _check_needs(asked.method, read_layer(statistics, source.layers[0].index), statistics)
    _check_sample(request, manifest, statistics)
    if out is not None:
        refuse_overlap(out, model)
    protected = _protected(source.layers, asked, statistics, request.protect)
    least = floor(asked, protected)
    if not asked.budget.even:
        check_floor(asked, least)
    if asked.method.condenses and asked.form == "sliced":
        check_foldable(source)
    found: dict[str, Any] = {}

    key = fingerprint([manifest.fingerprint, asdict(request)])
    with nullcontext(None) if out is None else building(out, force=force, key=key) as folder:
        scope_plans = _ScopePlans(source, statistics, asked, protected, request, manifest, folder)
        context = Context(
            source=source,
            statistics=statistics,
            scopes=asked.scopes,
            request=request,
            method=asked.method,
            options=asked.options,
            uniform=asked.counts,
            floor=least,
            cap=asked.cap,
            step=asked.groups,
            load=scope_plans.load,
            plan_scope=scope_plans,
            assemble=partial(
                _assemble, asked=asked, request=request, protected=protected, manifest=manifest, found=found
            ),
            work=folder,
            progress=progress,
            found=found,
        )
        counts = share_out(context, asked)
        form = _form(asked, counts, len(source.layers))
        if form != (request.form or asked.method.form_with(asked.options)):
            progress.note(f"Not all layers keep equally many experts, so the result will be stored in the {form} form.")
        done: list[ScopePlan] = []
        with (
            progress.stage("plan", sum(len(scope) for scope in asked.scopes), "layers") as advance,
            _passage(source, statistics, manifest, request, folder) as passage,
        ):
            for position, (scope, count) in enumerate(zip(asked.scopes, counts, strict=True)):
                done.append(scope_plans.final(position, count, passage))
                if passage:
                    passage.follow(_as_stored(done[-1], form), context.assemble)
                advance(len(scope))
        made = replace(context.assemble(done), default_form=form)
        if folder:
            write_plan(folder, made)
            clear_layers(folder)
    return made


@contextmanager
def _passage(
    source: Source, statistics: Path, manifest: Manifest, request: Request, folder: Path | None
) -> Iterator[Passage | None]:
    """The calibration text before the first layer, if layers are to be planned one after the other."""
    if not request.sequential:
        yield None
        return
    ids_NS = read_tokens(statistics)
    with tempfile.TemporaryDirectory(prefix="conmoe-") if folder is None else nullcontext(folder) as work:
        yield open_passage(
            source,
            ids_NS,
            manifest,
            Path(work) / PASSAGE,
            device=request.device,
            sample=request.sample,
            drift=request.refine != NONE,
            trust_remote_code=request.trust_remote_code,
        )


def share_out(context: Context, asked: Asked) -> list[int]:
    """The prototypes of each scope, as the budget has it.

    Raises:
        ConmoeError: the budget gave what it may not.
    """
    if asked.counts == asked.cap:
        return list(asked.cap)
    counts: list[int] = asked.budget.function(context, **asked.budget_options)
    bounds = zip(counts, context.floor, context.cap, strict=True)
    inside = sum(counts) <= context.total and all(least <= count <= cap for count, least, cap in bounds)
    if not inside and tuple(counts) != asked.counts:  # the user's own counts were checked before
        raise ConmoeError(
            f"The budget {asked.budget.name!r} shared out {counts}, which is out of bounds; this is a bug."
        )
    return counts


def _form(asked: Asked, counts: Sequence[int], layers: int) -> Form:
    """How the result is stored unless the user says otherwise: only the shared form holds layers of several sizes."""
    planned = sum(len(scope) for scope in asked.scopes)
    ragged = len(set(counts)) > 1 or (planned < layers and tuple(counts) != asked.cap)
    return "shared" if asked.form == "sliced" and ragged and not asked.method.condenses else asked.form


def _as_stored(scope: ScopePlan, form: Form) -> ScopePlan:
    return scope if form != "sliced" or is_condensed(scope) else replace(scope, plan=without_map(scope.plan))


class _ScopePlans:
    """``(which scope, prototypes) -> its plan``: each is made once, and outlives a killed run if there is a folder."""

    def __init__(
        self,
        source: Source,
        statistics: Path,
        asked: Asked,
        protected: Protected,
        request: Request,
        manifest: Manifest,
        folder: Path | None,
    ) -> None:
        self._source, self._statistics, self._asked, self._protected = source, statistics, asked, protected
        self._request, self._manifest, self._folder = request, manifest, folder
        self._made: dict[tuple[int, int], ScopePlan] = {}

    def final(self, position: int, keep: int, passage: Passage | None) -> ScopePlan:
        """The plan that counts, on inputs that passed ``passage`` and refined, if either was asked for."""
        return self(position, keep, passage, refined=self._request.refine != NONE)

    def __call__(self, position: int, keep: int, passage: Passage | None = None, *, refined: bool = False) -> ScopePlan:
        draft = passage is None and not refined
        if draft and (position, keep) in self._made:
            return self._made[position, keep]
        scope = self._asked.scopes[position]
        name = (
            f"layer-{scope[0].index:05}-{keep}" + ("-sequential" if passage else "") + ("-refined" if refined else "")
        )
        part = self._folder and self._folder / name
        if part and (part / PLAN_JSON).is_file():
            made = read_plan(part).scopes[0]
        else:
            made = ScopePlan(tuple(layer.index for layer in scope), self._decide(scope, keep, passage, refined))
            if part:
                part.mkdir(exist_ok=True)
                write_plan(part, _assemble([made], self._asked, self._request, self._protected, self._manifest, {}))
                if made.plan.weights:  # they may be gigabytes: from here on they are read where they lie
                    made = read_plan(part).scopes[0]
        # new weights are gigabytes, and lie on disk already
        if draft and not (part and made.plan.weights):
            self._made[position, keep] = made
        return made

    def load(self, layer: MoeLayer) -> tuple[LayerStatistics, Experts]:
        """What the calibration knows of a layer, and its weights, on the device."""
        known = read_layer(self._statistics, layer.index)
        return _load(read_experts(self._source, layer), known, self._request.device)

    def _decide(self, scope: Sequence[MoeLayer], keep: int, passage: Passage | None, refined: bool) -> LayerPlan:
        method, options, device = self._asked.method, self._asked.options, self._request.device
        read = read_experts if refined or "weights" in method.needs else outline_experts
        known = passage.statistics if passage else (lambda layer: read_layer(self._statistics, layer.index))
        loaded = [_load(read(self._source, layer), known(layer), device) for layer in scope]
        wide_statistics, wide_experts = join_layers([part for part, _ in loaded], [part for _, part in loaded])
        held = positions(scope, self._protected)
        made = plan_layer(method, wide_statistics, wide_experts, keep, held, self._asked.groups, options)
        if not refined or keep == made.assignment_E.numel():
            return made
        if self._asked.form == "sliced":  # what is fitted is what will be stored: there the map is lost
            made = without_map(made)
        return refine(
            self._request.refine,
            wide_statistics.sample,
            wide_experts,
            made,
            frozen=made.assignment_E[list(held)].tolist(),
            options=self._request.refine_options,
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


def _check_sample(request: Request, manifest: Manifest, folder: Path) -> None:
    if request.refine != NONE and not request.sample and not manifest.sample:
        raise UsageError(f"{folder} has no token sample for --refine to fit; calibrate again, or use --refine none.")


def _protected(layers: Sequence[MoeLayer], asked: Asked, folder: Path, protect: Sequence[str]) -> Protected:
    """Of the planned layers, the experts that must stay, from ``super``, ``none`` and ``LAYER:EXPERT``.

    A layer that is condensed has no place for them.
    """
    chosen = {index: set(experts) for index, experts in named_experts(layers, protect).items()}
    if "super" in protect:
        peaks = torch.stack([read_layer(folder, layer.index).sums["peak"] for layer in layers])
        for position, expert in super_experts(peaks).nonzero().tolist():
            chosen.setdefault(layers[position].index, set()).add(expert)
    planned = () if asked.method.condenses else (layer.index for scope in asked.scopes for layer in scope)
    return {index: tuple(sorted(chosen[index])) for index in planned if index in chosen}


def _assemble(
    scopes: Sequence[ScopePlan],
    asked: Asked,
    request: Request,
    protected: Protected,
    manifest: Manifest,
    found: Mapping[str, Any],
) -> Plan:
    return Plan(
        scopes=tuple(scopes),
        method=asked.method.name,
        options={**asked.options, "scope": request.scope} if request.scope > 1 else asked.options,
        keep=asked.keep,
        default_form=asked.form,
        protected=protected,
        source=manifest.model,
        statistics=manifest.fingerprint,
        version=__version__,
        budget=asked.budget.name,
        budget_options={**asked.budget_options, **found},
        refine=request.refine,
        refine_options=_refine_options(request),
        sequential=min(request.sample or manifest.sample, manifest.tokens) if request.sequential else 0,
    )


def _refine_options(request: Request) -> dict[str, Any]:
    """Of the refinement, all that has a say in it."""
    if request.refine == NONE:
        return {}
    return bind_options(get_refinement(request.refine), request.refine_options or {})
