"""Numbers as a person reads them, and tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from conmoe.report.numbers import size as size
from conmoe.report.numbers import with_error

if TYPE_CHECKING:
    from conmoe.evaluate import Fidelity, Measured


def fidelity_table(title: str, rows: Sequence[tuple[str, str, Fidelity]]) -> Group:
    """Name, form and fidelity of one or several results, narrow enough for 80 characters."""
    paired = any(found.kl for _, _, found in rows)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold", min_width=10)
    for heading in ("size", *(("KL", "agreement", "excess loss") if paired else ("loss",)), "ppl"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, form, found in rows:
        numbers = [measured(found.kl), measured(found.top1_agreement, percent=True), measured(found.excess_loss)]
        table.add_row(
            f"{name} ({form})" if form else name,
            size(found.bytes),
            *(numbers if paired else [measured(found.loss)]),
            f"{found.perplexity.value:.4g}",
        )
    what = "KL and loss" if paired else "Loss"
    note = Text(f"{what} in nats per token; ± one standard error over sequences.", style="dim")
    return Group(Text(title, style="italic"), table, note)


def facts(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of two columns."""
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def measured(number: Measured | None, *, percent: bool = False) -> str:
    return "-" if number is None else with_error(number.value, number.stderr, percent=percent)


def quantity(number: float) -> str:
    for unit, step in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= step:
            return f"{number / step:.2f}{unit}"
    return f"{number:.3g}"


def ranges(counts: Sequence[int]) -> str:
    """Ascending counts; a long run of neighbours by its ends."""
    if len(counts) > 12 and counts[-1] - counts[0] == len(counts) - 1:
        return f"{counts[0]} to {counts[-1]}"
    return ", ".join(map(str, counts)) if len(counts) <= 24 else f"{counts[0]}, {counts[1]}, ... {counts[-1]}"
