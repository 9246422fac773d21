"""A bench is the sum of its parts: what it says of a method is what the verbs, run one by one, would say."""

from __future__ import annotations

import importlib.util
import json
import math
import runpy
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import pytest

import conmoe
from conmoe import registry, trial
from conmoe.candidates import SETS, parse_candidate
from conmoe.cli.several import spread
from conmoe.cli.verbs.bench import read_domains
from conmoe.report.bench import markdown
from conmoe.results import UNITS, Bench, CalibrationRecord, Domain, Number, Row
from tests.commands import TEXT, runner
from tests.conftest import token_data
from tests.families import EXPERTS, TOP_K

OPTIONS = conmoe.Calibration(sample=64)
TEXTS = [token_data(6, 16, seed=seed) for seed in range(3)]
DOMAINS = {"far": token_data(5, 16, seed=8), "near": token_data(3, 16, seed=9)}
SCRIPT = Path(__file__).parent.parent / "scripts" / "results.py"


@pytest.fixture
def run(capsys):
    return runner(capsys)


def bench(model, out, names, keeps=("0.5",), seeds=1, domains=DOMAINS, **options):
    candidates = conmoe.parse_candidates(names)
    return conmoe.bench(model, out, candidates, keeps, TEXTS[:seeds], domains, options=OPTIONS, **options)


def row_of(made, name, keep="0.5"):
    (row,) = [row for row in made.rows if (row.name, row.keep) == (name, keep)]
    return row


def numbers(made):
    """Everything that is measured, and nothing that a clock says."""
    rows = [row.model_dump(exclude={"plan_seconds": True, "runs": {"__all__": {"plan_seconds"}}}) for row in made.rows]
    return rows, made.evaluation, made.calibrations


def ages(out, pattern):
    return {file.name: file.stat().st_mtime_ns for file in (out / "work").glob(pattern)}


# What a row says ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """A bench of several kinds of methods after two calibrations, and its folder."""
    names = [
        "reap",
        "conmoe",
        "random",
        "random:seed=5",
        "conmoe:fusion=frequency",
        "mone",
        "conmoe:form=sliced",
        "reap:refine=gains",
    ]
    out = tmp_path_factory.mktemp("bench") / "table"
    return bench(checkpoint("olmoe"), out, names, ("0.5", "6"), seeds=2), out


@pytest.mark.parametrize(("name", "options"), [("reap", {}), ("conmoe", {"fusion": "frequency"}), ("mone", {})])
def test_a_row_says_what_evaluate_says_of_the_written_checkpoint(name, options, made, checkpoint, tmp_path):
    model = checkpoint("olmoe")
    conmoe.calibrate(model, tmp_path / "statistics", TEXTS[1], replace(OPTIONS, seed=1))
    plan = conmoe.plan(model, tmp_path / "statistics", None, conmoe.Request(name, "6", options))
    applied = conmoe.apply(model, plan, tmp_path / "out")
    row = row_of(made[0], ":".join([name, *(f"{key}={value}" for key, value in options.items())]), "6")
    found = row.runs[1]
    assert (found.seed, found.form, found.statistics) == (1, applied.form, plan.statistics)
    assert found.prototypes == (6, 6)
    for domain, data in DOMAINS.items():
        written = conmoe.evaluate(tmp_path / "out", data, against=model)
        measured = found.domains[made[0].evaluation[domain].fingerprint]
        assert found.bytes == written.bytes
        assert (measured.tokens, measured.sequences) == (written.tokens, written.sequences)
        assert measured.source_loss == written.source_loss.value
        for unit in UNITS:
            expected = getattr(written, unit)
            assert measured.numbers[unit] == (expected.value, expected.stderr), unit


def test_a_row_is_the_mean_over_seeds_and_its_error_is_over_them(made):
    for row in made[0].rows:
        assert [run.seed for run in row.runs] == [0, 1]
        for domain, described in made[0].evaluation.items():
            for unit in UNITS:
                seeds = [run.domains[described.fingerprint].numbers[unit] for run in row.runs]
                number = row.domains[domain][unit]
                assert number.value == fmean(value for value, _ in seeds)
                assert number.stderr == pytest.approx(stdev(value for value, _ in seeds) / math.sqrt(2))
                assert number.stderr_sequences == pytest.approx(fmean(error for _, error in seeds))
        assert row.kl == pytest.approx(fmean(row.domains[domain]["kl"].value for domain in DOMAINS))
    assert row_of(made[0], "reap").domains["far"]["kl"].stderr > 0
    assert "2 calibration seeds" in made[0].stderr_over


