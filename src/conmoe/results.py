"""What a bench measured: rows of numbers, each with its standard error and what that is over, on disk as one JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import Field

from conmoe.artifacts import Record, parse_record
from conmoe.types import UsageError

BENCH_JSON, BENCH_MD = "bench.json", "bench.md"
FORMAT = 1

#: What a result stores: exact copies of experts and a map; something new or mixed, computed in closed form; or weights
#: that were fitted step by step. Of the plans of a row the last of these counts.
WEIGHT_PRESERVING, CLOSED_FORM, RECONSTRUCTION = GROUPS = ("weight-preserving", "closed form", "reconstruction")

#: The units of the numbers of a bench, which is also their list.
UNITS = {
    "kl": "nats per token",
    "top1_agreement": "share of tokens",
    "excess_loss": "nats per token",
    "loss": "nats per token",
    "perplexity": "per token",
}


class Number(Record):
    """A mean, and its standard error over calibration seeds, or over sequences where there is one seed.

    ``stderr_sequences`` is that over sequences in any case (the mean over seeds): how much the text that was measured
    on matters. None where it cannot be known.
    """

    value: float
    stderr: float | None
    stderr_sequences: float | None


class Measurement(Record):
    """One result on one domain: each number of ``UNITS`` with its standard error over sequences."""

    numbers: dict[str, tuple[float, float | None]]
    source_loss: float
    sequences: int
    tokens: int


class Run(Record):
    """What one plan (a method, a keep, a calibration seed) became: the checkpoint it describes, and its fidelity."""

    seed: int
    options: dict[str, Any]
    group: str
    form: str
    approximate: bool
    bytes: int
    parameters: int
    plan_seconds: float
    predicted_error: float | None
    prototypes: tuple[int, ...]  # of each scope
    protected: dict[int, tuple[int, ...]]
    statistics: str
    domains: dict[str, Measurement]  # by the fingerprint of the domain's tokens


class Row(Record):
    """A method with its options at one keep: means over seeds, or the sentence that says why there are none."""

    name: str
    method: str
    keep: str
    error: str | None = None
    group: str | None = None
    form: str | None = None
    approximate: bool = False
    bytes: float | None = None
    share: float | None = None  # of the source's bytes
    plan_seconds: float | None = None
    kl: float | None = None  # mean over domains
    domains: dict[str, dict[str, Number]] = Field(default_factory=dict)
    runs: tuple[Run, ...] = ()


class Domain(Record):
    """A text that was measured on."""

    data: tuple[str, ...]
    fingerprint: str
    tokens: int
    sequences: int
    seq_len: int
    overlap: float  # largest share of its documents that any seed calibrated on
    source_loss: float | None  # None where no row was measured
    source_perplexity: float | None


class CalibrationRecord(Record):
    """What one seed calibrated on."""

    seed: int
    tokens: int
    sample: int
    data: tuple[str, ...]
    data_fingerprint: str
    statistics: str


class Bench(Record):
    """Everything a bench measured, and what it was made from."""

    format: int = FORMAT
    key: str  # fingerprint of what was asked
    command: str
    versions: dict[str, str]
    device: str
    threads: int
    dtype: str
    model: str
    model_fingerprint: str
    family: str
    layers: int
    experts: int
    top_k: int
    source_bytes: int
    source_parameters: int
    calibrations: tuple[CalibrationRecord, ...]
    evaluation: dict[str, Domain]
    units: dict[str, str] = UNITS
    rows: tuple[Row, ...]

    @property
    def keeps(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.keep for row in self.rows))

    @property
    def stderr_over(self) -> str:
        seeds = len(self.calibrations)
        return f"{seeds} calibration seeds, on the same text" if seeds > 1 else "sequences (one calibration seed)"

    def at(self, keep: str) -> tuple[Row, ...]:
        """The rows of one keep: the closest to the source first, those that failed last."""
        return tuple(sorted((row for row in self.rows if row.keep == keep), key=_order))


def load_bench(path: Path) -> Bench:
    """Read the table of ``conmoe bench`` from its folder, or from a ``bench.json`` of any name.

    Raises:
        UsageError: there is none.
        ConmoeError: it is damaged or of another version.
    """
    file = path / BENCH_JSON if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path} holds no {BENCH_JSON}; make one with conmoe bench.")
    return parse_record(Bench, file, FORMAT)


def summarise(name: str, method: str, keep: str, runs: Sequence[Run], domains: Mapping[str, str], source: int) -> Row:
    """The row of several seeds of one candidate.

    Args:
        name: the candidate, with its options.
        method: its method.
        keep: as asked.
        runs: one for each calibration seed.
        domains: name -> fingerprint of its tokens.
        source: bytes of the source.
    """
    measured = {
        domain: {unit: _number([run.domains[key].numbers[unit] for run in runs]) for unit in UNITS}
        for domain, key in domains.items()
    }
    size = fmean(run.bytes for run in runs)
    return Row(
        name=name,
        method=method,
        keep=keep,
        group=max((run.group for run in runs), key=GROUPS.index),
        form=runs[0].form,
        approximate=any(run.approximate for run in runs),
        bytes=size,
        share=size / source,
        plan_seconds=fmean(run.plan_seconds for run in runs),
        kl=fmean(numbers["kl"].value for numbers in measured.values()),
        domains=measured,
        runs=tuple(runs),
    )


def _number(seeds: Sequence[tuple[float, float | None]]) -> Number:
    values = [value for value, _ in seeds]
    within = [error for _, error in seeds if error is not None]
    over_sequences = fmean(within) if within else None
    over_seeds = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else over_sequences
    return Number(value=fmean(values), stderr=over_seeds, stderr_sequences=over_sequences)


def _order(row: Row) -> tuple[bool, float]:
    return row.error is not None, math.inf if row.kl is None or math.isnan(row.kl) else row.kl
