"""What a person sees: progress with rate and remaining time, notes, tables. All of it on standard error but results."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from conmoe.evaluate import Fidelity, Measured

stderr = Console(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
stdout = Console(highlight=False)


class _Rate(ProgressColumn):
    """Units per second so far."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{quantity(speed)} {task.fields['unit']}/s", style="dim")


class Bars:
    """Progress bars on standard error, one for each stage; where nobody watches, a line at the end of each."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A bar that is told what was done; a total of 0 means that it is not known beforehand."""
        began = time.perf_counter()
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TaskProgressColumn(),
            _Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=stderr, transient=True) as progress:
            task = progress.add_task(name, total=total or None, unit=unit)
            yield lambda amount: progress.advance(task, amount)
        stderr.print(f"{name:<10} {time.perf_counter() - began:.1f} s")

    def note(self, text: str) -> None:
        stderr.print(text, style="dim")


def emit(value: Any) -> None:
    """One JSON object on standard output; numbers that are not finite become null, as JSON has no NaN."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def fidelity_table(title: str, rows: Sequence[tuple[str, str, Fidelity]]) -> Table:
    """Name, form and fidelity of one or several results, best first."""
    table = Table(title=title, title_justify="left")
    for column in ("model", "form", "size", "KL (nats/token)", "top-1 agreement", "excess loss", "perplexity"):
        table.add_column(column, justify="left" if column in ("model", "form") else "right")
    for name, form, fidelity in rows:
        table.add_row(
            name,
            form,
            size(fidelity.bytes),
            measured(fidelity.kl),
            measured(fidelity.top1_agreement, percent=True),
            measured(fidelity.excess_loss),
            measured(fidelity.perplexity, digits=2),
        )
    return table


def facts(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of two columns."""
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def measured(number: Measured | None, *, digits: int = 4, percent: bool = False) -> str:
    """A value with its standard error."""
    if number is None:
        return "-"
    scale, unit, digits = (100, " %", 2) if percent else (1, "", digits)
    error = "" if number.stderr != number.stderr else f" ± {number.stderr * scale:.{digits}f}"
    return f"{number.value * scale:.{digits}f}{error}{unit}"


def size(nbytes: float) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= step:
            return f"{nbytes / step:.2f} {unit}"
    return f"{nbytes:.0f} B"


def quantity(number: float) -> str:
    for unit, step in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= step:
            return f"{number / step:.2f}{unit}"
    return f"{number:.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
