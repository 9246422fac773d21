"""``conmoe demo``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import Force


@verb()
def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="The folder to write.")] = Path("demo-output"),
    force: Force = False,
) -> None:
    """Compress a small trained model that ships with conmoe, four ways, offline, and compare.

    Example: `conmoe demo demo-output`
    """
    made = conmoe.demo(out, console.Bars(), force=force)
    rows = sorted(made.rows, key=lambda row: row[2].kl.value if row[2].kl else 0.0)
    console.stdout.print(tables.fidelity_table("Half of the experts, on held-out text (best first)", rows))
    source = made.rows[0][2]
    console.stdout.print("unrefined: the same experts as exact copies, ConMoE as published (--refine none).")
    console.stdout.print(f"The source has {tables.size(source.source_bytes or 0)}.\n")
    for title, text in (("Source", made.before), ("After conmoe", made.after)):
        console.stdout.print(title, style="bold")
        console.stdout.print(conmoe.DEMO_PROMPT + text + "\n", soft_wrap=True)
    for line in (
        f"Checkpoints, statistics, results.json and report.html are in {out}. Next, on a real model:",
        "  conmoe inspect allenai/OLMoE-1B-7B-0125",
        "  conmoe compress allenai/OLMoE-1B-7B-0125 olmoe-half --keep 0.5 --data YOUR-TEXT.jsonl",
    ):
        console.stdout.print(line, soft_wrap=True)