def test_chance_is_drawn_anew_for_each_calibration_unless_its_seed_is_given(made):
    assert [run.options["seed"] for run in row_of(made[0], "random").runs] == [0, 1]
    assert [run.options["seed"] for run in row_of(made[0], "random:seed=5").runs] == [5, 5]


def test_of_one_seed_the_error_is_over_sequences(checkpoint, tmp_path):
    table = bench(checkpoint("olmoe"), tmp_path / "table", ["reap"])
    (run,) = table.rows[0].runs
    kl = table.rows[0].domains["far"]["kl"]
    assert (kl.value, kl.stderr) == run.domains[DOMAINS["far"].fingerprint].numbers["kl"]
    assert kl.stderr == kl.stderr_sequences
    assert "sequences" in table.stderr_over


def test_groups_and_forms_are_read_off_the_plans(made):
    described = {row.name: (row.group, row.form, row.approximate) for row in made[0].rows}
    assert described == {
        "reap": ("weight-preserving", "sliced", False),
        "conmoe": ("weight-preserving", "shared", False),
        "random": ("weight-preserving", "sliced", False),
        "random:seed=5": ("weight-preserving", "sliced", False),
        "conmoe:fusion=frequency": ("closed form", "shared", False),
        "mone": ("closed form", "shared", False),
        "conmoe:form=sliced": ("weight-preserving", "sliced", True),
        "reap:refine=gains": ("closed form", "sliced", False),
    }


def test_the_table_is_read_back_as_it_was(made):
    table, out = made
    assert conmoe.load_bench(out) == conmoe.load_bench(out / "bench.json") == table
    assert (out / "bench.md").read_text() == markdown(table)
    assert table.source_bytes > max(row.bytes for row in table.rows)


def test_every_method_and_every_ablation_has_a_row(checkpoint, tmp_path):
    table = bench(checkpoint("qwen2_moe"), tmp_path / "table", ["all", "ablations"], domains={"near": DOMAINS["near"]})
    assert {row.name for row in table.rows} == {*conmoe.methods(), *SETS["ablations"]}
    assert not [row.error for row in table.rows if row.error]
    kl = {row.name: row.kl for row in table.rows}
    assert len({kl[name] for name in SETS["ablations"]}) > len(SETS["ablations"]) // 2  # the switches do something
    assert row_of(table, "conmoe:scope=2").runs[0].options["scope"] == 2


# What fails -----------------------------------------------------------------------------------------------------------


def test_what_fails_is_a_row_that_says_why_and_the_rest_goes_on(checkpoint, tmp_path, monkeypatch):
    def broken(statistics, experts, keep):
        return 1 / 0

    broken_method = replace(conmoe.methods()["reap"], name="broken", function=broken)
    monkeypatch.setitem(registry._methods._items, "broken", broken_method)
    out, few = tmp_path / "table", str(TOP_K - 1)
    table = bench(checkpoint("olmoe"), out, ["broken", "reap", "conmoe"], (few, "0.5"), seeds=2)
    assert f"leaves {TOP_K - 1} experts, but every token goes to {TOP_K}" in row_of(table, "reap", few).error
    for keep in (few, "0.5"):
        assert row_of(table, "conmoe", keep).error is None
    error = row_of(table, "broken").error
    assert error.startswith("ZeroDivisionError: division by zero")
    assert "broken" in (out / "work" / error.split("work/")[1].removesuffix(").")).read_text()
    shown = [line for line in (out / "bench.md").read_text().splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in shown] == ["conmoe", "broken", "reap", *by_kl(table, "0.5"), "broken"]
    assert "| failed: ZeroDivisionError" in shown[-1]


def by_kl(table, keep):
    rows = [row for row in table.rows if row.keep == keep and row.error is None]
    return [row.name for row in sorted(rows, key=lambda row: row.kl)]


def test_a_failure_after_a_later_calibration_names_it(checkpoint, tmp_path, monkeypatch):
    reap, asked = conmoe.methods()["reap"], []

    def sometimes(statistics, experts, keep):
        asked.append(keep)
        if len(asked) > 2:  # two layers after the first calibration
            raise conmoe.ConmoeError("Not again.")
        return reap.function(statistics, experts, keep)

    monkeypatch.setitem(registry._methods._items, "sometimes", replace(reap, name="sometimes", function=sometimes))
    (row,) = bench(checkpoint("olmoe"), tmp_path / "table", ["sometimes"], seeds=3).rows
    assert row.error == "Calibration seed 1: Not again."
    assert len(row.runs) == 1
    assert row.kl is None
    assert len(asked) == 3


