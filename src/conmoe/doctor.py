"""How far statistics and a plan can be trusted, before anything is written: a report, and what to do about it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe import __version__
from conmoe.artifacts import Manifest, checkpoint_fingerprint, read_layer, read_manifest, read_plan
from conmoe.calibrate import Calibration, calibrate
from conmoe.data import TokenData
from conmoe.diagnosis import FITTED, NOISY, Advice, Diagnosis, Estimate, Halves, Planned, Use, advise
from conmoe.forms import without_map
from conmoe.moe import MoeLayer
from conmoe.ops.experts import tensors
from conmoe.ops.halves import answers_alike, first_drawn, first_half, kept_alike, part, recount
from conmoe.ops.leftover import leftover, ratio, reached
from conmoe.ops.subsets import join_layers
from conmoe.parallel import refuse_several
from conmoe.plan import plan_layer
from conmoe.progress import SILENT, Progress
from conmoe.refine import NONE, refine
from conmoe.registry import Method, get_method
from conmoe.request import positions
from conmoe.source import Source, check_compressible, open_source, outline_experts, read_experts
from conmoe.types import ConmoeError, Experts, LayerPlan, LayerStatistics, Plan, ScopePlan, UsageError, sample_tensors

#: A half of fewer tokens says nothing.
FEWEST = 16


def doctor(
    model: Path,
    statistics: Path,
    plan: Path | None = None,
    *,
    data: TokenData | None = None,
    halves: bool = True,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Diagnosis:
    """Say how far statistics, and a plan made from them, can be trusted.

    Args:
        model: the checkpoint that was calibrated.
        statistics: the folder that :func:`conmoe.calibrate` wrote.
        plan: the folder of a plan made from them; None to look at the statistics alone.
        data: text that was not calibrated on, to measure the plan's layers on.
        halves: also make the plan twice more, each time on half of the token sample.
        device: where to compute.
        progress: where the stages report to.

    Raises:
        UsageError: the statistics belong to another model, or the plan to other statistics.
    """
    refuse_several("doctor")
    source = open_source(model, trust_remote_code=trust_remote_code)
    check_compressible(source)
    manifest = read_manifest(statistics)
    if manifest.model != checkpoint_fingerprint(source.folder, source.files):
        raise UsageError(f"{statistics} was made from another checkpoint than {model}; calibrate this one.")
    made = None if plan is None else read_plan(plan)
    if made is not None and made.statistics != manifest.fingerprint:
        raise UsageError(f"{plan} was not made from {statistics}; give the statistics that it was made from.")
    if made is None and data is not None:
        raise UsageError("Other text shows how a plan does on it; give the plan too.")

    uses = tuple(layer_use(layer.index, read_layer(statistics, layer.index)) for layer in source.layers)
    planned: tuple[Planned, ...] = ()
    if made is not None:
        with _fresh(model, manifest, data, device, trust_remote_code, progress) as fresh:
            patient = _Patient(source, statistics, fresh, made, halves, device)
            total = sum(len(scope.layers) for scope in made.scopes)
            with progress.stage("doctor", total, "layers") as advance:
                found = []
                for scope in made.scopes:
                    found.append(_examine(patient, scope))
                    advance(len(scope.layers))
                planned = tuple(found)
    fits = made is not None and fits_sample(made)
    return Diagnosis(
        version=__version__,
        statistics=manifest.fingerprint,
        method=made and made.method,
        keep=made and made.keep,
        refine=made and made.refine,
        fits=fits,
        fresh=tuple(f"{item.source}: {item.sequences} sequences" for item in data.sources) if data else (),
        uses=uses,
        planned=planned,
        warnings=advise(uses, planned, fits=fits),
    )


def first_look(source: Source, statistics: Path, made: Plan) -> tuple[Advice, ...]:
    """What can be said of a plan from its statistics alone: no weight is read, no expert is run."""
    layers = {layer.index: layer for layer in source.layers}
    uses, planned = [], []
    for scope in made.scopes:
        known = [read_layer(statistics, index) for index in scope.layers]
        wide, outline = join_layers(known, [outline_experts(source, layers[index]) for index in scope.layers])
        uses += [layer_use(index, found) for index, found in zip(scope.layers, known, strict=True)]
        planned.append(_sized(made, scope, wide, outline))
    return advise(uses, planned, fits=fits_sample(made))


def glance(source: Source, statistics: Path, made: Plan, scope: ScopePlan, *, tokens: int, device: str) -> Planned:
    """What :func:`doctor` finds of one scope, on ``tokens`` of the sample, its halves without the refinement."""
    return _examine(_Patient(source, statistics, None, replace(made, refine=NONE), True, device, tokens), scope)


def layer_use(layer: int, statistics: LayerStatistics) -> Use:
    """How evenly, and how well, the calibration text covers the experts of one layer."""
    count_E = statistics.sums["count"].double()
    E, few_E = count_E.numel(), count_E[(count_E > 0) & (count_E < NOISY)]
    share_E = count_E / count_E.sum().clamp_min(1.0)
    entropy = float(torch.special.entr(share_E).sum())
    return Use(
        layer=layer,
        experts=E,
        tokens=statistics.tokens,
        sample=statistics.sample.hidden_nD.shape[0],
        least=int(count_E.min()),
        median=float(count_E.quantile(0.5)),
        never=int((count_E == 0).sum()),
        few=few_E.numel(),
        reach=NOISY / float(few_E.median()) if few_E.numel() else 1.0,
        busiest=float(share_E.sort(descending=True).values[: math.ceil(E / 8)].sum()),
        effective=math.exp(entropy),
    )


def fits_sample(made: Plan) -> bool:
    """Whether down projections of the plan were fitted to the token sample."""
    return made.refine not in (NONE, "gains") or made.method in FITTED


@dataclass(frozen=True, slots=True)
class _Patient:
    """A plan and all it can be held against."""

    source: Source
    statistics: Path
    fresh: Path | None  # statistics of the other text, whose sample is all of it
    made: Plan
    halves: bool
    device: str
    tokens: int = 0  # of the sample that are looked at, 0: all

    def read(self, layer: MoeLayer) -> LayerStatistics:
        found = read_layer(self.statistics, layer.index)
        return _on(replace(found, sample=first_drawn(found.sample, self.tokens)) if self.tokens else found, self.device)

    def layers(self, scope: ScopePlan) -> list[MoeLayer]:
        by_index = {layer.index: layer for layer in self.source.layers}
        missing = [index for index in scope.layers if index not in by_index]
        if missing:
            raise ConmoeError(f"The plan names layer {missing[0]}, which has no experts; plan this model again.")
        return [by_index[index] for index in scope.layers]


@contextmanager
def _fresh(
    model: Path, manifest: Manifest, data: TokenData | None, device: str, trust_remote_code: bool, progress: Progress
) -> Iterator[Path | None]:
    """Statistics of the other text for as long as they are needed, all its tokens in the sample."""
    if data is None:
        yield None
        return
    options = Calibration(
        sample=data.tokens,
        device=device,
        dtype=getattr(torch, manifest.dtype),
        trust_remote_code=trust_remote_code,
    )
    depth = open_source(model, trust_remote_code=trust_remote_code).config.num_hidden_layers
    with tempfile.TemporaryDirectory(prefix="conmoe-") as work:
        out = Path(work) / "statistics"
        with progress.stage("other text", data.tokens * depth, "tokens x layers") as advance:
            calibrate(model, out, data, options, advance=advance)
        yield out


def _examine(patient: _Patient, scope: ScopePlan) -> Planned:
    """One scope: its plan on the sample and on other text, and what becomes of it on each half of the sample."""
    layers, plan = patient.layers(scope), scope.plan
    if plan.mixing_KE.shape[0] == plan.assignment_E.numel():
        known = [patient.read(layer) for layer in layers]
        wide, outline = join_layers(known, [outline_experts(patient.source, layer) for layer in layers])
        return _sized(patient.made, scope, wide, outline)
    experts = [_moved(read_experts(patient.source, layer), patient.device) for layer in layers]
    known = [patient.read(layer) for layer in layers]
    wide, wide_experts = join_layers(known, experts)
    found = _sized(patient.made, scope, wide, wide_experts)

    def left(statistics: Sequence[LayerStatistics], of: LayerPlan) -> tuple[Tensor, Tensor]:
        return leftover([each.sample for each in statistics], experts, wide_experts, of)

    fresh = None
    if patient.fresh is not None:
        read = [_on(read_layer(patient.fresh, layer.index), patient.device) for layer in layers]
        fresh = _estimate(*ratio(*left(read, plan)))
    if not found.sample_tokens:
        return found.model_copy(update={"fresh": fresh, "untold": "there is no token sample"})
    few = found.sample_tokens < 2 * FEWEST
    halves, untold = None, f"the sample holds {found.sample_tokens} tokens, too few to halve" if few else ""
    if patient.halves and not few:
        try:
            halves, untold = _halves(patient, scope, layers, known, experts, wide_experts, found.rests_on), ""
        except UsageError as error:  # a method may ask for more than half of a small sample has
            untold = str(error)
    sample = _estimate(*ratio(*left(known, plan)))
    expected = halves and _expected(sample, halves)
    told = {"sample": sample, "expected": expected, "fresh": fresh, "halves": halves, "untold": untold}
    return found.model_copy(update=told)


def _expected(sample: Estimate, halves: Halves) -> Estimate:
    """The plan on new tokens: what it leaves of its own, and the gap, which shrinks with the tokens planned on."""
    share = 2 * halves.excess / halves.gap.value if halves.gap.value > 0 else 0.0
    stderr = math.hypot(sample.stderr or 0.0, share * (halves.gap.stderr or 0.0))
    return Estimate(value=sample.value + 2 * halves.excess, stderr=stderr)


def _halves(
    patient: _Patient,
    scope: ScopePlan,
    layers: Sequence[MoeLayer],
    known: Sequence[LayerStatistics],
    experts: Sequence[Experts],
    wide_experts: Experts,
    rests_on: int,
) -> Halves:
    made, held = patient.made, positions(layers, patient.made.protected)
    method = get_method(made.method)
    first = [first_half(each.sample) for each in known]
    twice = [
        [recount(part(each.sample, chosen_n), own) for each, chosen_n, own in zip(known, chosen, experts, strict=True)]
        for chosen in (first, [~chosen_n for chosen_n in first])
    ]
    one, two = (
        _plan_again(method, made, join_layers(half, experts)[0], wide_experts, scope.plan, held, _groups(made, layers))
        for half in twice
    )
    first_n = torch.cat(first).cpu()
    measured = [leftover([each.sample for each in known], experts, wide_experts, each) for each in (one, two)]
    by_first, by_second = (residual_n for residual_n, _ in measured)
    source_n = measured[0][1]
    own_n = torch.where(first_n, by_first, by_second)
    other_n = torch.where(first_n, by_second, by_first)
    alike = kept_alike(one, two, held)
    tokens = min(each.tokens for half in twice for each in half)
    gap, stderr = ratio(other_n - own_n, source_n)
    return Halves(
        tokens=tokens,
        kept_alike=alike and alike[0],
        by_chance=alike and alike[1],
        answers_alike=answers_alike(one, two),
        own=_estimate(*ratio(own_n, source_n)),
        other=_estimate(*ratio(other_n, source_n)),
        gap=_estimate(gap, stderr),
        excess=max(0.0, gap) * min(tokens, rests_on) / (2 * rests_on),
    )


def _plan_again(
    method: Method,
    made: Plan,
    statistics: LayerStatistics,
    experts: Experts,
    plan: LayerPlan,
    held: Sequence[int],
    groups: int,
) -> LayerPlan:
    """What the method decides, as it did for ``plan``, on other statistics of the same scope."""
    options = {name: value for name, value in made.options.items() if name in method.options}
    again = plan_layer(method, statistics, experts, plan.mixing_KE.shape[0], held, groups, options)
    if made.refine != NONE and made.default_form == "sliced":  # as planning does
        again = without_map(again)
    frozen = again.assignment_E[list(held)].tolist()
    return refine(made.refine, statistics.sample, experts, again, frozen=frozen, options=made.refine_options)


def _groups(made: Plan, layers: Sequence[MoeLayer]) -> int:
    """Groups of the router that had to keep equally many experts, as :attr:`conmoe.request.Asked.groups` has it."""
    method = get_method(made.method)
    cuts = method.form_with(made.options) == "sliced" or (made.default_form == "sliced" and not method.condenses)
    return layers[0].groups if cuts else 1


def _sized(made: Plan, scope: ScopePlan, statistics: LayerStatistics, experts: Experts) -> Planned:
    """What counts alone tell of the plan of a scope."""
    plan, width = scope.plan, experts.gate_EID.shape[1]
    tokens_K = reached(statistics.sample, plan).double()
    whole = plan.mixing_KE.shape[0] == plan.assignment_E.numel()
    predicted, sample_tokens = plan.predicted_error, statistics.sample.hidden_nD.shape[0] // len(scope.layers)
    if made.sequential and sample_tokens:  # it saw more tokens, or fewer, on the way
        tokens_K *= made.sequential / sample_tokens
    return Planned(
        layers=scope.layers,
        experts=plan.assignment_E.numel(),
        prototypes=plan.mixing_KE.shape[0],
        sequential=made.sequential > 0,
        predicted=predicted if math.isfinite(predicted) else None,
        sample=None,
        expected=None,
        fresh=None,
        halves=None,
        width=width,
        tokens=statistics.tokens,
        sample_tokens=sample_tokens,
        rests_on=_rests_on(made, sample_tokens, statistics.tokens),
        reached=float(tokens_K.quantile(0.5)) if tokens_K.numel() else 0.0,
        starved=0 if whole else int((tokens_K < width).sum()),
    )


def _rests_on(made: Plan, sample: int, tokens: int) -> int:
    """How many tokens of a layer the plan was made from; a method with an option ``tokens`` takes so many (0: all)."""
    if made.refine != NONE:
        return made.sequential or sample
    if "sample" in get_method(made.method).needs:
        own = made.sequential or sample
        return min(own, int(made.options.get("tokens", 0)) or own)
    return tokens


def _estimate(value: float, stderr: float) -> Estimate:
    return Estimate(value=value, stderr=stderr if math.isfinite(stderr) else None)


def _moved(experts: Experts, device: str) -> Experts:
    moved: dict[str, Any] = {name: value.to(device) for name, value in tensors(experts).items()}
    return replace(experts, **moved)


def _on(statistics: LayerStatistics, device: str) -> LayerStatistics:
    sample = statistics.sample
    moved: dict[str, Any] = {name: value.to(device) for name, value in sample_tensors(sample).items()}
    return replace(statistics, sample=replace(sample, **moved))
