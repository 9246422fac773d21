"""Tables of what ``conmoe evaluate`` measures beside fidelity, from its records; narrow enough for 80 characters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from conmoe.report.numbers import size, with_error

_SHARES = ("acc", "exact_match", "em", "f1", "mcc")
_WRITTEN = {
    "repetition": ("repeated 4-grams", True),
    "loops": ("ends in a loop", True),
    "ended": ("ends by itself", True),
    "length": ("new tokens", False),
    "distinct_1": ("distinct 1-grams", True),
    "distinct_2": ("distinct 2-grams", True),
    "distinct_3": ("distinct 3-grams", True),
}


def tasks_table(record: Mapping[str, Any]) -> Group:
    """A row for each task and metric: the source's score, the model's, and their paired difference."""
    rows = [(task, metric, found) for task, metrics in record["tasks"].items() for metric, found in metrics.items()]
    paired = any(found["source"] for _, _, found in rows)
    table = _table("task", "metric", *(("source", "model", "difference", "p") if paired else ("model",)))
    for task, metric, found in rows:
        percent = metric.partition(",")[0].startswith(_SHARES)
        test = found.get("mcnemar")
        scores = [_shown(found["source"], percent)] if paired else []
        scores.append(_shown(found, percent))
        scores += [_shown(found["difference"], percent), f"{test['p']:.2g}" if test else "-"] if paired else []
        table.add_row(task, metric, *scores)
    options = record["task_options"]
    few = options["num_fewshot"]
    title = (
        f"Tasks of lm-evaluation-harness {options['lm_eval']}"
        + (f", the first {options['limit']} documents of each" if options["limit"] else "")
        + ("" if few is None else f", {few} example{'s' * (few != 1)} before each question")
    )
    counts = {task: max(found["n"] for found in metrics.values()) for task, metrics in record["tasks"].items()}
    note = f"Documents: {', '.join(f'{task} {n:,}' for task, n in counts.items())}"
    note += "; ± one standard error over them"
    if paired:
        note += "; difference: model - source, by document; p: McNemar's exact test of the documents that one of the "
        note += "two got right"
    return Group(Text(title, style="italic"), table, Text(f"{note}.", style="dim"))


def generation_table(record: Mapping[str, Any]) -> Group:
    """What the models wrote, measure by measure."""
    paired = record["source"] is not None
    table = _table("measure", *(("source", "model", "difference") if paired else ("model",)))
    for name, (heading, percent) in _WRITTEN.items():
        sides = [record[side][name] for side in (("source", "model", "difference") if paired else ("model",))]
        table.add_row(heading, *(_shown(each, percent) for each in sides))
    how = f"temperature {record['temperature']:g}" if record["temperature"] else "greedy"
    title = f"{record['prompts']} prompts, up to {record['max_new_tokens']} new tokens, {how}"
    note = "± one standard error over prompts"
    if paired:
        equal, same = record["agreement"]["equal_tokens"], record["agreement"]["identical"]
        note += (
            f"; difference: model - source, by prompt. Both begin with the same {_shown(equal, False)} tokens; "
            f"{_shown(same, True)} of the generations are the same throughout"
        )
    return Group(Text(title, style="italic"), table, Text(f"{note}.", style="dim"))


def speed_table(record: Mapping[str, Any]) -> Group:
    """Tokens per second (t/s) with their range, bytes, and the model's share of the source's."""
    paired = record["source"] is not None
    sides = ("source", "model") if paired else ("model",)
    table = _table("", *sides, *(("ratio",) if paired else ()))
    for name, heading in (("prefill", "prefill, t/s"), ("decode", "decode, t/s")):
        cells = [_range(record[side][name], _rate) for side in sides]
        table.add_row(heading, *cells, *([_range(record["ratio"][name], "{:.2f}".format)] if paired else []))
    for name, heading in (("weights", "weights"), ("resident", "resident"), ("peak", "peak")):
        cells = [size(record[side][name]["value"]) for side in sides]
        table.add_row(heading, *cells, *([f"{record['ratio'][name]['value']:.2f}"] if paired else []))
    title = (
        f"{record['batch']} x {record['prompt']} prompt and {record['new']} new tokens on {record['device']}, "
        f"{record['threads']} threads, {record['dtype']}"
    )
    note = (
        f"t/s: tokens per second. Mean of {record['turns']} processes of each model, which took turns, of the median "
        f"of {record['repeats']} runs in each (lowest to highest run)"
    )
    libraries = record["model"]["libraries"]["value"]
    note += f"; {size(libraries)} of the memory are Python and its libraries" if libraries else ""
    if paired:
        note += ". With as many experts for a token as before, the arithmetic is the same; what falls is memory"
    return Group(Text(title, style="italic"), table, Text(f"{note}.", style="dim"))


def _table(first: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", min_width=min(len(first), 8))
    for heading in headings:
        words = heading == "metric"
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table


def _shown(number: Mapping[str, Any] | None, percent: bool) -> str:
    if number is None or number["value"] is None:
        return "-"
    value, error = number["value"], number["stderr"]
    if percent:
        return with_error(value, error, percent=True)
    if not error:
        return f"{value:.4g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 4)  # to the second digit of the error
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _range(number: Mapping[str, Any], form: Callable[[float], str]) -> str:
    low, high = form(number["low"]), form(number["high"])
    return form(number["value"]) + (f" ({low} to {high})" if low != high else "")


def _rate(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"
