"""One result of a bench: planned, opened without being written, measured, and kept in a file of its own."""

from __future__ import annotations

import hashlib
import inspect
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from time import perf_counter

import torch
import transformers

from conmoe import __version__
from conmoe.artifacts import Manifest, fingerprint, kept_experts, plan_record, remove, write_atomic
from conmoe.calibrate import Calibration
from conmoe.candidates import Candidate
from conmoe.data import TokenData
from conmoe.evaluate import Fidelity, Measured
from conmoe.evaluate.fidelity import measure, run_through
from conmoe.forms import is_approximate
from conmoe.observe import IMPLEMENTATION
from conmoe.outputs import forget_prototypes
from conmoe.plan import plan
from conmoe.preview import preview
from conmoe.registry import Form, get_method
from conmoe.request import Request
from conmoe.results import CLOSED_FORM, RECONSTRUCTION, UNITS, WEIGHT_PRESERVING, Measurement, Run
from conmoe.source import Source
from conmoe.stream import Stream
from conmoe.types import ConmoeError, LayerPlan, Plan

WORK = "work"

#: Gives the source after a domain's text has run through it.
Passed = Callable[[str], Stream]


@dataclass(frozen=True, slots=True)
class Job:
    """What all results of a bench have in common."""

    model: Path
    source: Source
    out: Path
    domains: Mapping[str, TokenData]
    options: Calibration

    @property
    def source_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.source.entries.values())


def statistics_folder(out: Path, seed: int) -> Path:
    """Where a bench keeps the statistics of one calibration."""
    return out / WORK / f"statistics-{seed}"


@contextmanager
def run_once(job: Job) -> Iterator[Passed]:
    """The text of a domain runs through the source when the first result asks for it, and not again."""
    known: dict[str, Stream] = {}
    with ExitStack() as stack:

        def passed(name: str) -> Stream:
            if name not in known:
                known[name] = stack.enter_context(run_through(job.source, job.domains[name], job.options.device))
            return known[name]

        yield passed


def run_trial(job: Job, candidate: Candidate, keep: str, manifest: Manifest, passed: Passed) -> Run:
    """Plan and measure one candidate at one budget after one calibration, or read what an earlier run kept of it."""
    request = candidate.at(keep, manifest.seed, job.options)
    file = job.out / WORK / "rows" / f"{_key(request, manifest)}.json"
    kept = Run.model_validate_json(file.read_bytes()) if file.is_file() else None
    measured = dict(kept.domains) if kept else {}
    wanted = {data.fingerprint: name for name, data in job.domains.items()}
    missing = [name for key, name in wanted.items() if key not in measured]
    if kept is None or missing:
        work = job.out / WORK / "plan"  # new weights lie there and not in memory, and a killed search goes on
        began = perf_counter()
        made = plan(job.model, statistics_folder(job.out, manifest.seed), work, request, force=True)
        seconds = perf_counter() - began
        form: Form = request.form or made.default_form  # type: ignore[assignment]
        found = _measure(job, made, form, missing, passed)
        measured |= {job.domains[name].fingerprint: _measurement(fidelity) for name, fidelity in found.items()}
        kept = _run(made, form, manifest.seed, seconds, found[missing[0]], measured)
        write_atomic(file, kept.model_dump_json(indent=1) + "\n")
        remove(work)
    return kept.model_copy(update={"domains": {key: kept.domains[key] for key in wanted}})


def _measure(job: Job, made: Plan, form: Form, names: Sequence[str], passed: Passed) -> dict[str, Fidelity]:
    result = preview(
        job.source,
        made,
        form,
        dtype=job.options.dtype,
        experts_implementation=IMPLEMENTATION,
        trust_remote_code=job.options.trust_remote_code,
    )
    try:
        return {name: measure(result, job.domains[name], passed(name), device=job.options.device) for name in names}
    finally:
        forget_prototypes()


def _run(made: Plan, form: Form, seed: int, seconds: float, found: Fidelity, measured: dict[str, Measurement]) -> Run:
    return Run(
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


def group(made: Plan) -> str:
    """What a plan stores: copies of the source's experts and a map alone, or something solved for or fitted."""
    if all(_copies(scope.plan) for scope in made.scopes):
        return WEIGHT_PRESERVING
    return RECONSTRUCTION if made.refine == "reconstruct" else CLOSED_FORM


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


def versions() -> dict[str, str]:
    """What the numbers may depend on beside the code of this package."""
    return {
        "conmoe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _key(request: Request, manifest: Manifest) -> str:
    """What a result depends on, but for the text it is measured on; a change of the code counts."""
    method = get_method(request.method).function
    return fingerprint([_code(), _source_code(method), versions(), manifest.fingerprint, asdict(request)])


@cache
def _code() -> str:
    """A fingerprint of this package but for its command line, as it was when the process began to use it."""
    root = Path(__file__).parent
    files = (file for file in sorted(root.rglob("*.py")) if file.relative_to(root).parts[0] != "cli")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _source_code(function: Callable[..., object]) -> str:
    """The file of a method, which may come from another package."""
    with suppress(OSError, TypeError):
        return inspect.getsource(inspect.getmodule(function))  # type: ignore[arg-type]
    return ""
