"""``conmoe refinements``"""

from __future__ import annotations

from dataclasses import asdict

import conmoe
from conmoe.cli import console
from conmoe.cli.app import verb
from conmoe.cli.arguments import Json
from conmoe.cli.listing import record, show


@verb("refinements")
def list_refinements(json: Json = False) -> None:
    """Every refinement: what can be fitted to each layer's own output after a plan, with its options, and the efforts.

    Example: `conmoe refinements`
    """
    if json:
        refinements = {name: record(item) for name, item in conmoe.refinements().items()}
        efforts = {name: asdict(effort) for name, effort in conmoe.EFFORTS.items()}
        console.emit({"refinements": refinements, "efforts": efforts})
        return
    for item in conmoe.refinements().values():
        show(item, [], "--refine-option")
    for name, effort in conmoe.EFFORTS.items():
        console.stdout.print(f"--effort {name}", style="bold")
        console.stdout.print(f"  {effort.what}; {effort.tokens:,} tokens of text")
