"""``conmoe methods``"""

from __future__ import annotations

import conmoe
from conmoe.cli import console
from conmoe.cli.app import verb
from conmoe.cli.arguments import Json
from conmoe.cli.listing import record, show


@verb("methods")
def list_methods(json: Json = False) -> None:
    """Every method with its paper, its needs, its options and its default form.

    Example: `conmoe methods --json`
    """
    if json:
        console.emit(
            {
                name: record(item, paper=item.paper, needs=item.needs, form=item.form)
                for name, item in conmoe.methods().items()
            }
        )
        return
    for item in conmoe.methods().values():
        show(item, [f"{item.paper}; {item.form} form; needs {', '.join(item.needs) or 'nothing'}"], "--option")
