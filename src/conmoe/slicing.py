"""The best that the sliced form can do with a plan that redirects: its prototypes, without its map.

Where a map is lost, the tokens of a redirected expert go to whatever the router likes next. What can still be chosen is
the router row that speaks for each prototype, and what each prototype answers to the tokens that now reach it. Both are
settled layer by layer on the token sample, and what was lost before and after is measured on tokens held out from both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe import __version__
from conmoe.artifacts import (
    Manifest,
    Record,
    building,
    checkpoint_fingerprint,
    fingerprint,
    plan_fingerprint,
    read_layer,
    read_manifest,
    read_plan,
    read_tokens,
    refuse_overlap,
    write_atomic,
    write_plan,
)
from conmoe.diagnosis import Estimate
from conmoe.forms import check_form, check_router, is_approximate, representatives, without_map
from conmoe.moe import MoeLayer
from conmoe.ops.experts import tensors
from conmoe.ops.leftover import leftover, ratio
from conmoe.progress import SILENT, Progress
from conmoe.refine import NONE, held_out_tokens
from conmoe.refine import refine as refined
from conmoe.registry import bind_options, get_refinement
from conmoe.request import Request, check_refine_options, positions
from conmoe.sequential import PASSAGE, Passage, clear_layers, open_passage
from conmoe.source import Source, check_compressible, open_source, read_experts
from conmoe.types import Experts, LayerPlan, LayerStatistics, Plan, ScopePlan, TokenSample, UsageError, sample_tensors

SLICE_JSON = "slice.json"


class LayerLoss(Record):
    """What one layer loses without its map: shares of the energy of its routed output, on held-out tokens."""

    layer: int
    redirected: int  # experts that lose their router row although a prototype answers for them
    rows: str  # which rows speak for the prototypes: a name of :func:`choices`; unfitted: before the plan's own fit
    tokens: int  # held out
    mapped: Estimate  # the plan as it is, with its map
    dropped: Estimate  # without its map, nothing else changed: what apply writes
    sliced: Estimate  # with the rows chosen and the prototypes fitted


class Slicing(Record):
    """``slice.json``: what a sliced plan was made from, and what each layer loses."""

    version: str
    plan: str  # fingerprint of the plan that redirects
    refine: str
    layers: tuple[LayerLoss, ...]


@dataclass(frozen=True, slots=True)
class Sliced:
    """A plan for the sliced form, and its record."""

    plan: Plan
    record: Slicing


def slice_plan(
    model: Path,
    statistics: Path,
    plan: Plan | Path,
    out: Path | None = None,
    *,
    refine: str = "reconstruct",
    refine_options: Mapping[str, Any] | None = None,
    sequential: bool | None = None,
    sample: int = 0,
    device: str = "cpu",
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Sliced:
    """The best sliced version of a plan that redirects, and what it loses.

    Args:
        model: the checkpoint that was calibrated.
        statistics: what the plan was made from, with a token sample.
        plan: a plan whose map the sliced form cannot hold, or its folder.
        out: a folder for the new plan and ``slice.json``; None to return them only. A killed run goes on at the first
            layer that is missing.
        refine: the refinement that fits the prototypes to the tokens that reach them; ``"none"`` chooses rows only.
        refine_options: of the refinement.
        sequential: fit each layer on inputs that passed through the sliced layers before it; None: where anything is
            fitted.
        sample: tokens of each layer on the way; 0: as many as the statistics have.
        device: where to compute.
        force: replace ``out`` if it exists.
        trust_remote_code: run modelling code that comes with the source.
        progress: where the stage reports to.

    Raises:
        UsageError: the plan redirects nothing, belongs to other statistics, or the sliced form cannot hold its pools.
    """
    source = open_source(model, trust_remote_code=trust_remote_code)
    check_compressible(source)
    made = read_plan(plan) if isinstance(plan, Path) else plan
    manifest = read_manifest(statistics)
    in_turn = refine != NONE if sequential is None else sequential
    check_refine_options(Request(refine=refine, refine_options=refine_options))
    _check(source, manifest, made, sample, in_turn)
    options = {} if refine == NONE else bind_options(get_refinement(refine), refine_options or {})
    if out is not None:
        refuse_overlap(out, model)
    tokens = min(sample or manifest.sample, manifest.tokens) if in_turn else 0
    origin = plan_fingerprint(made)
    assemble = partial(_assemble, made, origin, refine, options, tokens)
    key = fingerprint([manifest.fingerprint, origin, refine, options, in_turn, sample])
    with tempfile.TemporaryDirectory(prefix="conmoe-") if out is None else building(out, force=force, key=key) as work:
        folder, passage = Path(work), None
        if in_turn:
            passage = open_passage(
                source,
                read_tokens(statistics),
                manifest,
                folder / PASSAGE,
                device=device,
                sample=sample,
                drift=refine != NONE,
                trust_remote_code=trust_remote_code,
            )
        shop = _Shop(source, statistics, made, passage, folder, device, assemble)
        with progress.stage("slice", len(made.scopes), "layers") as advance:
            found = [_sliced(shop, scope, advance) for scope in made.scopes]
        record = Slicing(version=__version__, plan=origin, refine=refine, layers=tuple(loss for _, loss in found))
        result = assemble([scope for scope, _ in found])
        if out is not None:
            write_plan(folder, result)
            write_atomic(folder / SLICE_JSON, record.model_dump_json(indent=2) + "\n")
            clear_layers(folder)
    return Sliced(result, record)


@dataclass(frozen=True, slots=True)
class _Shop:
    """What every layer is sliced with."""

    source: Source
    statistics: Path
    made: Plan
    passage: Passage | None
    folder: Path
    device: str
    assemble: Callable[[list[ScopePlan]], Plan]


def _sliced(shop: _Shop, scope: ScopePlan, advance: Callable[..., None]) -> tuple[ScopePlan, LayerLoss]:
    """One layer, made or found where a killed run left it; its new weights are read where they lie."""
    layer = next(layer for layer in shop.source.layers if layer.index == scope.layers[0])
    part = shop.folder / f"layer-{layer.index:05}"
    if not (part / SLICE_JSON).is_file():
        known = shop.passage.statistics(layer) if shop.passage else read_layer(shop.statistics, layer.index)
        loaded = _on(shop.device, known, read_experts(shop.source, layer))
        held = positions([layer], shop.made.protected)
        empty = shop.assemble([])
        best, loss = slice_layer(scope.plan, layer, *loaded, held, empty.refine, empty.refine_options)
        part.mkdir(exist_ok=True)
        write_plan(part, shop.assemble([ScopePlan(scope.layers, best)]))
        write_atomic(part / SLICE_JSON, loss.model_dump_json())
    made = read_plan(part).scopes[0]
    if shop.passage:
        shop.passage.follow(made, shop.assemble)
    advance(1)
    return made, LayerLoss.model_validate_json((part / SLICE_JSON).read_bytes())


def slice_layer(
    plan: LayerPlan,
    layer: MoeLayer,
    statistics: LayerStatistics,
    experts: Experts,
    held: list[int],
    refinement: str,
    options: Mapping[str, Any],
) -> tuple[LayerPlan, LayerLoss]:
    """One layer without its map: the rows that lose least on the sample, prototypes fitted, and the losses.

    Where the plan brings weights or gains of its own, its prototypes as mixtures of the source's experts are tried too.
    """
    sample = statistics.sample
    held_n = held_out_tokens(sample).cpu()

    def left(of: LayerPlan) -> tuple[Tensor, Tensor]:
        return leftover([sample], [experts], experts, of)

    possible = {name: (each, *left(each)) for name, each in choices(plan, layer, sample, experts).items()}
    if plan.weights or bool((plan.gain_E != 1).any()):  # fitted to the tokens that the map sends: a poor place to start
        bare = replace(plan, weights={}, gain_E=torch.ones_like(plan.gain_E))
        unfitted = choices(bare, layer, sample, experts)
        possible |= {f"{name}, unfitted": (each, *left(each)) for name, each in unfitted.items()}
    rows = min(possible, key=lambda name: float(possible[name][1][~held_n].sum()))
    frozen = plan.assignment_E[held].tolist()
    best = refined(refinement, sample, experts, possible[rows][0], frozen=frozen, options=options)

    def lost(residual_n: Tensor, source_n: Tensor) -> Estimate:
        value, stderr = ratio(residual_n[held_n], source_n[held_n])
        return Estimate(value=value, stderr=stderr if isfinite(stderr) else None)

    K = plan.mixing_KE.shape[0]
    sliced = lost(*left(best))
    loss = LayerLoss(
        layer=layer.index,
        redirected=int((plan.assignment_E >= 0).sum()) - K,
        rows=rows,
        tokens=int(held_n.sum()),
        mapped=lost(*left(plan)),
        dropped=lost(*possible["own"][1:]),
        sliced=sliced,
    )
    return replace(best, predicted_error=sliced.value), loss


def choices(plan: LayerPlan, layer: MoeLayer, sample: TokenSample, experts: Experts) -> dict[str, LayerPlan]:
    """Sliced plans that differ in the router row that speaks for each prototype.

    ``own``: of the experts that it answers for, its largest part. ``busiest``: the one with the most gate on the
    sample. ``mean``: the mean of their rows, weighted by their gates. Rows that the router's groups do not allow are
    left out.
    """
    found = {"own": without_map(plan)}
    E, K = plan.assignment_E.numel(), plan.mixing_KE.shape[0]
    chosen_nk = sample.index_nk.long().cpu()
    mass_E = torch.zeros(E, dtype=torch.float64)
    mass_E.index_add_(0, chosen_nk[chosen_nk >= 0], sample.weight_nk.double().cpu()[chosen_nk >= 0])
    answers_KE = plan.assignment_E[None, :] == torch.arange(K)[:, None]
    share_KE = torch.where(answers_KE, mass_E, 0.0)
    own_K = representatives(plan)
    busiest_K = torch.where(share_KE.amax(dim=1) > 0, share_KE.argmax(dim=1), own_K)
    if _allowed(layer, busiest_K):
        found["busiest"] = without_map(plan, busiest_K)
    if experts.router_ED is not None:
        router_ED = experts.router_ED.to("cpu", torch.float64, copy=True)
        if plan.router_KD is not None:
            router_ED[plan.assignment_E >= 0] = plan.router_KD.double().cpu()
        unseen_K = share_KE.sum(dim=1) == 0
        share_KE[unseen_K, own_K[unseen_K]] = 1.0
        mean_KD = (share_KE / share_KE.sum(dim=1, keepdim=True)) @ router_ED
        # rows are in the order of the experts, not of the prototypes
        found["mean"] = replace(found["own"], router_KD=mean_KD[own_K.argsort()].to(experts.router_ED.dtype))
    return found


def _allowed(layer: MoeLayer, rows: Tensor) -> bool:
    try:
        check_router(layer, rows)
    except UsageError:
        return False
    return True


def _check(source: Source, manifest: Manifest, made: Plan, sample: int, in_turn: bool) -> None:
    if manifest.model != checkpoint_fingerprint(source.folder, source.files):
        raise UsageError(f"The statistics were made from another checkpoint than {source.folder}; calibrate this one.")
    if made.statistics != manifest.fingerprint:
        raise UsageError("The plan was not made from these statistics; give those that it was made from.")
    if not is_approximate(made, "sliced"):
        raise UsageError("The plan redirects no expert, so nothing is lost; write it with conmoe apply --form sliced.")
    if sample and not in_turn:
        raise UsageError("A sample is drawn anew only layer after layer; leave --sample out, or use --sequential.")
    if not (sample if in_turn else 0) and not manifest.sample:
        raise UsageError("The statistics have no token sample to choose and to fit by; calibrate again.")
    check_form(source.layers, made, "sliced")


def _assemble(
    made: Plan, origin: str, refinement: str, options: Mapping[str, Any], tokens: int, scopes: list[ScopePlan]
) -> Plan:
    return replace(
        made,
        scopes=tuple(scopes),
        options={**made.options, "sliced_from": origin[:12]},
        default_form="sliced",
        refine=refinement,
        refine_options=options,
        sequential=tokens,
        version=__version__,
    )


def _on(device: str, statistics: LayerStatistics, experts: Experts) -> tuple[LayerStatistics, Experts]:
    sample = statistics.sample
    moved: dict[str, Any] = {name: value.to(device) for name, value in sample_tensors(sample).items()}
    weights: dict[str, Any] = {name: value.to(device) for name, value in tensors(experts).items()}
    return replace(statistics, sample=replace(sample, **moved)), replace(experts, **weights)
