"""Calibration text that is never shipped nor downloaded: what every Python brings along about itself."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from conmoe.types import UsageError

Part = Literal["calibration", "evaluation"]

BUILTIN_NAME = f"built-in text (standard library of Python {'.'.join(map(str, sys.version_info[:3]))})"

# A document longer than this is cut off, so that no module makes up much of the built-in text.
_BUILTIN_CHARACTERS = 40_000
_SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "pydoc_data"}
_SKIPPED_FOLDERS |= {"idlelib", "lib2to3", "encodings", "turtledemo", "ensurepip", "_vendor", "msilib"}
_SKIPPED_MODULES = {"html.entities", "stringprep", "this", "antigravity", "__phello__"}
_TOPIC = "topic:"


def builtin_documents(part: Part) -> Iterator[str]:
    """Text that every machine running Python has: the language's help pages and the standard library's sources.

    A stable hash of its name puts each module into one of two parts that never overlap, a tenth into "evaluation". The
    help pages repeat each other, so that all of them are in "calibration".
    """
    found = False
    for name, load in _builtin_names():
        found = True
        if _part_of(name) == part and len(text := load()[:_BUILTIN_CHARACTERS]) > 200:
            yield text
    if not found:
        raise UsageError("This Python comes without the sources of its standard library; pass --data.")


def _part_of(name: str) -> Part:
    held_out = not name.startswith(_TOPIC) and hashlib.sha256(name.encode()).digest()[0] < 26
    return "evaluation" if held_out else "calibration"


def _builtin_names() -> Iterator[tuple[str, Callable[[], str]]]:
    for topic, text in sorted(_help_topics().items()):
        yield _TOPIC + topic, partial(str, text)
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for path in (Path(folder, file) for file in sorted(files) if file.endswith(".py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            if name not in _SKIPPED_MODULES and not name.startswith("_sysconfigdata"):
                yield name, partial(path.read_text, "utf-8", "replace")


def _help_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions split it off
        return {}
    return topics
