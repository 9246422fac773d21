"""``conmoe budgets``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import conmoe
from conmoe.cli import console
from conmoe.cli.app import verb
from conmoe.cli.arguments import Json

if TYPE_CHECKING:
    from conmoe.registry import Budget


@verb("budgets")
def list_budgets(json: Json = False) -> None:
    """Every budget: how experts are shared out over the layers, with its options.

    Example: `conmoe budgets`
    """
    if json:
        console.emit({name: _record(item) for name, item in conmoe.budgets().items()})
        return
    for name, item in conmoe.budgets().items():
        console.stdout.print(name, style="bold")
        if item.paper:
            console.stdout.print(f"  {item.paper}")
        console.stdout.print(f"  {item.help.splitlines()[0]}")
        for option in item.options.values():
            choices = f" one of {', '.join(map(str, option.choices))};" if option.choices else ""
            console.stdout.print(f"  --budget-option {option.name}={option.default}:{choices} {option.help}")


def _record(item: Budget) -> dict[str, Any]:
    options = {
        option.name: {"default": option.default, "choices": list(option.choices), "help": option.help}
        for option in item.options.values()
    }
    return {"paper": item.paper, "even": item.even, "help": item.help, "options": options}
