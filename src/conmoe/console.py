"""What a person sees: progress with rate and remaining time, notes, tables. All of it on standard error but results."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from conmoe.evaluate import Fidelity, Measured

errors = Console(stderr=True, highlight=False, markup=False)
stderr = Console(stderr=True, highlight=False, markup=False, quiet=os.environ.get("RANK", "0") != "0")
stdout = Console(highlight=False, markup=False)


class _Rate(ProgressColumn):
    """Units per second so far."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{quantity(speed)} {task.fields['unit']}/s", style="dim")


class Bars:
    """Progress bars on standard error, one for each stage; where nobody watches, a line at the end of each."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """A bar that is told what was done, and the total with it where that is not known beforehand (0)."""
        began = time.perf_counter()
        if stderr.is_terminal:
            columns = (
                TextColumn("{task.description:<10}"),
                BarColumn(),
                TaskProgressColumn(),
                _Rate(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=stderr, transient=True) as progress:
                task = progress.add_task(name, total=total or None, unit=unit)
                yield lambda done, total=None: progress.update(task, advance=done, total=total)
        else:  # a file or a pipe would get an empty line from every bar
            yield lambda done, total=None: None
        stderr.print(f"{name:<10} {time.perf_counter() - began:.1f} s")

    def note(self, text: str) -> None:
        stderr.print(text, style="dim", soft_wrap=True)


def say(text: str) -> None:
    """A line on standard error, from the first process only."""
    stderr.print(text, soft_wrap=True)


def emit(value: Any) -> None:
    """One JSON object on standard output; numbers that are not finite become null, as JSON has no NaN."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def fidelity_table(title: str, rows: Sequence[tuple[str, str, Fidelity]]) -> Group:
    """Name, form and fidelity of one or several results, narrow enough for 80 characters."""
    paired = any(found.kl for _, _, found in rows)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold", min_width=10)
    for heading in ("size", *(("KL", "agreement", "excess loss") if paired else ("loss",)), "ppl"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, form, found in rows:
        numbers = [measured(found.kl), measured(found.top1_agreement, percent=True), measured(found.excess_loss)]
        table.add_row(
            f"{name} ({form})" if form else name,
            size(found.bytes),
            *(numbers if paired else [measured(found.loss)]),
            f"{found.perplexity.value:.4g}",
        )
    what = "KL and loss" if paired else "Loss"
    note = Text(f"{what} in nats per token; ± one standard error over sequences.", style="dim")
    return Group(Text(title, style="italic"), table, note)


def facts(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of two columns."""
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def measured(number: Measured | None, *, percent: bool = False) -> str:
    """A value and its standard error, to the second digit of the error where four decimals (of a share) show it."""
    if number is None:
        return "-"
    scale, digits, unit = (100, 2, "%") if percent else (1, 4, "")
    value, error = scale * number.value, scale * number.stderr
    if 0 < error < math.inf:
        digits = min(max(1 - math.floor(math.log10(error)), 1), digits)
    shown = "" if math.isnan(error) else f" ± {error:.{digits}f}"
    return f"{value:.{digits}f}{shown}{unit}"


def size(nbytes: float) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= step:
            return f"{nbytes / step:.4g} {unit}"
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
