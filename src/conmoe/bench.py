"""Every method, from the same statistics, at several budgets, on several domains: one table of what each one costs.

The text runs through the source once for each domain, and every result is opened without being written. What a row
needs is one file for each calibration seed, written as it ends: a killed run goes on, and a method or a domain that is
added later costs only itself.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import platform
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from conmoe import __version__
from conmoe.allocate import parse_keep
from conmoe.artifacts import (
    LABEL,
    MANIFEST,
    Manifest,
    check_ours,
    fingerprint,
    kept_experts,
    plan_record,
    read_manifest,
    refuse_overlap,
    write_atomic,
)
from conmoe.calibrate import Calibration, calibrate, describe
from conmoe.candidates import Candidate
from conmoe.data import TokenData, overlap
from conmoe.documents import first_line
from conmoe.evaluate import Fidelity, Measured
from conmoe.evaluate.fidelity import check_vocabularies, measure, run_through
from conmoe.forms import is_approximate
from conmoe.observe import IMPLEMENTATION
from conmoe.outputs import forget_prototypes
from conmoe.parallel import refuse_several
from conmoe.plan import plan
from conmoe.preview import preview
from conmoe.progress import Progress
from conmoe.registry import Form, get_method
from conmoe.report.bench import markdown
from conmoe.results import (
    BENCH_JSON,
    BENCH_MD,
    CLOSED_FORM,
    UNITS,
    WEIGHT_PRESERVING,
    Bench,
    CalibrationRecord,
    Domain,
    Measurement,
    Row,
    Run,
    load_bench,
    summarise,
)
from conmoe.source import Source, check_compressible, open_source
from conmoe.stream import Stream
from conmoe.types import ConmoeError, LayerPlan, Plan, UsageError

WORK = "work"


def bench(
    model: Path,
    out: Path,
    candidates: Sequence[Candidate],
    keeps: Sequence[str],
    texts: Sequence[TokenData],
    domains: Mapping[str, TokenData],
    progress: Progress,
    *,
    options: Calibration = Calibration(),
    command: str = "",
    force: bool = False,
) -> Bench:
    """Plan with every candidate at every budget after every calibration, and measure each result on every domain.

    Args:
        model: the source checkpoint; never written to.
        out: the folder of the table. Statistics and finished rows stay below it, in ``work``, for the next run.
        candidates: from :func:`conmoe.candidates.parse_candidates`.
        keeps: budgets, as ``--keep`` takes them.
        texts: calibration tokens, one for each seed from 0 on.
        domains: held-out tokens, by name.
        progress: where the stages report to.
        options: sample, device and dtype; the seed is that of each text.
        command: what was typed, for the record.
        force: replace a table that answers another question.

    Returns:
        the table, which is also in ``out`` as ``bench.json`` and ``bench.md``. A candidate that fails is a row that
        says why.

    Raises:
        UsageError: the model cannot be compressed, a budget is none, or ``out`` holds something else.
    """
    refuse_several("bench")
    source = open_source(
        model,
        dtype=options.dtype,
        experts_implementation=IMPLEMENTATION,
        trust_remote_code=options.trust_remote_code,
    )
    check_compressible(source)
    for keep in keeps:
        parse_keep(keep)
    for data in domains.values():
        check_vocabularies([source], data)
    manifests = [describe(source, data, replace(options, seed=seed)) for seed, data in enumerate(texts)]
    asked = [
        [manifest.fingerprint for manifest in manifests],
        [[name, data.fingerprint] for name, data in domains.items()],
        [[each.name, keep] for keep in keeps for each in candidates],
    ]
    key = fingerprint(asked)
    _claim(out, model, key, force)
    for seed, (data, manifest) in enumerate(zip(texts, manifests, strict=True)):
        _calibrate(model, _statistics(out, seed), data, manifest, replace(options, seed=seed), source, progress)
    job = _Job(model, source, out, domains, options, fingerprint([_code(), versions()]))
    rows = _rows(job, candidates, keeps, manifests, progress)
    first = manifests[0]
    table = Bench(
        key=key,
        command=command,
        versions=versions(),
        device=_device_name(options.device),
        threads=torch.get_num_threads(),
        dtype=first.dtype,
        model=model.name,
        model_fingerprint=first.model,
        family=first.family,
        layers=len(first.layers),
        experts=first.experts,
        top_k=first.top_k,
        source_bytes=job.source_bytes,
        source_parameters=sum(math.prod(entry.shape) for entry in source.entries.values()),
        calibrations=tuple(_calibration_record(manifest) for manifest in manifests),
        evaluation={name: _domain(data, texts, rows) for name, data in domains.items()},
        rows=tuple(rows),
    )
    write_atomic(out / BENCH_JSON, table.model_dump_json(indent=1) + "\n")
    write_atomic(out / BENCH_MD, markdown(table))
    return table


@dataclass(frozen=True, slots=True)
class _Job:
    """What all rows have in common."""

    model: Path
    source: Source
    out: Path
    domains: Mapping[str, TokenData]
    options: Calibration
    code: str  # fingerprint of what computes

    @property
    def source_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.source.entries.values())


def _claim(out: Path, model: Path, key: str, force: bool) -> None:
    """Make ``out`` the folder of this table, or refuse to."""
    refuse_overlap(out, model)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; conmoe bench writes a folder.")
    check_ours(out)
    if (out / BENCH_JSON).is_file() and not force and load_bench(out).key != key:
        raise UsageError(
            f"{out} holds the table of another bench; choose another name, or --force to replace it (finished rows "
            "are used again where they fit)."
        )
    (out / WORK / "rows").mkdir(parents=True, exist_ok=True)
    write_atomic(out / LABEL, key)


def _statistics(out: Path, seed: int) -> Path:
    return out / WORK / f"statistics-{seed}"


def _calibrate(
    model: Path,
    folder: Path,
    data: TokenData,
    manifest: Manifest,
    options: Calibration,
    source: Source,
    progress: Progress,
) -> None:
    if (folder / MANIFEST).is_file() and read_manifest(folder) == manifest:
        progress.note(f"Statistics in {folder} match; not calibrating again.")
        return
    work = data.tokens * source.config.num_hidden_layers
    with progress.stage(f"calibrate, seed {options.seed}", work, "tokens x layers") as advance:
        calibrate(model, folder, data, options, force=True, advance=advance)


def _rows(
    job: _Job,
    candidates: Sequence[Candidate],
    keeps: Sequence[str],
    manifests: Sequence[Manifest],
    progress: Progress,
) -> list[Row]:
    asked = [(keep, candidate) for keep in keeps for candidate in candidates]
    runs: dict[tuple[str, str], list[Run]] = {(keep, candidate.name): [] for keep, candidate in asked}
    errors: dict[tuple[str, str], str] = {}
    with ExitStack() as stack, progress.stage("measure", len(asked) * len(manifests), "results") as advance:
        passed = _once(lambda name: stack.enter_context(_through(job, name)))
        for seed, manifest in enumerate(manifests):
            for keep, candidate in asked:
                place = keep, candidate.name
                advance(0, doing=f"{candidate.name}, keep {keep}, seed {seed}")
                if place not in errors:
                    try:
                        runs[place].append(_run(job, candidate, keep, seed, manifest, passed))
                    except OSError:  # a full disk is no fault of the method
                        raise
                    except Exception as error:
                        known = isinstance(error, ConmoeError)
                        said = str(error) if known else f"{type(error).__name__}: {first_line(error)}."
                        errors[place] = f"Calibration seed {seed}: {said}" if seed else said
                        progress.note(f"{candidate.name} failed at keep {keep}: {errors[place]}")
                        if not known:
                            write_atomic(job.out / WORK / f"{fingerprint(place)[:16]}.txt", traceback.format_exc())
                advance(1)
    return [_row(job, candidate, keep, runs[keep, candidate.name], errors) for keep, candidate in asked]


def _row(job: _Job, candidate: Candidate, keep: str, runs: Sequence[Run], errors: Mapping[tuple[str, str], str]) -> Row:
    method, error = candidate.request.method, errors.get((keep, candidate.name))
    if error is not None:
        return Row(name=candidate.name, method=method, keep=keep, error=error, runs=tuple(runs))
    keys = {name: data.fingerprint for name, data in job.domains.items()}
    return summarise(candidate.name, method, keep, runs, keys, job.source_bytes)


def _run(
    job: _Job, candidate: Candidate, keep: str, seed: int, manifest: Manifest, passed: Callable[[str], Stream]
) -> Run:
    """Plan and measure, or what an earlier run has stored of it."""
    request = candidate.at(keep, seed, job.options)
    key = fingerprint([job.code, _source_code(request.method), manifest.fingerprint, asdict(request)])
    file = job.out / WORK / "rows" / f"{key}.json"
    known = Run.model_validate_json(file.read_bytes()) if file.is_file() else None
    measured = dict(known.domains) if known else {}
    missing = {name: data for name, data in job.domains.items() if data.fingerprint not in measured}
    if known and not missing:
        return known
    began = perf_counter()
    made = plan(job.model, _statistics(job.out, seed), None, request)
    seconds = perf_counter() - began
    form: Form = request.form or made.default_form  # type: ignore[assignment]
    result = preview(
        job.source,
        made,
        form,
        dtype=job.options.dtype,
        experts_implementation=IMPLEMENTATION,
        trust_remote_code=job.options.trust_remote_code,
    )
    try:
        for name, data in missing.items():
            found = measure(result, data, passed(name), device=job.options.device)
            measured[data.fingerprint] = _measurement(found)
    finally:
        forget_prototypes()
    run = Run(
        seed=seed,
        options=dict(made.options),
        group=group(made),
        form=form,
        approximate=is_approximate(made, form),
        bytes=found.bytes,
        parameters=found.parameters,
        plan_seconds=seconds,
        predicted_error=_predicted_error(made),
        prototypes=tuple(scope.prototypes for scope in plan_record(made).scopes),
        protected=dict(made.protected),
        statistics=made.statistics,
        domains=measured,
    )
    write_atomic(file, run.model_dump_json(indent=1) + "\n")
    return run


def _through(job: _Job, name: str) -> Any:
    return run_through(job.source, job.domains[name], job.options.device)


def _once(make: Callable[[str], Stream]) -> Callable[[str], Stream]:
    """``make``, whose answers are kept: the text runs through the source when the first result asks for it."""
    known: dict[str, Stream] = {}

    def get(name: str) -> Stream:
        if name not in known:
            known[name] = make(name)
        return known[name]

    return get


def group(made: Plan) -> str:
    """What a plan stores: copies of the source's experts and a map alone, or something computed."""
    return WEIGHT_PRESERVING if all(_copies(scope.plan) for scope in made.scopes) else CLOSED_FORM


