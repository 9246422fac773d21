"""``conmoe report``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.console import say


@verb()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="Folders of compress, bench or demo; files of evaluate --output or doctor --json.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also draw the plots as PNG and SVG, for papers.")
    ] = None,
    title: Annotated[str, typer.Option(help="The heading of the page.")] = "",
) -> None:
    """One HTML file of what was measured: quality against size, every layer, what lost most, how it was made.

    It loads nothing, and can be kept beside the model. An evaluation of a result that is given too adds to it.

    Example: `conmoe report olmoe-half olmoe-quarter evaluation.json -o report.html`
    """
    from conmoe.report.runs import comparable

    found = conmoe.write_report(results, output, title=title, figures=figures)
    console.stdout.print(tables.runs_table(found.runs))
    head = conmoe.headline(found.runs)
    if head:
        console.stdout.print(Text(f"{head.name}: {conmoe.verdict(head)}"))
    if not comparable(found.runs):
        say("Note: these results were not measured alike (texts, how much of them, or sources); the page says which.")
    say(f"The report is in {output}." + (f" The figures are in {figures}." if figures else ""))