# Going on -------------------------------------------------------------------------------------------------------------


class Killer:
    """A progress that ends the run after so many results."""

    def __init__(self, results):
        self.left = results

    @contextmanager
    def stage(self, name, total, unit):
        def tell(done, total=None, doing=None):
            self.left -= done if name == "measure" else 0
            if not self.left:
                raise KeyboardInterrupt

        yield tell

    def note(self, text): ...


def test_a_killed_run_goes_on_to_the_same_table(checkpoint, tmp_path):
    model, names = checkpoint("olmoe"), ["reap", "conmoe", "mone"]
    with pytest.raises(KeyboardInterrupt):
        bench(model, tmp_path / "killed", names, seeds=2, progress=Killer(4))
    before = ages(tmp_path / "killed", "rows/*.json") | ages(tmp_path / "killed", "statistics-*/*")
    assert len(list((tmp_path / "killed/work/rows").iterdir())) == 4
    assert not (tmp_path / "killed" / "bench.json").exists()
    again = bench(model, tmp_path / "killed", names, seeds=2)
    after = ages(tmp_path / "killed", "rows/*.json") | ages(tmp_path / "killed", "statistics-*/*")
    assert before.items() <= after.items()
    assert numbers(again) == numbers(bench(model, tmp_path / "whole", names, seeds=2))


def test_a_domain_or_a_method_that_is_added_costs_only_itself(checkpoint, tmp_path):
    model, out = checkpoint("olmoe"), tmp_path / "table"
    first = bench(model, out, ["reap"], domains={"far": DOMAINS["far"]})
    statistics, rows = ages(out, "statistics-0/*"), ages(out, "rows/*")
    with pytest.raises(conmoe.UsageError, match="table of another bench"):
        bench(model, out, ["reap", "conmoe"], domains={"far": DOMAINS["far"]})
    bench(model, out, ["reap", "conmoe"], domains={"far": DOMAINS["far"]}, force=True)
    assert rows.items() <= ages(out, "rows/*").items()
    both = bench(model, out, ["reap"], force=True)
    assert row_of(both, "reap").domains["far"] == row_of(first, "reap").domains["far"]
    assert set(row_of(both, "reap").domains) == set(DOMAINS)
    one = bench(model, out, ["reap"], domains={"far": DOMAINS["far"]}, force=True)
    assert numbers(one) == numbers(first)
    assert ages(out, "statistics-0/*") == statistics
    assert {file.name for file in (out / "work").iterdir()} == {"rows", "statistics-0"}


def test_other_code_measures_again(checkpoint, tmp_path, monkeypatch):
    model, out = checkpoint("olmoe"), tmp_path / "table"
    first = bench(model, out, ["reap"])
    monkeypatch.setattr(trial, "_code", lambda: "another")
    assert numbers(bench(model, out, ["reap"])) == numbers(first)
    assert len(ages(out, "rows/*")) == 2


def test_a_folder_of_somebody_else_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(conmoe.UsageError, match="not written by conmoe"):
        bench(checkpoint("olmoe"), tmp_path / "notes", ["reap"], force=True)
    with pytest.raises(conmoe.UsageError, match="is a file"):
        bench(checkpoint("olmoe"), tmp_path / "file", ["reap"], force=True)
    with pytest.raises(conmoe.UsageError, match="in the source"):
        bench(checkpoint("olmoe"), checkpoint("olmoe") / "table", ["reap"])
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["thesis.txt"]


# Names ----------------------------------------------------------------------------------------------------------------