def _copies(layer: LayerPlan) -> bool:
    new = layer.constant_CD is not None or layer.static_K is not None or bool((layer.gain_E != 1).any())
    return not new and None not in kept_experts(layer)


def _measurement(found: Fidelity) -> Measurement:
    numbers: dict[str, tuple[float, float | None]] = {}
    for name in UNITS:
        number = getattr(found, name)
        assert isinstance(number, Measured)
        if not math.isfinite(number.value):
            raise ConmoeError(f"Its {name} is {number.value}: the result's outputs are not finite.")
        numbers[name] = number.value, None if math.isnan(number.stderr) else number.stderr
    assert found.source_loss is not None
    return Measurement(
        numbers=numbers, source_loss=found.source_loss.value, sequences=found.sequences, tokens=found.tokens
    )


def _predicted_error(made: Plan) -> float | None:
    errors = [scope.plan.predicted_error for scope in made.scopes]
    mean = math.fsum(errors) / len(errors)
    return mean if math.isfinite(mean) else None


def _domain(data: TokenData, texts: Sequence[TokenData], rows: Sequence[Row]) -> Domain:
    measured = (run.domains.get(data.fingerprint) for row in rows for run in row.runs)
    loss = next((found.source_loss for found in measured if found), None)
    return Domain(
        data=tuple(part.source for part in data.sources),
        fingerprint=data.fingerprint,
        tokens=data.tokens,
        sequences=data.ids_NS.shape[0],
        seq_len=data.ids_NS.shape[1],
        overlap=max(overlap(data.documents, text.documents) for text in texts),
        source_loss=loss,
        source_perplexity=None if loss is None else math.exp(loss),
    )


def _calibration_record(manifest: Manifest) -> CalibrationRecord:
    return CalibrationRecord(
        seed=manifest.seed,
        tokens=manifest.tokens,
        sample=manifest.sample,
        data=manifest.data,
        data_fingerprint=manifest.data_fingerprint,
        statistics=manifest.fingerprint,
    )


def versions() -> dict[str, str]:
    """What the numbers may depend on beside the code of this package."""
    return {
        "conmoe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _code() -> str:
    """A fingerprint of this package but for its command line: a row of other code is measured again."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in _files())).hexdigest()


def _files() -> Iterator[Path]:
    root = Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).parts[0] != "cli":
            yield file


def _source_code(method: str) -> str:
    """The file of a method, which may come from another package."""
    with suppress(OSError, TypeError):
        return inspect.getsource(inspect.getmodule(get_method(method).function))  # type: ignore[arg-type]
    return ""
