"""The part of a card that changes when something is measured, and writing it anew.

It stands between two marks. What people write outside of them stays, and so do metadata that are not about numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from conmoe.artifacts import write_atomic
from conmoe.report import measured
from conmoe.report.escape import block, code, escaped, one_line
from conmoe.report.numbers import size
from conmoe.types import ConmoeError, UsageError

BEGIN, END = "<!-- conmoe: measured -->", "<!-- conmoe: end of measured -->"
RESULTS, TUNING, EVALUATIONS, CARD = "conmoe/results.json", "conmoe/tuning.json", "conmoe/evaluations", "README.md"
#: What ``conmoe evaluate`` writes, any of which makes a file an evaluation.
KEYS = ("loss", "domains", "tasks", "generation", "speed")
_ALWAYS_UNTESTED = ("safety", "bias", "long contexts", "languages and domains outside of the texts named here")
UNMEASURED = "\n".join(
    [
        BEGIN,
        "## What it costs",
        "",
        "Nothing was measured yet. Not tested: fidelity, tasks, generation quality, speed, safety, bias.",
        END,
        "",
    ]
)


def refresh_card(folder: Path, *, name: str = "", base_model: str = "", more: Mapping[str, Path] = {}) -> str:
    """The card of a result with all that lies beside it: results, tuning, evaluations, and ``more`` of these by name.

    Writes nothing.
    """
    files = {file.stem: file for file in (folder / EVALUATIONS).glob("*.json")} | dict(more)
    evaluations = {label: read_evaluation(files[label]) for label in sorted(files)}
    results, tuning = (_json(folder / file) for file in (RESULTS, TUNING))
    text = _card(folder / CARD)
    return measured_card(text, results, evaluations, tuning=tuning, name=name, base_model=base_model)


def _card(file: Path) -> str:
    try:
        return file.read_text("utf-8") if file.is_file() else ""
    except UnicodeDecodeError as error:
        # Read in any other way, it would be written back with other letters than its owner's.
        raise ConmoeError(f"{file} is not in UTF-8; save it as that.") from error


def write_card(folder: Path, name: str) -> None:
    write_atomic(folder / CARD, refresh_card(folder, name=name))


def read_evaluation(file: Path) -> dict[str, Any]:
    """A file of ``conmoe evaluate --output``.

    Raises:
        UsageError: it is something else.
    """
    if not file.is_file():
        raise UsageError(f"{file} is no file; make one with conmoe evaluate OUT --against MODEL --output FILE.")
    found = _json(file)
    if not found or not any(key in found for key in KEYS):
        raise UsageError(f"{file} is no evaluation; make one with conmoe evaluate OUT --against MODEL --output FILE.")
    return found


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConmoeError(f"{file} is no JSON file.") from error
    return found if isinstance(found, dict) else {}


def measured_card(
    text: str,
    results: Mapping[str, Any],
    evaluations: Mapping[str, Mapping[str, Any]],
    *,
    tuning: Mapping[str, Any] = {},
    name: str,
    base_model: str = "",
) -> str:
    """``text`` with the section between the marks and the ``model-index`` written anew.

    Args:
        text: a card.
        results: ``results.json``, empty if the result was not measured as it was made.
        evaluations: evaluation files by name.
        tuning: ``tuning.json``; what was measured after a tuning takes the place of what was measured before.
        name: what the model is called in the ``model-index``.
        base_model: the source on the hub, where the card does not know it.

    Raises:
        ConmoeError: the card's metadata cannot be read.
    """
    card = _parsed(text)
    if base_model:
        card.data["base_model"] = base_model
        card.data["base_model_relation"] = card.data.get("base_model_relation", "finetune")
    named = card.data.get("base_model")
    source = one_line(named) if isinstance(named, str) else ""
    fidelity, data = _own_measurement(results, tuning)
    found: list[EvalResult] = measured.eval_results(source, fidelity, data) if fidelity else []
    for label, record in evaluations.items():
        found += measured.eval_results(source, record, record.get("data"), label)
    card.data.pop("model-index")
    card.data["eval_results"] = found or None
    card.data["model_name"] = one_line(name or card.data.get("model_name") or "model") if found else None
    section = "\n".join([BEGIN, *_section(results, fidelity, data, evaluations, tuned=bool(tuning)), END])
    return f"---\n{card.data.to_yaml()}\n---\n\n{_replaced(card.text.lstrip(), section)}"


def _parsed(text: str) -> ModelCard:
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except Exception as error:  # the parser of YAML has classes of its own, and metadata may be of any kind
        raise ConmoeError(
            "README.md has metadata that cannot be read; mend what stands between its --- lines."
        ) from error


def _replaced(body: str, section: str) -> str:
    start, end = body.find(BEGIN), body.rfind(END)
    if 0 <= start < end:
        return body[:start] + section + body[end + len(END) :]
    return f"{body.rstrip()}\n\n{section}\n"


def _own_measurement(results: Mapping[str, Any], tuning: Mapping[str, Any]) -> tuple[Mapping[str, Any], object]:
    after = measured.mapping(tuning.get("after"))
    if after:
        return after, measured.mapping(tuning.get("held_out")).get("sources")
    return measured.mapping(results.get("fidelity")), results.get("held_out")


def _section(
    results: Mapping[str, Any],
    fidelity: Mapping[str, Any],
    data: object,
    evaluations: Mapping[str, Mapping[str, Any]],
    *,
    tuned: bool,
) -> list[str]:
    lines = ["## What it costs", "", *_sizes(results)]
    if fidelity:
        lines += [measured.basis(fidelity, data), *_overlap(results, tuned), "", *measured.fidelity_lines(fidelity)]
    else:
        lines += ["Fidelity was not measured as the model was made."]
    for label, record in evaluations.items():
        lines += _evaluation(label, record)
    lines += _untested(fidelity, evaluations)
    lines += _calibrated(results)
    command = results.get("command")
    if isinstance(command, str) and command:
        lines += ["", "The command:", "", *block(command)]
    versions = measured.mapping(results.get("versions"))
    if versions:
        lines += [
            "",
            f"Made with {', '.join(f'{escaped(each)} {escaped(found)}' for each, found in versions.items())}.",
        ]
    return lines


def _sizes(results: Mapping[str, Any]) -> list[str]:
    made, source = (measured.number(results.get(key)) for key in ("bytes", "source_bytes"))
    if not made or not source or not source[0]:
        return []
    return [f"{size(made[0])} of weights, where the source has {size(source[0])} ({made[0] / source[0]:.1%})."]


def _overlap(results: Mapping[str, Any], tuned: bool) -> list[str]:
    share = measured.number(results.get("overlap"))
    if share is None or tuned:
        return []
    if share[0] > 0:
        return [f"**{share[0]:.0%} of its documents were calibrated on: the numbers are too good.**"]
    return ["None of its documents was calibrated on."]


def _evaluation(label: str, record: Mapping[str, Any]) -> list[str]:
    lines = ["", f"### Evaluation: {escaped(label)}", ""]
    if measured.shown(record.get("loss")):
        lines += [measured.basis(record, record.get("data")), "", *measured.fidelity_lines(record), ""]
    if domains := measured.mapping(record.get("domains")):
        lines += ["By domain; KL and loss in nats per token:", "", *measured.domain_lines(domains), ""]
    if tasks := measured.mapping(record.get("tasks")):
        lines += [
            f"{_limited(record)}; differences are paired over the same documents:",
            "",
            *measured.task_lines(tasks),
            "",
        ]
    for key, title in (("generation", "Generated text"), ("speed", "Speed and memory")):
        if rows := measured.compared_lines(measured.mapping(record.get(key))):
            lines += [f"{title}:", "", *rows, ""]
    return lines[:-1] if lines[-1] == "" else lines


def _limited(record: Mapping[str, Any]) -> str:
    limit = measured.number(measured.mapping(record.get("task_options")).get("limit"))
    return f"Tasks, by lm-evaluation-harness{f', the first {limit[0]:.0f} documents of each' if limit else ''}"


def _untested(fidelity: Mapping[str, Any], evaluations: Mapping[str, Mapping[str, Any]]) -> list[str]:
    left = [] if fidelity or any("loss" in record for record in evaluations.values()) else ["fidelity to the source"]
    for key, what in (("tasks", "tasks"), ("generation", "generated text"), ("speed", "speed and memory")):
        left += [] if any(record.get(key) for record in evaluations.values()) else [what]
    return ["", "## What was not tested", "", f"By the tool: {', '.join([*left, *_ALWAYS_UNTESTED])}."]


def _calibrated(results: Mapping[str, Any]) -> list[str]:
    found = measured.mapping(results.get("calibration"))
    if not found:
        return []
    documents = results.get("calibration_documents")
    rows = [
        ("text", escaped("; ".join(measured.text_names(found.get("data"))))),
        ("tokens", f"{shown_count(found.get('tokens'))} in sequences of {shown_count(found.get('seq_len'))}"),
        ("documents", shown_count(len(documents)) if isinstance(documents, list) else ""),
        ("token sample of a layer", shown_count(found.get("sample"))),
        ("seed", shown_count(found.get("seed"))),
        ("computed in", escaped(found.get("dtype", ""))),
        ("fingerprint of the tokens", code(found.get("data_fingerprint", ""))),
    ]
    lines = ["", "## Calibrated on", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in rows if value]
    said = "The text decided which experts stay, and is what was fitted on where something was fitted."
    return [*lines, "", said]


def shown_count(value: object) -> str:
    found = measured.number(value)
    return "" if found is None else f"{found[0]:,.0f}"
