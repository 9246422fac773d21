"""``conmoe plan``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import conmoe
from conmoe.cli import console
from conmoe.cli.app import verb
from conmoe.cli.arguments import (
    BudgetName,
    BudgetOptions,
    Device,
    Fit,
    Force,
    FormName,
    Keep,
    Layers,
    MethodName,
    Model,
    Options,
    Protect,
    Refine,
    RefineOptions,
    Remote,
    Scope,
    Sequential,
    SequentialSample,
)
from conmoe.cli.console import say
from conmoe.methods import DEFAULT_METHOD


@verb()
def plan(
    model: Model,
    statistics: Annotated[Path, typer.Argument(metavar="STATS", help="What conmoe calibrate wrote.")],
    out: Annotated[Path, typer.Argument(metavar="PLAN", help="The folder to write.")],
    keep: Keep = None,
    fit: Fit = "",
    method: MethodName = DEFAULT_METHOD,
    option: Options = None,
    layers: Layers = "",
    budget: BudgetName = "",
    budget_option: BudgetOptions = None,
    protect: Protect = None,
    scope: Scope = 1,
    sequential: Sequential = False,
    refine: Refine = "none",
    refine_option: RefineOptions = None,
    sample: SequentialSample = 0,
    form: FormName = None,
    device: Device = "cpu",
    force: Force = False,
    trust_remote_code: Remote = False,
) -> None:
    """Decide which experts stay and who answers for whom. The model is not run, unless the budget is searched for.

    Example: `conmoe plan allenai/OLMoE-1B-7B-0125 stats plan --method reap --keep 48`
    """
    from conmoe.cli import notes
    from conmoe.cli.read import read_device, read_options, read_request
    from conmoe.parallel import refuse_several

    folder = conmoe.locate(model)
    refuse_several("plan")
    request = read_request(
        method,
        keep,
        option,
        protect,
        scope,
        form,
        read_device(device),
        trust_remote_code,
        layers,
        budget,
        budget_option,
        sequential,
        refine,
        read_options("--refine-option", refine_option),
        sample,
        fit=fit,
    )
    made = conmoe.plan(folder, statistics, out, request, force=force, progress=console.Bars())
    notes.protected(made)
    say(f"The plan is in {out}; read {out / 'plan.json'}, or apply it with conmoe apply.")
