"""``conmoe bench``"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

import conmoe
from conmoe.cli import console
from conmoe.cli.app import verb
from conmoe.cli.arguments import Data, Device, Dtype, Json, Model, Remote, Sample, SeqLen, Tokens
from conmoe.cli.console import say
from conmoe.cli.several import WORDS, Several
from conmoe.report.numbers import size, with_error

if TYPE_CHECKING:
    from conmoe.results import Bench, Row

#: As many domains as stand beside each other on 80 characters.
SHOWN = 2


@verb(cls=Several)
def bench(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The folder of the table.")],
    keep: Annotated[
        list[str],
        typer.Option(metavar="KEEP...", help="Shares (0.5, 50%) or counts of experts to keep."),
    ] = ["0.75", "0.5", "0.25"],  # noqa: B006  typer's way to give a list
    methods: Annotated[
        list[str],
        typer.Option(
            "--methods",
            metavar="NAME...",
            help="Names, with options if wanted (conmoe:redirect=drop,scope=2); all: every method with its defaults; "
            "ablations: the switches of ConMoE.",
        ),
    ] = ["all"],  # noqa: B006
    seeds: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Calibrations, on documents of their own; standard errors are over them."
        ),
    ] = 3,
    data: Data = None,
    tokens: Tokens = 32768,
    seq_len: SeqLen = None,
    sample: Sample = 4096,
    evaluate_data: Annotated[
        list[str] | None,
        typer.Option(
            "--eval",
            metavar="[NAME=]SPEC...",
            help="Held-out text of a domain; by default built-in text.",
        ),
    ] = None,
    evaluate_tokens: Annotated[
        int, typer.Option("--eval-tokens", metavar="N", min=1, help="Tokens of each domain to measure on.")
    ] = 16384,
    device: Device = "auto",
    dtype: Dtype = "auto",
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not write DIR/report.html.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the table of another bench.")] = False,
    json: Json = False,
    trust_remote_code: Remote = False,
) -> None:
    """Compare methods: plan with each at every budget, measure each result on every domain, write one table.

    Nothing but the table is kept of a result. A killed run is taken up where it stopped; statistics and finished rows
    stay in DIR/work, so that a method or a domain that is added later costs only itself. A method that fails is a row
    that says why.

    Example: `conmoe bench allenai/OLMoE-1B-7B-0125 --keep 0.75 0.5 --methods all --eval wiki=wiki.txt --output table`
    """
    from conmoe.candidates import parse_candidates
    from conmoe.cli.read import read_data, read_device, read_dtype

    folder = conmoe.locate(model)
    candidates, named = parse_candidates(methods), read_domains(evaluate_data or [])
    options = conmoe.Calibration(sample, 0, read_device(device), read_dtype(dtype), None, trust_remote_code)
    length = (seq_len, 0, trust_remote_code)
    texts = [read_data(folder, data, tokens, seq_len, seed, trust_remote_code, quiet=seed > 0) for seed in range(seeds)]
    domains = {
        name: read_data(folder, [spec] if spec else None, evaluate_tokens, *length, part="evaluation")
        for name, spec in named.items()
    }
    made = conmoe.bench(
        folder,
        output,
        candidates,
        list(dict.fromkeys(keep)),
        texts,
        domains,
        console.Bars(),
        options=options,
        command=shlex.join(["conmoe", "bench", *context.meta[WORDS]]),
        report=not no_report,
        force=force,
    )
    for name, domain in made.evaluation.items():
        if domain.overlap:
            say(f"Warning: {domain.overlap:.0%} of the documents of {name} were calibrated on; they flatter it.")
    if json:
        console.emit(made.model_dump(mode="json"))
    else:
        show(made)
    say(f"The table is in {output / 'bench.md'}, every number in {output / 'bench.json'}.")


def read_domains(specs: list[str]) -> dict[str, str | None]:
    """Domain -> its text, None for the built-in one."""
    from conmoe.cli import read

    return {**read.read_domains(specs, "--eval")} or {"builtin": None}


def show(made: Bench) -> None:
    """A table for each keep, narrow enough for 80 characters; all the numbers are in the files."""
    for keep in made.keeps:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("method", overflow="fold", min_width=10)
        table.add_column("size", justify="right", no_wrap=True)
        for heading in _headings(made):
            table.add_column(heading, justify="right", overflow="fold")
        failed = []
        for row in made.at(keep):
            if row.error is None:
                name = row.name.replace(":", ": ").replace(",", ", ")  # so that lines break between options
                name += f" ({row.form}, approximate)" if row.approximate else ""
                table.add_row(name, size(row.bytes or 0), *_cells(made, row))
            else:
                failed.append(f"{row.name} failed: {row.error}")
        console.stdout.print(Text(f"Keep {keep}, the closest to the source first", style="italic"), table)
        for line in failed:
            console.stdout.print(line, soft_wrap=True)
        console.stdout.print()
    note = f"KL in nats per token; ± one standard error over {made.stderr_over}."
    console.stdout.print(Text(note, style="dim"))


def _headings(made: Bench) -> list[str]:
    names = list(made.evaluation)
    kl = [f"KL, {name}" for name in names] if len(names) <= SHOWN else [f"KL, mean of {len(names)}"]
    return [*kl, "agreement", "plan"]


def _cells(made: Bench, row: Row) -> list[str]:
    numbers: list[dict[str, Any]] = list(row.domains.values())
    kl = [with_error(each["kl"].value, each["kl"].stderr) for each in numbers]
    agreement = sum(each["top1_agreement"].value for each in numbers) / len(numbers)
    kl = kl if len(numbers) <= SHOWN else [f"{row.kl:.4f}"]
    return [*kl, f"{agreement:.1%}", f"{row.plan_seconds:.2g} s"]
