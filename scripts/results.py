"""Write docs/results.md, and the table of the README, from the benches in benchmarks/results/*.json.

``--check`` only compares.

python scripts/results.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from conmoe.report.bench import facts, legend, table
from conmoe.report.numbers import with_error
from conmoe.results import GROUPS, Bench, Row, load_bench

ROOT = Path(__file__).parent.parent
FOLDER, PAGE, README = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md", ROOT / "README.md"
#: Between these lines of the README stands the table.
MARKS = "<!-- table from docs/results.md -->", "<!-- end of table -->"
NOTICE = "<!-- written by scripts/results.py from benchmarks/results/*.json; do not edit -->"
HOW = """Every number below was measured by `conmoe bench` and is kept, with the runs behind it, in a file of
`benchmarks/results`. To measure again, run the command that stands above a table, copy its `bench.json` over that file,
and run `python scripts/results.py`. All methods of a table read the same statistics and are measured on the same
text; what failed or lost is listed with the rest."""

#: What ``conmoe compress`` does by default, and the same in closed form, as candidates of a bench.
_ON_THE_WAY = "sequential=true,sample=65536"
REFIT = {
    "shared": f"conmoe:refine=refit,{_ON_THE_WAY}",
    "sliced": f"conmoe:refine=refit,form=sliced,{_ON_THE_WAY}",
}
STANDARD = {
    "shared": f"conmoe:refine=reconstruct,{_ON_THE_WAY}",
    "sliced": f"conmoe:refine=reconstruct,form=sliced,{_ON_THE_WAY}",
}
HALF, QUARTER = "0.5", "0.25"
SUMMARY = """KL to the source in nats per token, on held-out text, with half of the routed experts (the last column: a
quarter). *published*: the best of all published methods here for that text, by name; *standard*: what `conmoe compress`
makes of the same calibration text by default, in the shared and in the sliced form; *refit*: the same in closed form
(`--effort quick --tokens 65536 --sample 65536`); in brackets, as a share of REAP's. ± one standard error over
calibration seeds."""

#: One keep, one domain: the rows that have a number there, the lowest KL first.
Cells = Mapping[tuple[str, str], Sequence[Row]]


def page(benches: Mapping[str, Bench]) -> str:
    """The whole of docs/results.md, from benches by the name of their files."""
    parts = ["# Results", NOTICE, HOW, *overview(benches)]
    for name, bench in benches.items():
        parts += [f"## {name}", facts(bench), legend(bench), *standings(bench)]
        for keep in bench.keeps:
            parts += [
                f"### {name}, keep {keep}",
                table(bench, keep, ("kl", "top1_agreement"), grouped=True),
                group_winners(bench, keep),
            ]
    if not benches:
        parts.append("No bench is kept yet.")
    return "\n\n".join(part for part in parts if part) + "\n"


def overview(benches: Mapping[str, Bench]) -> list[str]:
    """One line for each model and domain on which the default and REAP were measured."""
    lines = summary(benches)
    return ["## In one look", SUMMARY, "\n".join(lines), "\n".join(goals(benches))] if lines else []


def goals(benches: Mapping[str, Bench]) -> list[str]:
    """Of what was aimed at, how much was reached, and where it was not."""
    found: Mapping[str, Callable[[Mapping[str, Row], Mapping[str, Row], str], bool]] = {
        "standard, shared: a fifth of REAP's KL at most": lambda rows, few, domain: _share(rows, "shared", domain, 5),
        "standard, sliced: a third of REAP's at most": lambda rows, few, domain: _share(rows, "sliced", domain, 3),
        "standard, shared: half of the best published method's at most": lambda rows, few, domain: (
            _kl(rows[STANDARD["shared"]], domain) * 2
            <= min(_kl(row, domain) for name, row in rows.items() if ":" not in name)
        ),
        "a quarter of the experts, sliced: no more than REAP's with half of them": lambda rows, few, domain: (
            STANDARD["sliced"] in few and _kl(few[STANDARD["sliced"]], domain) <= _kl(rows["reap"], domain)
        ),
    }
    places = [(bench, rows, few, domain) for bench, rows, few in _measured(benches) for domain in bench.evaluation]
    lines = ["What was aimed at, on every model and text:", ""]
    for goal, reached in found.items():
        missed = [f"{bench.model} on {domain}" for bench, rows, few, domain in places if not reached(rows, few, domain)]
        but = f"; not on {', '.join(missed)}" if missed else ""
        lines.append(f"- {goal}: {len(places) - len(missed)} of {len(places)}{but}.")
    return lines


def _share(rows: Mapping[str, Row], form: str, domain: str, part: int) -> bool:
    return _kl(rows[STANDARD[form]], domain) * part <= _kl(rows["reap"], domain)


def _measured(benches: Mapping[str, Bench]) -> Iterator[tuple[Bench, Mapping[str, Row], Mapping[str, Row]]]:
    """Each bench of REAP and the default, its rows at half of the experts, and at a quarter those of its model."""
    for bench in benches.values():
        rows = {row.name: row for row in bench.at(HALF) if row.error is None}
        if {"reap", *STANDARD.values()} <= set(rows):
            quarters = [each for each in benches.values() if each.model_fingerprint == bench.model_fingerprint]
            yield bench, rows, {row.name: row for each in quarters for row in each.at(QUARTER) if row.error is None}


def summary(benches: Mapping[str, Bench]) -> list[str]:
    """The lines of that table, or none."""
    headings = ["model", "text", "reap", "published", *(f"{kind}, {form}" for kind, form in _OURS), "quarter"]
    lines = []
    for bench, rows, few in _measured(benches):
        published = [row for row in rows.values() if ":" not in row.name]
        for domain in bench.evaluation:
            reap = rows["reap"]
            winner = min(published, key=lambda row: _kl(row, domain))
            cells = [bench.model, domain, _shown(reap, domain), f"{_shown(winner, domain)} `{winner.name}`"]
            cells += [_beside(rows.get(names[form]), reap, domain) for (_, form), names in _OURS.items()]
            cells.append(_beside(few.get(STANDARD["sliced"]), reap, domain))
            lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    return [f"| {' | '.join(headings)} |", f"| --- | --- |{' ---: |' * (len(headings) - 2)}", *lines]


#: What is done and in which form -> the candidates' names by form.
_OURS = {
    ("refit", "shared"): REFIT,
    ("refit", "sliced"): REFIT,
    ("standard", "shared"): STANDARD,
    ("standard", "sliced"): STANDARD,
}


def _beside(row: Row | None, reap: Row, domain: str) -> str:
    return "" if row is None else f"{_shown(row, domain)} ({_kl(row, domain) / _kl(reap, domain):.2f})"


def readme(text: str, benches: Mapping[str, Bench]) -> str:
    """The README with its table made anew."""
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        return text
    return "\n".join([before + mark, "", *summary(benches), "", end + after])


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
    wanted = {PAGE: page(benches), README: readme(README.read_text(), benches)}
    if "--check" not in sys.argv:
        for file, text in wanted.items():
            file.write_text(text)
        return 0
    stale = [file.name for file, text in wanted.items() if not file.is_file() or file.read_text() != text]
    if stale:
        print(f"stale: {', '.join(stale)}; run python scripts/results.py", file=sys.stderr)
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
