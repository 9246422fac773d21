"""What a card says was measured: the tables, and the same numbers as ``EvalResult`` for the hub.

Numbers come from ``results.json`` and from files of ``conmoe evaluate --output``. Keys that are not there are not
spoken of; what was measured and is no finite number is called so in tables, and is not told to the hub.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from conmoe.report.escape import escaped, one_line
from conmoe.report.numbers import size, with_error

HUB = "hub:"
#: The numbers of a fidelity: key, name, identifier of the metric, unit.
METRICS = (
    ("kl", "KL(source || model)", "kl_divergence", "nats per token"),
    ("top1_agreement", "top-1 agreement with the source", "top1_agreement", "share of tokens"),
    ("excess_loss", "loss above the source's", "excess_loss", "nats per token"),
    ("loss", "loss", "cross_entropy", "nats per token"),
    ("perplexity", "perplexity", "perplexity", ""),
)


class Figure(NamedTuple):
    """A mean and its standard error, None where it cannot be known."""

    value: float
    stderr: float | None = None


def number(record: object) -> Figure | None:
    """Value and standard error of ``{"value", "stderr"}`` or of a plain number; None for anything else."""
    value, error = (record.get("value"), record.get("stderr")) if isinstance(record, Mapping) else (record, None)
    if not _finite(value):
        return None
    return Figure(float(value), float(error) if _finite(error) else None)  # type: ignore[arg-type]  # checked above


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(record: object, *, percent: bool = False) -> str:
    """A cell of a table: empty where nothing was measured; a number that is not finite is null in a file."""
    found = number(record)
    if found is not None:
        return with_error(*found, percent=percent)
    value = record.get("value", "") if isinstance(record, Mapping) else ""
    return "not a number" if value is None or isinstance(value, float) else ""


def mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def text_names(data: object) -> list[str]:
    """Texts as the reader may know them: hub names whole, of paths the last part only."""
    given = data if isinstance(data, list | tuple) else []
    return [one_line(text if (text := str(each)).startswith(HUB) else PurePath(text).name or text) for each in given]


def fidelity_lines(fidelity: Mapping[str, Any]) -> list[str]:
    """The table of source against result."""
    get = {key: fidelity.get(key) for key in ("source_loss", *(key for key, *_ in METRICS))}
    source, perplexity = number(get["source_loss"]), get["source_loss"]
    if source:
        value = math.exp(min(source[0], 700))
        perplexity = {"value": value, "stderr": None if source[1] is None else value * source[1]}
    rows = [
        ("loss, nats per token", shown(get["source_loss"]), shown(get["loss"]), shown(get["excess_loss"])),
        ("perplexity", shown(perplexity), shown(get["perplexity"]), ""),
        ("KL(source \\|\\| model), nats per token", "", "", shown(get["kl"])),
        ("top-1 agreement with the source", "", "", shown(get["top1_agreement"], percent=True)),
        (
            "parameters",
            _count(fidelity.get("source_parameters")),
            _count(fidelity.get("parameters")),
            _share(fidelity.get("parameters"), fidelity.get("source_parameters")),
        ),
        (
            "bytes of weights",
            _size(fidelity.get("source_bytes")),
            _size(fidelity.get("bytes")),
            _share(fidelity.get("bytes"), fidelity.get("source_bytes")),
        ),
    ]
    lines = ["| | source | this model | between them |", "|---|---:|---:|---:|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows if any(row[1:])]


def _count(value: object) -> str:
    return f"{value:,}" if _finite(value) else ""


def _size(value: object) -> str:
    return size(value) if _finite(value) else ""  # type: ignore[arg-type]  # a finite number


def _share(value: object, of: object) -> str:
    return f"{value / of:.1%}" if _finite(value) and _finite(of) and of else ""  # type: ignore[operator]  # numbers


def basis(fidelity: Mapping[str, Any], data: object) -> str:
    """On what the numbers stand, in a sentence."""
    names = "; ".join(escaped(name) for name in text_names(data))
    tokens, sequences = _count(fidelity.get("tokens")), _count(fidelity.get("sequences"))
    extent = f"{tokens} tokens in {sequences} sequences" if tokens and sequences else "an unknown number of tokens"
    return f"On {extent}{f' of {names}' if names else ''}; ± one standard error over sequences."


def domain_lines(domains: Mapping[str, Any]) -> list[str]:
    lines = ["| domain | tokens | KL | agreement | excess loss | perplexity |", "|---|---:|---:|---:|---:|---:|"]
    for name, record in domains.items():
        get = mapping(record)
        cells = [
            escaped(name),
            _count(get.get("tokens")),
            shown(get.get("kl")),
            shown(get.get("top1_agreement"), percent=True),
            shown(get.get("excess_loss")),
            shown(get.get("perplexity")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def task_lines(tasks: Mapping[str, Any]) -> list[str]:
    lines = [
        "| task | metric | documents | source | this model | difference, paired |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for task, metrics in tasks.items():
        for name, record in mapping(metrics).items():
            get = mapping(record)
            if not shown(record):
                continue
            up = get.get("higher_is_better")
            cells = [
                escaped(task),
                escaped(name) + ("" if up is None else " ↑" if up else " ↓"),
                _count(get.get("n")),
                shown(get.get("source")),
                shown(record),
                shown(get.get("difference")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


@dataclass(frozen=True, slots=True)
class Compared:
    """What was measured of source and result alike: rows of a unit, both numbers and their ``third``, and settings."""

    third: str
    rows: tuple[tuple[str, Figure | None, Figure | None, Figure | None], ...]
    facts: tuple[tuple[str, str], ...]


def compared(record: Mapping[str, Any]) -> Compared:
    """Generation, or speed: settings, then ``units``, ``source``, ``model``, and a ``difference`` or ``ratio``."""
    units, third = mapping(record.get("units")), "ratio" if "ratio" in record else "difference"
    found = [mapping(record.get(side)) for side in ("source", "model", third)]  # null where nothing was compared
    rows = []
    for name, unit in units.items():
        if any(name in side for side in found):
            source, model, both = (number(side.get(name)) for side in found)
            rows.append((str(unit), source, model, both))
    facts = [(name, value) for name, value in record.items() if isinstance(value, str | int | float)]
    for name, value in mapping(record.get("agreement")).items():
        if (agreed := number(value)) is not None:
            facts.append((str(units.get(name, name)), f"{agreed[0]:.4g}"))
    return Compared(third, tuple(rows), tuple((str(name).replace("_", " "), str(value)) for name, value in facts))


def amount(found: Figure | None, unit: str) -> str:
    """A number of a unit: bytes as sizes, what is whole and certain as a whole number."""
    if found is None:
        return ""
    value, error = found
    if unit.startswith("bytes"):
        return size(value)
    return f"{value:,.0f}" if not error and value == int(value) else with_error(value, error)


def compared_lines(record: Mapping[str, Any]) -> list[str]:
    """Generation, or speed: the table of source against result, and how it was measured."""
    found = compared(record)
    if not found.rows:
        return []
    lines = [f"| | source | this model | {found.third} |", "|---|---:|---:|---:|"]
    for unit, source, model, third in found.rows:
        last = with_error(*third) if third and found.third == "ratio" else amount(third, unit)
        lines.append(f"| {escaped(unit)} | {amount(source, unit)} | {amount(model, unit)} | {last} |")
    facts = (f"{escaped(name)} {escaped(without_folder(value))}" for name, value in found.facts)
    return [*lines, "", f"Measured with: {'; '.join(facts)}."]


def without_folder(text: str) -> str:
    """Of an absolute path the last part: a card is for others."""
    return PurePath(text).name if PurePath(text).is_absolute() else text


def eval_results(name: str, record: Mapping[str, Any], data: object, config: str | None = None) -> list[EvalResult]:
    """The numbers of one file for the hub's ``model-index``; the spec has no field for a standard error, so it stands
    among the arguments of each metric, with the number of tokens and sequences it is about.

    Args:
        name: what the metrics compare with: the source model.
        record: a fidelity, with ``domains`` and ``tasks`` if they were measured.
        data: the texts.
        config: tells several files apart.
    """
    found = list(_fidelity_results(name, record, text_names(data), config))
    for domain, part in mapping(record.get("domains")).items():
        label = one_line(domain) if config is None else f"{config}: {one_line(domain)}"
        texts = text_names(mapping(part).get("data")) or [one_line(domain)]
        found += _fidelity_results(name, mapping(part), texts, label)
    for task, metrics in mapping(record.get("tasks")).items():
        for metric, part in mapping(metrics).items():
            value = number(part)
            if value is None:
                continue
            args: dict[str, Any] = {"stderr": value[1], "documents": mapping(part).get("n")}
            for other in ("source", "difference"):
                compared = number(mapping(part).get(other))
                if compared:
                    args |= {other: compared[0], f"{other}_stderr": compared[1]}
            task_name = one_line(task)
            found.append(_result(task_name, task_name, config, one_line(metric), one_line(metric), value[0], args))
    return found


def _fidelity_results(
    source: str, record: Mapping[str, Any], texts: list[str], config: str | None
) -> Iterator[EvalResult]:
    hub = [text.removeprefix(HUB).split(":")[0].split("@")[0] for text in texts if text.startswith(HUB)]
    kind = hub[0] if len(hub) == len(texts) == 1 else "text"
    for key, label, metric, unit in METRICS:
        value = number(record.get(key))
        if value is None:
            continue
        args = {"stderr": value[1], "unit": unit or None, "source": source or None}
        args |= {each: record.get(each) for each in ("tokens", "sequences") if _finite(record.get(each))}
        yield _result(kind, "; ".join(texts) or "text", config, metric, label, value[0], args)


def _result(
    kind: str, dataset: str, config: str | None, metric: str, label: str, value: float, args: Mapping[str, Any]
) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=kind,
        dataset_name=dataset,
        dataset_config=config,
        metric_type=metric,
        metric_name=label,
        metric_value=value,
        metric_args={key: arg for key, arg in args.items() if arg is not None},
    )
