"""Write docs/results.md from the benches in benchmarks/results/*.json. ``--check`` only compares.

python scripts/results.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from conmoe.report.bench import facts, legend, table
from conmoe.report.numbers import with_error
from conmoe.results import GROUPS, Bench, Row, load_bench

ROOT = Path(__file__).parent.parent
FOLDER, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
NOTICE = "<!-- written by scripts/results.py from benchmarks/results/*.json; do not edit -->"
HOW = """Every number below was measured by `conmoe bench` and is kept, with the runs behind it, in a file of
`benchmarks/results`. To measure again, run the command that stands above a table, copy its `bench.json` over that file,
and run `python scripts/results.py`. All methods of a table read the same statistics and are measured on the same
text; what failed or lost is listed with the rest."""

#: One keep, one domain: the rows that have a number there, the lowest KL first.
Cells = Mapping[tuple[str, str], Sequence[Row]]


def page(benches: Mapping[str, Bench]) -> str:
    """The whole of docs/results.md, from benches by the name of their files."""
    parts = ["# Results", NOTICE, HOW]
    for name, bench in benches.items():
        parts += [f"## {name}", facts(bench), legend(bench), *standings(bench)]
        for keep in bench.keeps:
            parts += [
                f"### {name}, keep {keep}",
                table(bench, keep, ("kl", "top1_agreement")),
                group_winners(bench, keep),
            ]
    if not benches:
        parts.append("No bench is kept yet.")
    return "\n\n".join(part for part in parts if part) + "\n"


def standings(bench: Bench) -> list[str]:
    """Which candidate stands first most, and where it does best and worst: a mean hides both."""
    cells = {
        (keep, domain): sorted((row for row in bench.at(keep) if row.error is None), key=lambda row: _kl(row, domain))
        for keep in bench.keeps
        for domain in bench.evaluation
    }
    cells = {place: rows for place, rows in cells.items() if rows}
    names = dict.fromkeys(row.name for row in bench.rows)
    if not cells or len(names) < 2:
        return []
    ranks = {name: [_rank(name, rows, len(names)) for rows in cells.values()] for name in names}
    best = min(names, key=lambda name: fmean(ranks[name]))
    first = sum(rank == 1 for rank in ranks[best])
    sentence = (
        f"Best by mean rank: `{best}`, {fmean(ranks[best]):.1f} of {len(names)} over {len(cells)} cases (a keep and a "
        f"domain), first in {first} of them."
    )
    there = {place: rows for place, rows in cells.items() if best in {row.name for row in rows}}
    return [sentence, *_extremes(best, there), *_absences(best, bench)]


def _extremes(best: str, cells: Cells) -> list[str]:
    """Its KL as a multiple of the best other one's, where that is lowest and where it is highest."""

    def ratio(place: tuple[str, str]) -> float:
        mine = next(row for row in cells[place] if row.name == best)
        return _kl(mine, place[1]) / max(_kl(_best_other(best, cells[place]), place[1]), 1e-12)

    compared = [place for place, rows in cells.items() if len(rows) > 1]
    if not compared:
        return []
    lines = []
    for case, place in (("Best", min(compared, key=ratio)), ("Worst", max(compared, key=ratio))):
        keep, domain = place
        mine = next(row for row in cells[place] if row.name == best)
        other = _best_other(best, cells[place])
        lines.append(
            f"- {case} case: keep {keep}, {domain}: KL {_shown(mine, domain)}, number {_rank(best, cells[place], 0)} "
            f"of {len(cells[place])}; {ratio(place):.2f} times that of `{other.name}`, the best other "
            f"({_shown(other, domain)})."
        )
    return ["\n".join(lines)]


def _absences(best: str, bench: Bench) -> list[str]:
    failed = [row.keep for row in bench.rows if row.name == best and row.error is not None]
    return [f"It failed at keep {', '.join(failed)}."] if failed else []


def group_winners(bench: Bench, keep: str) -> str:
    """The best row of each group of methods."""
    winners = []
    for group in GROUPS:
        rows = [row for row in bench.at(keep) if row.error is None and row.group == group]
        if rows:
            winners.append(f"{group}: `{rows[0].name}` (mean KL {rows[0].kl:.4f})")
    return f"Best of each group: {'; '.join(winners)}." if winners else ""


def _best_other(name: str, rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row.name != name)


def _rank(name: str, rows: Sequence[Row], missing: int) -> int:
    return next((rank for rank, row in enumerate(rows, 1) if row.name == name), missing)


def _kl(row: Row, domain: str) -> float:
    return row.domains[domain]["kl"].value


def _shown(row: Row, domain: str) -> str:
    number = row.domains[domain]["kl"]
    return with_error(number.value, number.stderr)


def main() -> int:
    benches = {file.stem: load_bench(file) for file in sorted(FOLDER.glob("*.json"))}
    text = page(benches)
    if "--check" not in sys.argv:
        PAGE.write_text(text)
        return 0
    stale = not PAGE.is_file() or PAGE.read_text() != text
    if stale:
        print("stale: results.md; run python scripts/results.py", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
