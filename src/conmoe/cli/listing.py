"""How what is registered is listed: what it says of itself, and its options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from conmoe.cli import console

if TYPE_CHECKING:
    from conmoe.registry import Budget, Method, Refinement


def show(item: Method | Budget | Refinement, facts: Iterable[str], flag: str) -> None:
    """Print a name, lines of facts, the first line of the help, and each option as ``flag`` takes it."""
    console.stdout.print(item.name, style="bold")
    for line in (*filter(None, facts), item.help.splitlines()[0]):
        console.stdout.print(f"  {line}")
    for option in item.options.values():
        choices = f" one of {', '.join(map(str, option.choices))};" if option.choices else ""
        console.stdout.print(f"  {flag} {option.name}={option.default}:{choices} {option.help}")


def record(item: Method | Budget | Refinement, **facts: Any) -> dict[str, Any]:
    """The same as data."""
    options = {
        option.name: {"default": option.default, "choices": list(option.choices), "help": option.help}
        for option in item.options.values()
    }
    return {**facts, "help": item.help, "options": options}
