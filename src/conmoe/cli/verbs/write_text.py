"""``conmoe write-text``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console
from conmoe.cli.app import verb
from conmoe.cli.arguments import Device, Force, Model, Remote
from conmoe.cli.console import say


@verb("write-text")
def write_text(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; the text is OUT/text.jsonl.")],
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="How many tokens to write at least.")] = 65536,
    length: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a document at most.")] = 512,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Documents that are written at once.")] = 16,
    temperature: Annotated[float, typer.Option(help="1 is the model's own distribution.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text on the same machine.")] = 0,
    device: Device = "auto",
    force: Force = False,
    trust_remote_code: Remote = False,
) -> None:
    """Let a model write its own calibration text, for where there is no text of its users. Loads the whole model.

    Any engine that samples from the model can write it as well, one document a line.

    Example: `conmoe write-text allenai/OLMoE-1B-7B-0125 own-text`, then `--data own-text/text.jsonl`
    """
    from conmoe.cli.read import read_device

    with console.Bars().stage("write", tokens, "tokens") as advance:
        file = conmoe.write_text(
            conmoe.locate(model),
            out,
            tokens=tokens,
            length=length,
            batch=batch,
            temperature=temperature,
            seed=seed,
            device=read_device(device),
            trust_remote_code=trust_remote_code,
            force=force,
            advance=advance,
        )
    say(f"The text is in {file}.")