def test_names_stand_for_methods_with_options():
    everything = conmoe.parse_candidates(["all"])
    assert [candidate.name for candidate in everything] == list(conmoe.methods())
    assert [each.name for each in conmoe.parse_candidates(["reap", "ablations", "conmoe", "reap"])] == [
        "reap",
        *SETS["ablations"],
    ]
    request = parse_candidate("conmoe:redirect=drop, scope=2,form=shared").request
    assert (request.method, request.scope, request.form) == ("conmoe", 2, "shared")
    assert request.options == {"redirect": "drop"}
    request = parse_candidate("frequency:budget=evoesap,budget.population=8,sequential=true").request
    assert (request.budget, request.budget_options, request.sequential) == ("evoesap", {"population": "8"}, True)
    seeded = parse_candidate("frequency:budget=evoesap").at("0.5", 7, OPTIONS)
    assert (seeded.keep, seeded.options, seeded.budget_options) == ("0.5", {}, {"seed": 7})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raep", "did you mean 'reap'"),
        ("conmoe:redirct=drop", "did you mean 'redirect'"),
        ("conmoe:redirect=up", "takes one of"),
        ("conmoe:redirect", "METHOD:OPTION=VALUE"),
        ("conmoe:scope=two", "neighbouring layers"),
        ("conmoe:form=flat", "shared, sliced or expanded"),
        ("reap:budget=globl", "no budget 'globl'"),
        ("reap:budget=global,budget.spread=1", "no option of global 'spread'"),
        ("reap:sequential=1", "true or false"),
        ("reap:refine=more", "none, gains, reconstruct, refit"),
    ],
)
def test_a_wrong_name_is_refused_before_any_work(name, said):
    with pytest.raises(conmoe.UsageError, match=said):
        conmoe.parse_candidates(["reap", name])


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("M --keep 0.75 0.5 0.25 --all", "M --keep 0.75 --keep 0.5 --keep 0.25 --all"),
        ("M --keep 0.75 --keep 0.5", "M --keep 0.75 --keep 0.5"),
        ("M --keep=0.75 0.5 --out d", "M --keep=0.75 --keep 0.5 --out d"),
        ("--keep 0.5 M --all", "--keep 0.5 M --all"),
        ("--keep 0.5 M --keep 0.7 0.8", "--keep 0.5 M --keep 0.7 --keep 0.8"),
        ("--out d M --keep -1 -2", "--out d M --keep -1 -2"),
        ("M --keep 0.5 -- 0.7", "M --keep 0.5 -- 0.7"),
        ("M --out d e", "M --out d e"),
        ("M --all e", "M --all e"),
    ],
)
def test_a_repeatable_option_takes_every_word_up_to_the_next(typed, read):
    assert list(spread(typed.split(), {"--keep", "--out"}, {"--keep"}, 1)) == read.split()


def test_domains_are_named_by_the_user_or_by_their_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("wiki.txt", "code.jsonl.gz", "a=b.txt"):
        Path(name).touch()
    specs = ["wiki.txt", "python=code.jsonl.gz", "a=b.txt", "hub:c4:validation"]
    assert read_domains(specs) == {
        "wiki": "wiki.txt",
        "python": "code.jsonl.gz",
        "a=b": "a=b.txt",
        "hub:c4:validation": "hub:c4:validation",
    }
    assert read_domains([]) == {"builtin": None}
    with pytest.raises(conmoe.UsageError, match="two domains 'wiki'"):
        read_domains(["wiki.txt", "wiki=code.jsonl.gz"])
    with pytest.raises(conmoe.UsageError, match=r"none\.txt"):
        read_domains(["wiki=none.txt"])


@pytest.mark.parametrize("width", [80, 120])
def test_the_command_compares_and_fits_the_terminal(width, run, monkeypatch, checkpoint, tmp_path):
    monkeypatch.setattr("conmoe.cli.console.stdout._width", width)
    model, out, text = checkpoint("olmoe"), tmp_path / "table", tmp_path / "text.txt"
    text.write_text("<|endoftext|>\n".join(TEXT.format(number) for number in range(12)))
    sizes = ("--tokens", 768, "--seq-len", 32, "--eval-tokens", 128)
    methods = ("--methods", "reap", "conmoe", "conmoe:redirect=random")
    arguments = (model, "--keep", "0.75", "1", *methods, "--seeds", 2, "--data", text, *sizes, "--output", out)
    done = run("bench", *arguments, "--eval", f"a-text={text}")
    assert done.code == 0, done.err
    assert max(map(len, (line for line in done.out.splitlines() if "failed" not in line))) <= width
    assert "KL, a-text" in done.out.replace("\n", "")
    assert "reap failed: --keep 1 leaves 1 experts" in done.out
    assert "were calibrated on" in done.err
    assert str(out / "bench.md") in done.err
    table = conmoe.load_bench(out)
    assert table.keeps == ("0.75", "1")
    assert [record.seed for record in table.calibrations] == [0, 1]
    assert table.calibrations[0].data_fingerprint != table.calibrations[1].data_fingerprint
    assert table.command.startswith("conmoe bench ")
    assert "--keep 0.75 1 --methods reap conmoe" in table.command
    again = run("bench", *arguments, "--eval", f"a-text={text}", "--json")
    assert again.json["rows"] == json.loads((out / "bench.json").read_text())["rows"]


