"""What a report shows, read from the files of results: runs, with every number and its standard error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import ValidationError

from conmoe.diagnosis import Diagnosis
from conmoe.portrait import REPORT_JSON, load_portrait
from conmoe.report.bench import facts as bench_facts
from conmoe.report.evaluations import with_evaluation
from conmoe.report.measured import Figure
from conmoe.report.runs import MEASURED, Run, figures, text_labels
from conmoe.report.sections import KEYS
from conmoe.results import BENCH_JSON, Bench, Number, Row, load_bench
from conmoe.types import ConmoeError, UsageError

#: Where a result keeps what was measured, and a demo all of its results.
RESULT, DEMO = Path("conmoe", "results.json"), "results.json"


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that was given, in its order."""

    runs: tuple[Run, ...]
    benches: tuple[tuple[str, tuple[str, ...]], ...] = ()  # name and facts
    diagnoses: tuple[Diagnosis, ...] = ()


def gather(paths: Sequence[Path]) -> Findings:
    """Read results, benches, evaluations and what the doctor said.

    Args:
        paths: folders of ``conmoe compress``, ``conmoe bench`` or ``conmoe demo``; files that ``conmoe evaluate
            --output`` or ``conmoe doctor --json`` wrote. An evaluation of a result that is given too adds to it.

    Raises:
        UsageError: a path does not exist, or is none of these.
        ConmoeError: a file is damaged.
    """
    runs: list[Run] = []
    benches: list[tuple[str, tuple[str, ...]]] = []
    diagnoses: list[Diagnosis] = []
    evaluations: list[tuple[Path, dict[str, Any]]] = []
    for path in map(_folder, paths):
        record = _record(path)
        with _damaged(path):
            if "calibrations" in record:
                bench = load_bench(path)
                runs += bench_runs(bench)
                benches.append((bench.model, _plain(bench_facts(bench))))
            elif "methods" in record:
                runs += _demo_runs(path, record)
            elif "uses" in record:
                diagnoses.append(Diagnosis.model_validate(record))
            elif path.is_dir():
                runs.append(_result(path, record))
            elif any(key in record for key in KEYS):
                evaluations.append((path, record))
            else:
                raise UsageError(f"{path} is not a result, a bench, an evaluation or a diagnosis of conmoe.")
    stems = Counter(path.stem for path, _ in evaluations)
    for path, record in evaluations:
        with _damaged(path):
            runs = with_evaluation(runs, path, path.stem if stems[path.stem] == 1 else str(path), record)
    return Findings(tuple(runs), tuple(benches), tuple(diagnoses))


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Whatever is not as it should be in a file of somebody's becomes one sentence."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
        raise ConmoeError(f"{path} is damaged or of another version: {what}.") from error


def _folder(path: Path) -> Path:
    """The folder of a result, where its record or the folder of that was named."""
    if path.is_file() and path.name == RESULT.name and path.parent.name == RESULT.parent.name:
        return path.parent.parent
    return path.parent if path.is_dir() and path.name == RESULT.parent.name and (path / RESULT.name).is_file() else path


def _plain(markdown: str) -> tuple[str, ...]:
    """The lines of a list in Markdown, as plain text."""
    return tuple(line.removeprefix("- ").replace("`", "") for line in markdown.splitlines())


def bench_runs(bench: Bench) -> list[Run]:
    """The rows of a bench; their numbers are means over its domains."""
    found = []
    for row in bench.rows:
        domains = {
            name: {key: Figure(each.value, _error(each)) for key, each in numbers.items() if key in MEASURED}
            for name, numbers in row.domains.items()
        }
        keys = [domain.fingerprint for domain in bench.evaluation.values()]
        run = Run(
            name=row.name,
            form=f"{row.form}, approximate" if row.approximate else row.form or "",
            method=row.method,
            keep=row.keep,
            group=row.group or "",
            bytes=row.bytes,
            source_bytes=bench.source_bytes,
            numbers={name: _over_domains(row, keys, name) for name in MEASURED} if row.runs and not row.error else {},
            domains=domains,
            texts=tuple(bench.evaluation),
            error=row.error or "",
        )
        found.append(run)
    return found


def _error(number: Number) -> float | None:
    """Over calibration seeds; over sequences where all seeds gave the same, as for methods that read weights alone."""
    return number.stderr or number.stderr_sequences


