"""``conmoe slice``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import Device, Force, Json, Model, RefineOptions, Remote
from conmoe.cli.console import say


@verb()
def slice(
    model: Model,
    statistics: Annotated[Path, typer.Argument(metavar="STATS", help="What conmoe calibrate wrote.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan that redirects experts.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the sliced plan to write.")],
    refine: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Fit the prototypes to the tokens that reach them without the map: reconstruct, refit, gains or none "
            "(router rows are chosen, nothing is fitted).",
        ),
    ] = "reconstruct",
    refine_option: RefineOptions = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            help="Fit each layer on inputs that passed through the sliced layers before it. By default where there is "
            "a refinement.",
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", min=0, help="Tokens of each layer on the way; 0: as in STATS.")
    ] = 0,
    device: Device = "cpu",
    force: Force = False,
    json: Json = False,
    trust_remote_code: Remote = False,
) -> None:
    """The best plan without a map that a plan with one can be turned into, and what each layer loses by it.

    For engines that load stock checkpoints only, such as llama.cpp. The prototypes stay; for each a router row is
    chosen, and they are fitted to the tokens that reach them.

    Example: `conmoe slice allenai/OLMoE-1B-7B-0125 stats plan sliced-plan`
    """
    from conmoe.cli.read import read_device, read_options
    from conmoe.parallel import refuse_several

    folder = conmoe.locate(model)
    refuse_several("slice")
    found = conmoe.slice_plan(
        folder,
        statistics,
        plan,
        out,
        refine=refine,
        refine_options=read_options("--refine-option", refine_option),
        sequential=sequential,
        sample=sample,
        device=read_device(device),
        force=force,
        trust_remote_code=trust_remote_code,
        progress=console.Bars(),
    )
    if json:
        console.emit(found.record.model_dump(mode="json"))
    else:
        console.stdout.print(tables.slicing_table(found.record))
    say(f"The plan is in {out}; write it with conmoe apply, and measure the result with conmoe evaluate.")
