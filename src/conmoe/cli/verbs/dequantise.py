"""``conmoe dequantise``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import Force, Model, Remote
from conmoe.cli.console import say


@verb()
def dequantise(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to write.")],
    force: Force = False,
    trust_remote_code: Remote = False,
) -> None:
    """Write a checkpoint in FP8 or compressed-tensors in full precision, so that new experts can be made of it.

    Example: `conmoe dequantise Qwen/Qwen3-30B-A3B-FP8 qwen-bf16`
    """
    from conmoe.parallel import refuse_several

    refuse_several("dequantise")
    folder = conmoe.locate(model)
    with console.Bars().stage("dequantise", 0, "bytes") as advance:
        done = conmoe.dequantise(folder, out, force=force, trust_remote_code=trust_remote_code, advance=advance)
    say(f"{out}: {tables.size(done.bytes)} from {tables.size(done.source_bytes)}.")
