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
    from conmoe.diagnosis import Diagnosis, Estimate
    from conmoe.evaluate import Fidelity, Measured
    from conmoe.report.runs import Run
    from conmoe.slicing import Slicing


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


def held_out(fidelity: Fidelity, texts: Sequence[str]) -> str:
    """What a measurement is about, as a title: how many tokens of which texts."""
    from conmoe.report.measured import text_names

    names = "; ".join(text_names(texts))
    return f"{fidelity.tokens:,} held-out tokens: {names}" if names else f"{fidelity.tokens:,} held-out tokens"


def runs_table(runs: Sequence[Run]) -> Group:
    """What a report shows first, narrow enough for 80 characters."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("result", overflow="fold", min_width=10)
    for heading in ("size", "of source", "KL", "agreement"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, run in enumerate(runs, start=1):
        kl, agreement = run.numbers.get("kl"), run.numbers.get("top1_agreement")
        table.add_row(
            str(number),
            f"{run.name} failed" if run.error else run.name,
            size(run.bytes) if run.bytes else "-",
            f"{run.share:.1%}" if run.share else "-",
            with_error(kl.value, kl.stderr) if kl else "-",
            with_error(agreement.value, agreement.stderr, percent=True) if agreement else "-",
        )
    return Group(table, Text("KL in nats per token; ± one standard error.", style="dim"))


def facts(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of two columns."""
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def uses_table(found: Diagnosis) -> Group:
    """How well the calibration text covers the experts of each layer."""
    first = found.uses[0]
    table = _narrow("layer", "least", "median", "never", "few", "busiest", "effective")
    for use in found.uses:
        row = (use.layer, use.least, f"{use.median:g}", use.never, use.few)
        table.add_row(*map(str, row), f"{use.busiest:.0%}", f"{use.effective:.1f}")
    title = f"{first.tokens:,} tokens, {first.experts} experts in a layer"
    note = (
        "Tokens of the least used and the median expert; experts without any, and with some but fewer than 32; share "
        "of choices on the most used eighth; experts that, evenly used, would be as uneven."
    )
    return Group(Text(title, style="italic"), table, Text(note, style="dim"))


def planned_table(found: Diagnosis) -> Group:
    """What a plan leaves of each layer's output, by its own account and as measured."""
    fresh = any(each.fresh for each in found.planned)
    headings = ("predicted", "measured", "expected", *(("fresh",) if fresh else ()), "own", "other", "kept", "same")
    table = _narrow("layers", "experts", *headings)
    for each in found.planned:
        halves = each.halves
        numbers = [
            "-" if each.predicted is None else f"{each.predicted:.3f}",
            _share(each.sample),
            _share(each.expected),
            *([_share(each.fresh)] if fresh else []),
            _share(halves.own if halves else None),
            _share(halves.other if halves else None),
            "-" if halves is None or halves.kept_alike is None else f"{halves.kept_alike:.0%}",
            "-" if halves is None or halves.answers_alike is None else f"{halves.answers_alike:.0%}",
        ]
        layers = "-".join(map(str, dict.fromkeys((each.layers[0], each.layers[-1]))))
        table.add_row(layers, f"{each.prototypes}/{each.experts}", *numbers)
    title = f"{found.method}, keep {found.keep}, refine {found.refine}"
    chance = next((each.halves.by_chance for each in found.planned if each.halves and each.halves.by_chance), None)
    note = (
        "Share of the energy of a layer's routed output that is lost: by the method's account, on the sample, on new "
        "tokens of its kind"
        + (", on the other text" if fresh else "")
        + "; by plans from half of the sample, on their own half and on the other; kept experts that these two agree on"
        + (f" ({chance:.0%} by chance)" if chance else "")
        + ", and experts with the same prototype or fate."
    )
    if any(each.sequential for each in found.planned):
        note += " The plan was made behind the compressed layers before each; here each has the source's own inputs."
    missing = [Text(f"Layer {each.layers[0]}: {each.untold}.", style="dim") for each in found.planned if each.untold]
    return Group(Text(title, style="italic"), table, Text(note, style="dim"), *missing)


def slicing_table(found: Slicing) -> Group:
    """What each layer loses without its map, as it is and at best."""
    table = _narrow("layer", "redirected", "with map", "without", "at best", "rows")
    for loss in found.layers:
        numbers = [with_error(each.value, each.stderr or 0.0) for each in (loss.mapped, loss.dropped, loss.sliced)]
        table.add_row(str(loss.layer), str(loss.redirected), *numbers, loss.rows)
    note = (
        "Share of the energy of a layer's routed output that is lost, on held-out tokens, ± one standard error: by the "
        f"plan with its map; without; with the rows of the last column and refinement {found.refine}."
    )
    return Group(table, Text(note, style="dim"))


def _narrow(first: str, *headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _share(found: Estimate | None) -> str:
    return "-" if found is None else f"{found.value:.3f}"


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
