"""Where output goes: results to standard output; progress, notes and errors to standard error."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from conmoe.cli.tables import quantity

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
        """A bar that is told what was done, what is next, and the total where that is not known beforehand (0)."""
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

                def tell(done: float, total: float | None = None, doing: str | None = None) -> None:
                    progress.update(task, advance=done, total=total, description=doing)

                yield tell
        else:  # a file or a pipe would get an empty line from every bar
            yield lambda done, total=None, doing=None: None
        stderr.print(f"{name:<10} {time.perf_counter() - began:.1f} s")

    def note(self, text: str) -> None:
        stderr.print(text, style="dim", soft_wrap=True)


def command() -> str:
    """What was typed, for the record."""
    return shlex.join(["conmoe", *sys.argv[1:]])


def say(text: str) -> None:
    """A line on standard error, from the first process only."""
    stderr.print(text, soft_wrap=True)


def emit(value: Any) -> None:
    """One JSON object on standard output; numbers that are not finite become null, as JSON has no NaN."""
    from conmoe.artifacts import finite  # stands on torch, which --help does without

    sys.stdout.write(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")