# Pages ----------------------------------------------------------------------------------------------------------------


def by_hand(kl, failed=()):
    """A bench with these KLs: ``{keep: {name: {domain: kl}}}``."""
    domains = sorted({domain for rows in kl.values() for row in rows.values() for domain in row})
    rows = []
    for keep, methods in kl.items():
        for name, values in methods.items():
            found = {
                domain: {unit: Number(value=value, stderr=0.01, stderr_sequences=0.02) for unit in UNITS}
                for domain, value in values.items()
            }
            mean = fmean(values.values())
            group = "closed form" if name.startswith("m") else "weight-preserving"
            fields = {"group": group, "form": "shared", "bytes": 5e6, "share": 0.5, "plan_seconds": 1.0}
            rows.append(Row(name=name, method=name, keep=keep, kl=mean, domains=found, **fields))
        rows += [Row(name=name, method=name, keep=keep, error=f"{name} | cannot.") for name in failed]
    text = {"data": ("text",), "fingerprint": "f", "tokens": 100, "sequences": 10, "seq_len": 10, "overlap": 0.0}
    calibration = {"tokens": 9, "sample": 9, "data": ("text",), "data_fingerprint": "f", "statistics": "s"}
    return Bench(
        key="k",
        command="conmoe bench tiny",
        versions={"conmoe": "0"},
        device="cpu",
        threads=1,
        dtype="float32",
        model="tiny",
        model_fingerprint="m",
        family="olmoe",
        layers=2,
        experts=EXPERTS,
        top_k=TOP_K,
        source_bytes=10_000_000,
        source_parameters=5,
        rows=rows,
        calibrations=tuple(CalibrationRecord(seed=seed, **calibration) for seed in range(2)),
        evaluation={name: Domain(**text, source_loss=2.0, source_perplexity=math.exp(2)) for name in domains},
    )


def test_the_best_of_each_column_is_bold_and_the_lowest_mean_first():
    table = by_hand({"0.5": {"a": {"x": 0.2, "y": 0.9}, "b": {"x": 0.4, "y": 0.3}}}, failed=["c"])
    lines = [line for line in markdown(table).splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["b", "a", "c"]
    # KL, agreement and excess loss of x, then of y; of agreement the highest is best
    bold = [[cell.startswith("**") for cell in line.split(" | ")[3:9]] for line in lines]
    assert bold[:2] == [[False, True, False, True, False, True], [True, False, True, False, True, False]]
    assert "failed: c \\| cannot." in lines[2]
    assert [line.count(" | ") for line in lines[:2]] == [11, 11]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def results_script():
    spec = importlib.util.spec_from_file_location("results_page", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_tell_best_and_worst_case_of_the_best_method():
    kl = {
        "0.75": {"a": {"x": 0.1, "y": 0.1}, "b": {"x": 0.3, "y": 0.2}, "mc": {"x": 0.2, "y": 0.4}},
        "0.25": {"a": {"x": 0.9, "y": 0.6}, "b": {"x": 0.8, "y": 0.7}, "mc": {"x": 0.6, "y": 0.9}},
    }
    text = results_script().page({"one": by_hand(kl, failed=["d"]), "two": by_hand({"4": {"b": {"z": 1.0}}})})
    # ranks of a: 1, 1, 3, 1; of b: 3, 2, 2, 2; of mc: 2, 3, 1, 3; d fails everywhere
    assert "Best by mean rank: `a`, 1.5 of 4 over 4 cases (a keep and a domain), first in 3 of them." in text
    best = "- Best case: keep 0.75, x: KL 0.100 ± 0.010, number 1 of 3; 0.50 times that of `mc`, the best other"
    worst = "- Worst case: keep 0.25, x: KL 0.900 ± 0.010, number 3 of 3; 1.50 times that of `mc`, the best other"
    assert best in text
    assert worst in text
    assert text.count("d \\| cannot.") == 2
    assert "Best of each group: weight-preserving: `a` (mean KL 0.1000); closed form: `mc` (mean KL 0.3000)." in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        *("# Results", "## one", "### one, keep 0.75", "### one, keep 0.25", "## two", "### two, keep 4")
    ]
    assert all(before != "" or after != "" for before, after in pairwise(text.splitlines()))
    assert "No bench" in results_script().page({})


def test_the_results_page_is_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 0, "run python scripts/results.py"
