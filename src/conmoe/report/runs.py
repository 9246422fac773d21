"""What a report shows of a result: numbers with their standard errors, and what they are about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conmoe.portrait import Portrait
from conmoe.report.measured import Figure, number, text_names

#: The numbers of a fidelity that are shown, by their names in the files.
MEASURED = ("kl", "top1_agreement", "excess_loss", "perplexity")


@dataclass(frozen=True, slots=True)
class Run:
    """One result: how large it is, how far from its source, and how it was made."""

    name: str
    form: str = ""
    method: str = ""
    keep: str = ""
    group: str = ""
    bytes: float | None = None
    source_bytes: float | None = None
    numbers: Mapping[str, Figure] = field(default_factory=dict)  # of MEASURED
    domains: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)  # tasks, generation, speed, as they were written
    texts: tuple[str, ...] = ()  # what it was measured on
    calibrated: tuple[str, ...] = ()  # and calibrated on
    facts: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    error: str = ""
    portrait: Portrait | None = None
    folder: Path | None = None

    @property
    def share(self) -> float | None:
        """Of the source's bytes."""
        return self.bytes / self.source_bytes if self.bytes and self.source_bytes else None

    @property
    def yardstick(self) -> tuple[object, ...]:
        """What its numbers are relative to: source, texts and how much of them."""
        return self.source_bytes, self.texts, dict(self.facts).get("held-out tokens")


def comparable(runs: Sequence[Run]) -> bool:
    """Whether the numbers of all runs that have some were taken in the same way."""
    return len({run.yardstick for run in runs if run.numbers and not run.error}) <= 1


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A metric of a benchmark task: of the result, of the source, and the paired difference."""

    task: str
    metric: str
    result: Figure
    source: Figure | None
    difference: Figure | None
    documents: str


def text_labels(texts: Any) -> tuple[str, ...]:
    """Names of texts without how much of each there was."""
    return tuple(re.sub(r": [\d,]+ sequences, weight \S+$", "", name) for name in text_names(texts))


def figure(record: Any) -> Figure | None:
    """A mean as it is written; None for anything that is no number."""
    return number(record) if isinstance(record, dict) else None


def figures(record: Mapping[str, Any]) -> dict[str, Figure]:
    """Those of ``MEASURED`` that a record has."""
    return {name: found for name in MEASURED if (found := figure(record.get(name))) is not None}
