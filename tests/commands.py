"""Run the command line inside the test process: starting one costs seconds of imports."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from conmoe.cli import main

#: A sentence that the byte tokenizer reads as one token a letter, often enough for every command of the tests.
TEXT = "The quick brown fox jumps over the lazy dog, and no one knows why it should; {} times it did.\n"


#: Files of a result that name its folder or the command, and the sums of these: they differ where all else is equal.
OWN = {f"conmoe/{name}" for name in ("results.json", "report.json", "report.html", "manifest.json")} | {"README.md"}


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


Run = Callable[..., Outcome]


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("inspect", folder)`` -> its exit code and what it printed."""

    def run(*arguments: Any) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return Outcome(int(stopped.value.code or 0), *capsys.readouterr())

    return run


def write_text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("".join(TEXT.format(number) for number in range(400)))
    return file


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` and what is in it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def main_until(step: int, arguments: list[str]) -> None:
    """The command line in a process that kills itself before its ``step``-th change of a name on disk.

    Names change when files and folders are put in their place or removed: all that another run could trip over.
    """
    left = step

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    with (
        patch("os.replace", mortal(os.replace)),
        patch("os.unlink", mortal(os.unlink)),
        patch("os.mkdir", mortal(os.mkdir)),
        patch("os.fsync", mortal(os.fsync)),
    ):
        main(arguments)
