"""What long steps report to: the command line draws bars, a script listens to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """What a long step reports to: ``stage(name, total, unit)`` gives a function that is told what was done, and the
    total with it where that is 0 at first, and may be told what it is ``doing``. Stages follow one another; they are
    not nested."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[..., None]]: ...

    def note(self, text: str) -> None: ...


class Silent:
    """Nobody listens."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        yield lambda done, total=None, doing=None: None

    def note(self, text: str) -> None: ...


SILENT = Silent()
