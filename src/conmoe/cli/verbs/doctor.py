"""``conmoe doctor``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import Device, Json, Model, Remote, Seed, SeqLen, Tokens


@verb()
def doctor(
    model: Model,
    statistics: Annotated[Path, typer.Argument(metavar="STATS", help="What conmoe calibrate wrote.")],
    plan: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="What conmoe plan made of it; without, only STATS is seen.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="SPEC",
            help="Text that was not calibrated on, to measure the plan's layers on: a file or a data set of the hub. "
            "Repeatable.",
        ),
    ] = None,
    tokens: Tokens = 8192,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    no_halves: Annotated[
        bool, typer.Option("--no-halves", help="Do not make the plan again on halves of the token sample.")
    ] = False,
    device: Device = "cpu",
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 1 if there is any warning.")] = False,
    json: Json = False,
    trust_remote_code: Remote = False,
) -> None:
    """Whether there was text enough, whether a plan fits its sample only, and where its prediction fails.

    Nothing is written. The plan is made twice more, on halves of the token sample; layers are measured one by one.

    Example: `conmoe doctor allenai/OLMoE-1B-7B-0125 stats plan --data wikitext2.txt`
    """
    from conmoe.cli import notes
    from conmoe.cli.read import read_data, read_device

    folder = conmoe.locate(model)
    text = None
    if data:
        text = read_data(folder, data, tokens, seq_len, seed, trust_remote_code, part="evaluation")
        notes.overlapping(text, conmoe.read_manifest(statistics).documents)
    found = conmoe.doctor(
        folder,
        statistics,
        plan,
        data=text,
        halves=not no_halves,
        device=read_device(device),
        trust_remote_code=trust_remote_code,
        progress=console.Bars(),
    )
    if json:
        console.emit(found.model_dump(mode="json"))
    else:
        console.stdout.print(tables.uses_table(found))
        if found.planned:
            console.stdout.print(tables.planned_table(found))
        for advice in found.warnings:
            console.stdout.print(f"Warning: {advice.text}", soft_wrap=True)
        if not found.warnings:
            console.stdout.print("Nothing to warn of.")
    if strict and found.warnings:
        raise typer.Exit(1)
