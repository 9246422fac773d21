"""The plots of a report as PNG and SVG, for papers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conmoe.portrait import LayerPortrait, Portrait
from conmoe.report import plots
from conmoe.report.gather import Findings
from conmoe.report.runs import Run
from conmoe.types import UsageError

KEPT, REDIRECTED, DROPPED, CONSTANT = "#174a8b", "#5f93cf", "#8b929c", "#b0761a"
COLOURS = {"kept": KEPT, "redirected": REDIRECTED, "dropped": DROPPED, "constant": CONSTANT}


def check_matplotlib() -> None:
    """Raise a UsageError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise UsageError('Figures need matplotlib; pip install "conmoe[report]" brings it.')


def draw(found: Findings, folder: Path) -> tuple[Path, ...]:
    """Every plot that ``found`` has numbers for, once as PNG and once as SVG."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def save(figure: Any, name: str) -> None:
        for suffix in ("png", "svg"):
            written.append(folder / f"{name}.{suffix}")
            figure.savefig(written[-1], dpi=200, bbox_inches="tight")

    if any(plots.drawable(run) for run in found.runs):
        figure = Figure(figsize=(6.0, 3.6))
        _quality(figure.subplots(), found)
        save(figure, "quality")
    for number, run in enumerate(found.runs, start=1):
        if run.portrait is None:
            continue
        figure = Figure(figsize=(6.0, 2.6))
        _errors(figure.subplots(), run.portrait)
        save(figure, f"{number}-errors")
        _maps(Figure, save, f"{number}", run)
    return tuple(written)


def _quality(axes: Any, found: Findings) -> None:
    front = plots.frontier(found.runs)
    for index, run in enumerate(found.runs):
        if plots.drawable(run):
            kl, best = run.numbers["kl"], index in front
            axes.errorbar(
                100 * (run.share or 0.0), kl.value, yerr=kl.stderr, fmt="o", color=KEPT if best else "#8a929c"
            )
            axes.annotate(f" {index + 1}", (100 * (run.share or 0.0), kl.value), fontsize=8)
    axes.plot(
        [100 * (found.runs[i].share or 0.0) for i in front],
        [found.runs[i].numbers["kl"].value for i in front],
        "--",
        color=KEPT,
        lw=1,
    )
    axes.set(xlabel="size, % of the source", ylabel="KL, nats per token", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.grid(alpha=0.3)


def _errors(axes: Any, portrait: Portrait) -> None:
    """Experts kept, as bars, and the share of each layer's output that is lost."""
    places = range(len(portrait.scopes))
    axes.bar(places, [len(scope.made_of) for scope in portrait.scopes], color=DROPPED, width=0.7)
    axes.set_xticks(list(places), [",".join(map(str, scope.layers)) for scope in portrait.scopes], fontsize=7)
    axes.set(xlabel="layer", ylabel="experts kept")
    axes.yaxis.get_major_locator().set_params(integer=True)
    beside = axes.twinx()
    planned = [(x, scope.planned) for x, scope in enumerate(portrait.scopes)]
    known = [(x, each.sample) for x, each in planned if each.sample]
    if known:
        errors = [each.stderr or 0.0 for _, each in known]
        beside.errorbar(
            [x for x, _ in known], [each.value for _, each in known], yerr=errors, fmt="o", color=KEPT, label="measured"
        )
    told = [(x, each.predicted) for x, each in planned if each.predicted is not None]
    if told:
        beside.plot([x for x, _ in told], [value for _, value in told], "x", color=CONSTANT, label="predicted")
    if known or told:
        beside.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    beside.set_ylabel("share of output lost")
    beside.set_ylim(bottom=0)


def _maps(figure_of: Any, save: Any, number: str, run: Run) -> None:
    assert run.portrait is not None
    for scope in run.portrait.scopes:
        name = "-".join(map(str, scope.layers))
        figure = figure_of(figsize=(6.0, 2.2))
        _map(figure.subplots(), scope)
        save(figure, f"{number}-map-{name}")
        if scope.similarity:
            figure = figure_of(figsize=(3.0, 3.0))
            axes = figure.subplots()
            low, high = plots.similarity_range(scope)
            axes.imshow(scope.similarity, cmap="Blues", vmin=low, vmax=high)
            axes.set(xticks=[], yticks=[], xlabel=f"experts of layer {name}; cosine {low:.2f} to {high:.2f}")
            save(figure, f"{number}-similarity-{name}")


def _map(axes: Any, scope: LayerPortrait) -> None:
    drawn = plots.expert_map(scope)
    axes.bar(
        range(len(drawn.bars)), [bar.height for bar in drawn.bars], color=[COLOURS[bar.fate] for bar in drawn.bars]
    )
    for start, end in drawn.lines:
        axes.plot([start, end], [0, -0.6], color=REDIRECTED, lw=0.8)
    kept = [index for index, bar in enumerate(drawn.bars) if bar.fate == "kept"]
    axes.plot(kept, [-0.63] * len(kept), "s", color=KEPT, ms=3)
    axes.set(yticks=[], xlabel=f"experts of layer {', '.join(map(str, scope.layers))}")
    axes.spines[["top", "right", "left"]].set_visible(False)
