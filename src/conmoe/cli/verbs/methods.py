"""``conmoe methods``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import conmoe
from conmoe.cli import console
from conmoe.cli.app import verb
from conmoe.cli.arguments import Json

if TYPE_CHECKING:
    from conmoe.registry import Method


@verb("methods")
def list_methods(json: Json = False) -> None:
    """Every method with its paper, its needs, its options and its default form.

    Example: `conmoe methods --json`
    """
    if json:
        console.emit({name: _record(item) for name, item in conmoe.methods().items()})
        return
    for name, item in conmoe.methods().items():
        console.stdout.print(name, style="bold")
        console.stdout.print(f"  {item.paper}; {item.form} form; needs {', '.join(item.needs) or 'nothing'}")
        console.stdout.print(f"  {item.help.splitlines()[0]}")
        for option in item.options.values():
            choices = f" one of {', '.join(map(str, option.choices))};" if option.choices else ""
            console.stdout.print(f"  --option {option.name}={option.default}:{choices} {option.help}")


def _record(item: Method) -> dict[str, Any]:
    options = {
        option.name: {"default": option.default, "choices": list(option.choices), "help": option.help}
        for option in item.options.values()
    }
    return {"paper": item.paper, "needs": item.needs, "form": item.form, "help": item.help, "options": options}