def _over_domains(row: Row, keys: Sequence[str], name: str) -> Figure:
    """The mean over domains of each seed, then over seeds: the domains of one seed share its plan."""
    means = [fmean(run.domains[key].numbers[name][0] for key in keys) for run in row.runs]
    if len(set(means)) > 1:
        return Figure(fmean(means), stdev(means) / len(means) ** 0.5)
    errors = [run.domains[key].numbers[name][1] for run in row.runs[:1] for key in keys]
    known = [error for error in errors if error is not None]
    within = sum(error**2 for error in known) ** 0.5 / len(errors) if known and len(known) == len(errors) else None
    return Figure(fmean(means), within)


def _record(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UsageError(f"{path} does not exist; give folders or JSON files that conmoe wrote.")
    names = (RESULT, BENCH_JSON, DEMO)
    file = next((path / name for name in names if (path / name).is_file()), None) if path.is_dir() else path
    if file is None:
        raise UsageError(f"{path} holds no results of conmoe; give the folder of a compress, a bench or a demo.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConmoeError(f"{file} is not a whole JSON file: {error}.") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} is not a result, a bench, an evaluation or a diagnosis of conmoe.")
    return found


def _result(folder: Path, record: Mapping[str, Any]) -> Run:
    tuned, fidelity = _tuned(folder), record.get("fidelity")
    fidelity = tuned["after"] if tuned else fidelity
    return Run(
        name=folder.name,
        form=f"{record['form']}, approximate" if record["approximate"] else record["form"],
        method=record["method"],
        keep=str(record["keep"]),
        bytes=float(record["bytes"]),
        source_bytes=float(record["source_bytes"]),
        numbers=figures(fidelity or {}),
        texts=_own_texts(record, tuned) if fidelity else (),
        calibrated=text_labels(record["calibration"]["data"]),
        facts=_facts(record, record["calibration"], fidelity, tuned),
        warnings=tuple(str(each["text"]) for each in record.get("warnings", ())),
        portrait=load_portrait(folder / RESULT.parent / REPORT_JSON),
        folder=folder.resolve(),
    )


def _own_texts(record: Mapping[str, Any], tuned: Mapping[str, Any] | None) -> tuple[str, ...]:
    given = (tuned.get("held_out") or {}).get("sources") if tuned else record.get("held_out")
    return text_labels(given)


def _tuned(folder: Path) -> dict[str, Any] | None:
    """What a tuning says of itself, if there was one: what the compression measured is not the result's then."""
    file = folder / RESULT.parent / "tuning.json"
    found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found


def _facts(
    record: Mapping[str, Any], calibration: Mapping[str, Any], fidelity: Any, tuned: Any
) -> tuple[tuple[str, str], ...]:
    def options(name: str) -> str:
        return ", ".join(f"{key}={value}" for key, value in (record.get(name) or {}).items())

    refined = " ".join(filter(None, (str(record.get("refine", "none")), f"({options('refine_options')})")))
    sequential = record.get("sequential")
    rows = [
        ("command", record.get("command", "")),
        ("method", f"{record['method']} {options('options')}".strip()),
        ("keep, budget", f"{record['keep']}, {record['budget']} {options('budget_options')}".strip()),
        ("refinement", refined.replace(" ()", "")),
        ("sequential", f"on {sequential:,} tokens behind compressed layers" if sequential else "no"),
        ("calibrated on", "; ".join(calibration["data"])),
        (
            "tokens",
            f"{calibration['tokens']:,} in sequences of {calibration['seq_len']:,}, sample {calibration['sample']:,}, "
            f"seed {calibration['seed']}, in {calibration['dtype']}",
        ),
        ("measured on", "; ".join(record.get("held_out", ())) if fidelity else "nothing"),
        ("held-out tokens", f"{fidelity['tokens']:,} in {fidelity['sequences']:,} sequences" if fidelity else "0"),
        ("versions", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())),
        ("tuned", f"{tuned['mode']}, {tuned['steps']:,} steps" if tuned else ""),
        ("device", record.get("device", "")),
        ("source fingerprint", calibration["model"]),
        ("statistics fingerprint", record.get("statistics", "")),
        ("text fingerprint", calibration["data_fingerprint"]),
    ]
    return tuple((name, str(value)) for name, value in rows if value)


def _demo_runs(folder: Path, record: Mapping[str, Any]) -> list[Run]:
    found = []
    for name, each in record["methods"].items():
        sizes = {"bytes": each["bytes"], "source_bytes": each.get("source_bytes")}
        portrait = load_portrait(folder / name / RESULT.parent / REPORT_JSON)
        found.append(
            Run(
                name=name,
                form=each["form"],
                keep=str(record["keep"]),
                numbers=figures(each),
                texts=("built-in text",),
                portrait=portrait,
                folder=(folder / name).resolve(),
                facts=(("held-out tokens", f"{each['tokens']:,} in {each['sequences']:,} sequences"),),
                **sizes,
            )
        )
    return found
