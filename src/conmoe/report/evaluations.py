"""Evaluations of results: what ``conmoe evaluate --output`` wrote, beside the result that it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conmoe.manifest import weights_fingerprint
from conmoe.report.measured import compared
from conmoe.report.runs import Run, TaskRow, figure, figures, text_labels


def with_evaluation(runs: Sequence[Run], file: Path, label: str, record: Mapping[str, Any]) -> list[Run]:
    """Runs with what an evaluation adds to the result that it measured; with one more for what has no place there.

    What has a name that is taken gets the ``label`` of its file.
    """
    parts: dict[str, Any] = {name: compared(record[name]) for name in ("generation", "speed") if record.get(name)}
    if record.get("tasks"):
        parts = {"tasks": _tasks(record["tasks"]), **parts}
    domains = {name: figures(each) for name, each in (record.get("domains") or {}).items()}
    alone = Run(
        name=Path(record["model"]).name,
        bytes=record.get("bytes"),
        source_bytes=record.get("source_bytes"),
        numbers=figures(record),
        texts=text_labels(record.get("data")) if "loss" in record else (),
        domains=domains,
        parts=parts,
        facts=_evaluation_facts(record),
    )
    known = next((run for run in runs if _is_of(record, file, run)), None)
    if known is None:
        return [*runs, alone]
    changed = replace(known, parts=_joined(known.parts, parts, label), domains=_joined(known.domains, domains, label))
    if alone.numbers and not known.numbers:
        # What was measured later is all that is known of it.
        facts = tuple(fact for fact in known.facts if fact[0] not in dict(alone.facts))
        changed = replace(changed, numbers=alone.numbers, texts=alone.texts, facts=facts + alone.facts)
    found = [changed if run is known else run for run in runs]
    if alone.numbers and known.numbers:
        row = replace(alone, form=known.form, method=known.method, keep=known.keep, calibrated=known.calibrated)
        found.append(replace(row, name=f"{known.name} ({label})", parts={}, domains={}))
    return found


def _is_of(record: Mapping[str, Any], file: Path, run: Run) -> bool:
    """Whether an evaluation is about a result: by the fingerprint of its weights where they are, or by its folder."""
    if run.folder is None:
        return False
    if record.get("fingerprint") and (own := weights_fingerprint(run.folder)):
        return bool(record["fingerprint"] == own)
    # A path of the command line was relative to where that was typed: here, where the file lies, or above that.
    return run.folder in ((base / record["model"]).resolve() for base in (Path(), *file.resolve().parents))


def _joined(old: Mapping[str, Any], new: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Both, tasks in one; what has a name that is taken gets a ``label``."""
    found = dict(old)
    for name, value in new.items():
        if name == "tasks":
            rows = found.get(name, ())
            taken = {row.task for row in rows}
            more = (replace(row, task=f"{row.task} ({label})") if row.task in taken else row for row in value)
            found[name] = (*rows, *more)
        else:
            found[name if name not in found else f"{name} ({label})"] = value
    return found


def _evaluation_facts(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    counted = f"{record['tokens']:,} in {record['sequences']:,} sequences" if "tokens" in record else ""
    rows = [
        ("measured on", "; ".join(record.get("data", ()))),
        ("held-out tokens", counted),
        ("compared with", str(record.get("against") or "nothing")),
    ]
    return tuple((name, value) for name, value in rows if value)


def _tasks(tasks: Mapping[str, Any]) -> tuple[TaskRow, ...]:
    """Every metric of every task that has a number."""
    return tuple(
        TaskRow(task, metric, own, figure(each.get("source")), figure(each.get("difference")), str(each.get("n", "")))
        for task, metrics in tasks.items()
        for metric, each in metrics.items()
        if isinstance(each, dict) and (own := figure(each)) is not None
    )
