"""``conmoe apply``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console, tables
from conmoe.cli.app import verb
from conmoe.cli.arguments import Force, FormName, Model, Mtp, Remote
from conmoe.cli.console import say


@verb()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="What conmoe plan wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to write.")],
    form: FormName = None,
    mtp: Mtp = "auto",
    force: Force = False,
    trust_remote_code: Remote = False,
) -> None:
    """Write the checkpoint that a plan describes.

    Example: `conmoe apply allenai/OLMoE-1B-7B-0125 plan olmoe-half --form sliced`
    """
    from conmoe.cli import notes
    from conmoe.cli.read import read_form, read_mtp
    from conmoe.parallel import refuse_several

    refuse_several("apply")
    folder, made = conmoe.locate(model), conmoe.read_plan(plan)
    with console.Bars().stage("apply", 0, "bytes") as advance:
        done = conmoe.apply(
            folder,
            made,
            out,
            form=read_form(form),
            mtp=read_mtp(mtp),
            force=force,
            trust_remote_code=trust_remote_code,
            advance=advance,
        )
    notes.approximate(made, done.form)
    notes.left_out(done)
    say(f"{out}: {tables.size(done.bytes)} of {tables.size(done.source_bytes)}, {done.form} form.")
