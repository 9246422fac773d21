"""The table of a bench in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from conmoe.report.numbers import size, with_error
from conmoe.results import GROUPS, Bench, Number, Row

#: Column -> heading, whether it is a share, whether more is better.
COLUMNS: Mapping[str, tuple[str, bool, bool]] = {
    "kl": ("KL", False, False),
    "top1_agreement": ("agreement", True, True),
    "excess_loss": ("excess loss", False, False),
}


def markdown(bench: Bench) -> str:
    """The whole of ``bench.md``: what was done, and one table for each keep."""
    parts = [f"# Bench of {bench.model}", facts(bench)]
    for keep in bench.keeps:
        parts += [f"## Keep {keep}", table(bench, keep)]
    return "\n\n".join([*parts, legend(bench)]) + "\n"


def facts(bench: Bench) -> str:
    """Model, texts and versions, as a list."""
    first = bench.calibrations[0]
    lines = [
        f"- Model: {bench.model} ({bench.family}), {bench.layers} MoE layers of {bench.experts} experts, top "
        f"{bench.top_k}, {size(bench.source_bytes)}, fingerprint `{bench.model_fingerprint[:16]}`; computed in "
        f"{bench.dtype} on {bench.device}.",
        f"- Calibration: {first.tokens:,} tokens (sample {first.sample:,}), "
        f"{_seeds([each.seed for each in bench.calibrations])}, of {'; '.join(first.data)}.",
    ]
    for name, domain in bench.evaluation.items():
        known = f", {domain.overlap:.0%} of its documents calibrated on" if domain.overlap else ""
        perplexity = domain.source_perplexity
        source = "" if perplexity is None else f"; the source's perplexity is {perplexity:.4g}"
        lines.append(
            f"- Domain `{name}`: {domain.tokens:,} tokens in {domain.sequences:,} sequences of {domain.seq_len:,} from "
            f"{', '.join(domain.data)}{known}{source}."
        )
    lines.append(f"- Versions: {', '.join(f'{name} {version}' for name, version in bench.versions.items())}.")
    if bench.command:
        lines.append(f"- Command: `{bench.command}`")
    return "\n".join(lines)


def table(bench: Bench, keep: str, columns: Sequence[str] = tuple(COLUMNS), *, grouped: bool = False) -> str:
    """The rows of one keep: the lowest mean KL first, the best number of each column in bold, failures last.

    ``grouped`` puts the weight-preserving before those in closed form, and these before reconstructions.
    """
    rows = bench.at(keep)
    if grouped:
        rows = tuple(sorted(rows, key=lambda row: GROUPS.index(row.group) if row.group in GROUPS else len(GROUPS)))
    best = _best(rows, columns, bench.evaluation)
    headings = [f"{COLUMNS[column][0]}, {name}" for name in bench.evaluation for column in columns]
    lines = [
        _line(["method", "group", "form", *headings, "size", "of the source", "plan, s"]),
        _line(["---"] * 3 + ["---:"] * (len(headings) + 3)),
    ]
    for row in rows:
        name = f"`{row.name}`"
        if row.error is not None:
            lines.append(_line([name, f"failed: {_cell(row.error)}", *[""] * (len(headings) + 4)]))
            continue
        numbers = [
            _shown(row.domains[domain][column], column, best[domain, column])
            for domain in bench.evaluation
            for column in columns
        ]
        form = f"{row.form}, approximate" if row.approximate else str(row.form)
        lines.append(_line([name, row.group or "", form, *numbers, *_costs(row)]))
    return "\n".join(lines)


def legend(bench: Bench) -> str:
    """What the numbers are."""
    text = (
        "KL(source || result) and excess loss in nats per token, agreement of the most likely token; the lowest mean "
        f"KL over domains comes first. ± one standard error over {bench.stderr_over}. Weight-preserving: nothing is "
        "stored but exact copies of experts and a map; closed form: weights, gains or constants were solved for; "
        "reconstruction: weights were fitted to each layer's output by gradient."
    )
    if any(row.approximate for row in bench.rows):
        text += " Approximate: the form cannot hold the plan's map, and what is shown is what it holds."
    return text


def _best(
    rows: Sequence[Row], columns: Sequence[str], domains: Mapping[str, object]
) -> dict[tuple[str, str], float | None]:
    def best(domain: str, column: str) -> float | None:
        values = [row.domains[domain][column].value for row in rows if row.error is None]
        return (max if COLUMNS[column][2] else min)(values, default=None)

    return {(domain, column): best(domain, column) for domain in domains for column in columns}


def _shown(number: Number, column: str, best: float | None) -> str:
    text = with_error(number.value, number.stderr, percent=COLUMNS[column][1])
    return f"**{text}**" if number.value == best else text


def _costs(row: Row) -> list[str]:
    return [size(row.bytes or 0), f"{row.share or 0:.1%}", f"{row.plan_seconds or 0:.2f}"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
