"""``report.html``: one file that opens anywhere and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from conmoe import __version__
from conmoe.artifacts import write_atomic
from conmoe.progress import Progress
from conmoe.report import plots
from conmoe.report.figures import check_matplotlib, draw
from conmoe.report.gather import Findings, gather
from conmoe.report.measured import Figure, amount
from conmoe.report.numbers import size, with_error
from conmoe.report.runs import Run, comparable
from conmoe.types import UsageError

REPORT_HTML = "report.html"
#: What may become of an expert, in words.
FATES = {"kept": "kept", "redirected": "answered for by another", "dropped": "dropped", "constant": "a constant"}
_MISSING = 'The report needs jinja2; pip install "conmoe[report]" brings it.'

#: The verdict: the first line whose share of agreeing tokens is reached, less one standard error.
VERDICTS = (
    (0.95, "On this text it says almost always what the source says."),
    (0.85, "Close to the source on this text."),
    (0.70, "A visibly different model: measure its tasks before it is used."),
    (-math.inf, "Far from the source: keep more experts, calibrate on text of its users, or tune it."),
)


def write_report(results: Sequence[Path], out: Path, *, title: str = "", figures: Path | None = None) -> Findings:
    """Draw what was measured.

    Args:
        results: what :func:`conmoe.report.gather.gather` reads.
        out: the HTML file; its folder is made.
        title: the heading; by default the name of the only run.
        figures: a folder for the same plots as PNG and SVG, by matplotlib.

    Returns:
        what was drawn.

    Raises:
        UsageError: nothing was given, or ``conmoe[report]`` is not installed.
        ConmoeError: a file is damaged.
    """
    if not results:
        raise UsageError("Name the results to report on: folders of compress, bench or demo, or JSON files.")
    if not available():
        raise UsageError(_MISSING)
    if figures is not None:
        check_matplotlib()
    if out.is_dir() or out.suffix != ".html":
        raise UsageError(f"{out} is no name for a page; name the file to write, such as {out.with_name(REPORT_HTML)}.")
    found = gather(results)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page(found, title or (found.runs[0].name if len(found.runs) == 1 else "Compressed models")))
    if figures is not None:
        draw(found, figures)
    return found


def write_default(folder: Path, out: Path, title: str, progress: Progress) -> None:
    """The report that other verbs write unasked; where jinja2 is missing, a note."""
    if available():
        write_report([folder], out, title=title)
    else:
        progress.note(f"No report was written. {_MISSING}")


def available() -> bool:
    return find_spec("jinja2") is not None


def page(found: Findings, title: str) -> str:
    """The whole file. All that was read is escaped; the page may load nothing, and runs only its own script."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    room = Path(str(files("conmoe.report")))
    environment = Environment(
        loader=FileSystemLoader(room), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "size": size,
        "number": number,
        "percent": lambda figure: number(figure, percent=True),
        "amount": _amount,
        "breakable": _breakable,
        "visible": _visible,
    }
    present = {fate for run in found.runs for fate in _fates(run)}
    script = (room / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(
        title=title,
        found=found,
        runs=list(enumerate(found.runs, start=1)),
        fates=[fate for fate in FATES if fate in present],
        fate_words=FATES,
        drawn=[(index, run) for index, run in enumerate(found.runs, start=1) if run.portrait],
        lost=[run for run in found.runs if run.portrait and (run.portrait.texts or run.portrait.not_finite)],
        told=[(index, run) for index, run in enumerate(found.runs, start=1) if run.facts],
        domains=list(dict.fromkeys(name for run in found.runs for name in run.domains)),
        head=headline(found.runs),
        verdict=verdict,
        other_text=other_text,
        comparable=comparable(found.runs),
        scatter=plots.scatter(found.runs) if len(found.runs) > 1 else None,
        expert_map=plots.expert_map,
        picture=plots.similarity_picture,
        plots=plots,
        style=(room / "page.css").read_text(encoding="utf-8"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        date=datetime.now(UTC).date().isoformat(),
    )


def headline(runs: Sequence[Run]) -> Run | None:
    """The run that the page speaks of first: the closest to its source, or the first if they cannot be compared."""
    measured = [run for run in runs if "kl" in run.numbers and not run.error]
    if not measured or not comparable(runs):
        return next(iter(measured or runs), None)
    return min(measured, key=lambda run: run.numbers["kl"].value)


def verdict(run: Run) -> str:
    """Two sentences, by the share of tokens for which the most likely token stays the same (``VERDICTS``)."""
    size_now = f"At {run.share:.0%} of the source's size" if run.share else "It"
    agreement = run.numbers.get("top1_agreement")
    if agreement is None:
        return f"{size_now}: how close it is to the source was not measured."
    sure = agreement.value - (agreement.stderr or 0.0)
    words = next(words for least, words in VERDICTS if not sure < least)
    text = f" of {', '.join(run.texts)}" if run.texts else ""
    same = f"its most likely next token is the source's at {agreement.value:.0%} of the places{text}"
    return f"{size_now}, {same}. {words}"


def other_text(run: Run) -> str:
    """A warning where a run was measured on text of another origin than it was calibrated on."""
    measured, calibrated = ({name.split(", ")[0] for name in names} for names in (run.texts, run.calibrated))
    if not measured or not calibrated or measured <= calibrated:
        return ""
    return f"It was calibrated on other text: {', '.join(run.calibrated)}."


def number(figure: Figure | None, percent: bool = False) -> str:
    return "-" if figure is None else with_error(figure.value, figure.stderr, percent=percent)


def _breakable(name: str) -> object:
    """A long name, escaped, that may break between its options."""
    from markupsafe import Markup

    parts = re.split(r"(?<=[:,/_-])", name)
    return Markup("<wbr>").join(parts)


def _visible(text: str) -> str:
    """Text of a table's cell: ends of lines as a sign, blanks one at a time, what cannot be seen left out."""
    lines = re.sub(r"\r?\n", " \N{DOWNWARDS ARROW WITH CORNER LEFTWARDS} ", text)
    shown = "".join(sign for sign in re.sub(r"[ \t]+", " ", lines) if sign.isprintable())
    return shown if shown.strip() else repr(text)


def _fates(run: Run) -> set[str]:
    scopes = run.portrait.scopes if run.portrait else ()
    return {bar.fate for scope in scopes for bar in plots.expert_map(scope).bars}


def _amount(figure: Figure | None, unit: str) -> str:
    return amount(figure, unit) if figure else "-"
