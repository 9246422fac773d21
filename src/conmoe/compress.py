"""The chain: calibrate, plan, apply, verify, evaluate. What is already there and matches is not made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from conmoe.apply import PLAN_FOLDER, Applied, applying
from conmoe.artifacts import (
    MANIFEST,
    Manifest,
    check_free,
    fingerprint,
    plan_record,
    read_manifest,
    read_plan,
    read_text,
    refuse_overlap,
    spoil,
    write_atomic,
    write_json,
)
from conmoe.calibrate import Calibration, calibrate, describe
from conmoe.data import TokenData, overlap
from conmoe.diagnosis import Advice
from conmoe.doctor import first_look
from conmoe.evaluate import Fidelity, evaluate
from conmoe.fit import fitted
from conmoe.folding import check_foldable
from conmoe.forms import is_approximate
from conmoe.keeping import check_keeps
from conmoe.manifest import reseal
from conmoe.mtp import Policy, settle
from conmoe.parallel import refuse_several
from conmoe.plan import plan
from conmoe.portrait import REPORT_JSON, Lost, portray
from conmoe.preflight import Serve, case_of_request, look, refuse
from conmoe.progress import SILENT
from conmoe.progress import Progress as Progress
from conmoe.registry import Form
from conmoe.report.origin import origin
from conmoe.report.sections import write_card
from conmoe.report.write import REPORT_HTML, write_default
from conmoe.request import Request, check_request
from conmoe.source import check_compressible, open_source
from conmoe.trial import versions
from conmoe.types import ConmoeError, Plan, UsageError
from conmoe.verify import verify

RESULTS = "results.json"
PLAN_KEY = "plan.key"


@dataclass(frozen=True, slots=True)
class Result:
    """What a compression made and what it cost."""

    applied: Applied
    plan: Plan
    manifest: Manifest
    fidelity: Fidelity | None
    approximate: bool
    warnings: tuple[Advice, ...] = ()  # of the doctor, at first look
    held_out: tuple[str, ...] = ()  # texts that the fidelity was measured on
    command: str = ""  # what was typed
    device: str = "cpu"
    overlap: float | None = None  # share of the held-out documents that were calibrated on

    def as_json(self) -> dict[str, Any]:
        record = plan_record(self.plan).model_dump(mode="json")
        return {
            "output": str(self.applied.folder),
            "form": self.applied.form,
            "approximate": self.approximate,
            "bytes": self.applied.bytes,
            "source_bytes": self.applied.source_bytes,
            "method": self.plan.method,
            "keep": self.plan.keep,
            "budget": self.plan.budget,
            "budget_options": record["budget_options"],
            "options": record["options"],
            "refine": self.plan.refine,
            "refine_options": record["refine_options"],
            "sequential": record["sequential"],
            "protected": record["protected"],
            "predicted_error": {str(scope["layers"][0]): scope["predicted_error"] for scope in record["scopes"]},
            "calibration": self.manifest.model_dump(mode="json", exclude={"documents"}),
            "held_out": list(self.held_out),
            "overlap": self.overlap,
            "fidelity": self.fidelity.as_json() if self.fidelity else None,
            "warnings": [advice.model_dump(mode="json") for advice in self.warnings],
            "calibration_documents": list(self.manifest.documents),
            "dropped_tensors": list(self.applied.dropped),
            "mtp": self.applied.heads.as_json(),
            "version": self.plan.version,
            "versions": versions(),
            "statistics": self.plan.statistics,
            "device": self.device,
            "command": self.command,
        }


def compress(
    model: Path,
    out: Path,
    work: Path,
    data: TokenData,
    request: Request,
    progress: Progress,
    *,
    calibration: Calibration = Calibration(),
    form: Form | None = None,
    held_out: TokenData | None = None,
    verified: bool = True,
    report: bool = True,
    command: str = "",
    force: bool = False,
    mtp: Policy = "auto",
) -> Result:
    """Make a smaller checkpoint and measure what it cost.

    Args:
        model: the source checkpoint; never written to.
        out: the folder of the result.
        work: keeps statistics and plan; a later run with the same inputs takes them from there.
        data: calibration tokens.
        request: method, budget and options of the plan.
        progress: where the stages report to.
        calibration: sample size, seed, device, dtype.
        form: how to store the result; by default what suits the method.
        held_out: tokens to measure fidelity on; None to measure nothing.
        verified: load the result and compare it with the plan.
        report: keep what a report needs beside the result, and write it if ``conmoe[report]`` is installed.
        command: what was typed, for the record.
        force: replace ``out`` if it exists.
        mtp: what becomes of heads that predict further tokens: :mod:`conmoe.mtp`.
    """
    refuse_several("compress")
    trust = calibration.trust_remote_code
    request = replace(request, form=form, device=calibration.device, trust_remote_code=trust)
    check(model, out, request, force=force, mtp=mtp)
    source = open_source(model, dtype=calibration.dtype, trust_remote_code=trust)
    request = fitted(source, request, progress, mtp)
    depth, tokens = source.config.num_hidden_layers, data.tokens
    refuse_overlap(work, model)
    if work.resolve() == out.resolve():
        raise UsageError(f"{work} cannot be both the working folder and the output.")
    work.mkdir(parents=True, exist_ok=True)

    statistics = work / "statistics"
    manifest = describe(source, data, calibration)
    if (statistics / MANIFEST).is_file() and read_manifest(statistics) == manifest:
        progress.note(f"Statistics in {statistics} match; not calibrating again.")
    else:
        with progress.stage("calibrate", tokens * depth, "tokens x layers") as advance:
            calibrate(model, statistics, data, calibration, force=True, advance=advance)

    asked = fingerprint([manifest.fingerprint, asdict(request)])
    if read_text(work / PLAN_KEY) == asked:
        progress.note(f"The plan in {work / 'plan'} matches; not planning again.")
        made = read_plan(work / "plan")
    else:
        made = plan(model, statistics, work / "plan", request, force=True, progress=progress)
        write_atomic(work / PLAN_KEY, asked)

    with ExitStack() as until_named:  # a result has its name only when it is verified and measured
        with progress.stage("apply", 0, "bytes") as advance:
            applied = until_named.enter_context(
                applying(model, made, out, form=form, force=force, trust_remote_code=trust, mtp=mtp, advance=advance)
            )
        if verified:
            with progress.stage("verify", applied.bytes, "bytes") as advance, _spoiled_by_error(applied.folder):
                verify(applied.folder, model, made, applied.form, trust_remote_code=trust, mtp=mtp, advance=advance)
        fidelity = lost = None
        if held_out is not None:
            lost = Lost(held_out, model, trust_remote_code=trust) if report else None
            with progress.stage("evaluate", 2 * held_out.tokens * depth, "tokens x layers") as advance:
                fidelity = evaluate(
                    applied.folder,
                    held_out,
                    against=model,
                    device=calibration.device,
                    dtype=calibration.dtype,
                    trust_remote_code=trust,
                    advance=advance,
                    watch=lost,
                )
        warnings = first_look(source, statistics, made)
        texts = tuple(part.source for part in held_out.sources) if held_out is not None else ()
        approximate = is_approximate(made, applied.form)
        result = Result(
            replace(applied, folder=out),
            made,
            manifest,
            fidelity,
            approximate,
            warnings,
            texts,
            command,
            calibration.device,
            overlap(held_out.documents, manifest.documents) if held_out is not None else None,
        )
        write_json(applied.folder / PLAN_FOLDER / RESULTS, result.as_json())
        write_card(applied.folder, f"{origin(source.folder).short}-conmoe")
        if report:
            with progress.stage("report", sum(len(scope.layers) for scope in made.scopes), "layers") as advance:
                seen = portray(
                    source, statistics, made, lost=lost, command=command, device=calibration.device, advance=advance
                )
            write_atomic(applied.folder / PLAN_FOLDER / REPORT_JSON, seen.model_dump_json() + "\n")
    if report:
        page = out / PLAN_FOLDER / REPORT_HTML
        write_default(out, page, out.name, progress)
        reseal(out, [page.relative_to(out).as_posix()] if page.is_file() else [])
    return result


@contextmanager
def _spoiled_by_error(partial: Path) -> Iterator[None]:
    try:
        yield
    except ConmoeError:
        spoil(partial)
        raise


def clear_work(work: Path) -> None:
    """Remove what :func:`compress` put there, and the folder if nothing else is in it."""
    for name in ("statistics", "plan"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / PLAN_KEY).unlink(missing_ok=True)
    with suppress(OSError):
        work.rmdir()


def check(
    model: Path,
    out: Path,
    request: Request,
    *,
    force: bool = False,
    serve: Serve | None = None,
    mtp: Policy = "auto",
) -> tuple[str, ...]:
    """Everything that can be refused before text is read: the model, the request, the output, the engine.

    Returns:
        What there is to say of the engine that is to serve the result, where that is no refusal.
    """
    source = open_source(model, trust_remote_code=request.trust_remote_code)
    check_compressible(source)
    asked = check_request(source.layers, fitted(source, request, SILENT, mtp))
    check_keeps(source, asked, request)
    if asked.method.condenses and asked.form == "sliced":
        check_foldable(source)
    case = case_of_request(source, asked, serve)
    if not case.uneven:
        settle(source, case.K, mtp, whole=asked.form == "expanded")
    refuse_overlap(out, model)
    check_free(out, force=force)
    if serve is None:
        return ()
    serving = look(case, serve.engine)
    refuse(serving)
    return serving.warnings


def calibration_documents(result: Path) -> tuple[str, ...]:
    """Short hashes of the texts that a model was calibrated on; none where it does not say so."""
    file = result / PLAN_FOLDER / RESULTS
    return tuple(json.loads(file.read_text())["calibration_documents"]) if file.is_file() else ()
