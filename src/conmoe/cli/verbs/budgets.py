"""``conmoe budgets``"""

from __future__ import annotations

import conmoe
from conmoe.cli import console
from conmoe.cli.app import verb
from conmoe.cli.arguments import Json
from conmoe.cli.listing import record, show


@verb("budgets")
def list_budgets(json: Json = False) -> None:
    """Every budget: how experts are shared out over the layers, with its options.

    Example: `conmoe budgets`
    """
    if json:
        console.emit({name: record(item, paper=item.paper, even=item.even) for name, item in conmoe.budgets().items()})
        return
    for item in conmoe.budgets().values():
        show(item, [item.paper], "--budget-option")
