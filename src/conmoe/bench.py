"""Every method, from the same statistics, at several budgets, on several domains: one table of what each one costs.

The text runs through the source once for each domain, and every result is opened without being written. What a row
needs is one file for each calibration seed, written as it ends: a killed run goes on, and a method or a domain that is
added later costs only itself.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from conmoe.allocate import parse_keep
from conmoe.artifacts import (
    LABEL,
    MANIFEST,
    Manifest,
    check_ours,
    fingerprint,
    read_manifest,
    refuse_overlap,
    write_atomic,
)
from conmoe.calibrate import Calibration, calibrate, describe
from conmoe.candidates import Candidate
from conmoe.data import TokenData, overlap
from conmoe.documents import first_line
from conmoe.evaluate.fidelity import check_vocabularies
from conmoe.observe import IMPLEMENTATION
from conmoe.parallel import refuse_several
from conmoe.progress import SILENT, Progress
from conmoe.report.bench import markdown
from conmoe.report.write import REPORT_HTML, write_default
from conmoe.results import BENCH_JSON, BENCH_MD, Bench, CalibrationRecord, Domain, Row, Run, load_bench, summarise
from conmoe.source import Source, check_compressible, open_source
from conmoe.trial import WORK, Job, Passed, run_once, run_trial, statistics_folder, versions
from conmoe.types import ConmoeError, UsageError

#: A keep and the name of a candidate.
Place = tuple[str, str]


def bench(
    model: Path,
    out: Path,
    candidates: Sequence[Candidate],
    keeps: Sequence[str],
    texts: Sequence[TokenData],
    domains: Mapping[str, TokenData],
    progress: Progress = SILENT,
    *,
    options: Calibration = Calibration(),
    command: str = "",
    report: bool = True,
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
        report: also draw it, if ``conmoe[report]`` is installed.
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
        _calibrate(model, statistics_folder(out, seed), data, manifest, replace(options, seed=seed), source, progress)
    job = Job(model, source, out, domains, options)
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
        source_parameters=sum(math.prod(entry.shape) for entry in source.tensors),
        calibrations=tuple(_calibration_record(manifest) for manifest in manifests),
        evaluation={name: _domain(data, texts, rows) for name, data in domains.items()},
        rows=tuple(rows),
    )
    write_atomic(out / BENCH_JSON, table.model_dump_json(indent=1) + "\n")
    write_atomic(out / BENCH_MD, markdown(table))
    if report:
        write_default(out, out / REPORT_HTML, f"Bench of {model.name}", progress)
    return table


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
    job: Job, candidates: Sequence[Candidate], keeps: Sequence[str], manifests: Sequence[Manifest], progress: Progress
) -> list[Row]:
    asked = [(keep, candidate) for keep in keeps for candidate in candidates]
    runs: dict[Place, list[Run]] = {(keep, candidate.name): [] for keep, candidate in asked}
    errors: dict[Place, str] = {}
    with run_once(job) as passed, progress.stage("measure", len(asked) * len(manifests), "results") as advance:
        for manifest in manifests:
            for keep, candidate in asked:
                place = keep, candidate.name
                advance(0, doing=f"{candidate.name}, keep {keep}, seed {manifest.seed}")
                if place not in errors:
                    found = _try(job, candidate, keep, manifest, passed)
                    if isinstance(found, Run):
                        runs[place].append(found)
                    else:
                        errors[place] = f"Calibration seed {manifest.seed}: {found}" if manifest.seed else found
                        progress.note(f"{candidate.name} failed at keep {keep}: {errors[place]}")
                advance(1)
    return [_row(job, candidate, keep, runs[keep, candidate.name], errors) for keep, candidate in asked]


def _try(job: Job, candidate: Candidate, keep: str, manifest: Manifest, passed: Passed) -> Run | str:
    """The result, or the sentence that says why there is none."""
    try:
        return run_trial(job, candidate, keep, manifest, passed)
    except ConmoeError as error:
        return str(error)
    except OSError:  # a full disk is no fault of the method
        raise
    except Exception as error:
        file = job.out / WORK / f"failure-{fingerprint([keep, candidate.name])[:12]}.txt"
        write_atomic(file, f"{candidate.name}, keep {keep}\n{traceback.format_exc()}")
        return f"{type(error).__name__}: {first_line(error)} (the traceback is in {WORK}/{file.name})."


def _row(job: Job, candidate: Candidate, keep: str, runs: Sequence[Run], errors: Mapping[Place, str]) -> Row:
    method, error = candidate.request.method, errors.get((keep, candidate.name))
    if error is not None:
        return Row(name=candidate.name, method=method, keep=keep, error=error, runs=tuple(runs))
    keys = {name: data.fingerprint for name, data in job.domains.items()}
    return summarise(candidate.name, method, keep, runs, keys, job.source_bytes)


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


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
