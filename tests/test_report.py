"""The report shows what the files say, of every run, and runs nothing that it was given."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import conmoe
from conmoe import ConmoeError, UsageError
from conmoe.demo import demo_model
from conmoe.portrait import Lost, load_portrait
from conmoe.progress import SILENT
from conmoe.report import plots
from conmoe.report.gather import Findings, gather
from conmoe.report.measured import Figure
from conmoe.report.runs import Run
from conmoe.report.write import VERDICTS, other_text, page, verdict
from tests.commands import runner

HOSTILE = '"><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">{{ 7 * 7 }}</title>&lt;'


class Page(HTMLParser):
    """The text of a page, its tags, and the addresses that it would load."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.addresses, self.scripts = "", [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.scripts += tag == "script"
        for name, value in attributes:
            assert not name.startswith("on"), f"{tag} has {name}"
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.addresses.append(value)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A result of the real command, by the method that redirects, with what it keeps for the report."""
    out = tmp_path_factory.mktemp("report") / "half"
    tokenizer = conmoe.load_tokenizer(demo_model())
    text = conmoe.load_tokens(tokenizer, [], tokens=2048, seq_len=128)
    held_out = conmoe.load_tokens(tokenizer, [], tokens=512, seq_len=128, part="evaluation")
    request = conmoe.Request("conmoe", "0.5")
    conmoe.compress(
        demo_model(), out, out.with_name("work"), text, request, SILENT, held_out=held_out, command="as typed"
    )
    return out


def test_every_number_of_a_result_is_on_its_page(result):
    record = json.loads((result / "conmoe" / "results.json").read_text())
    shown = Page((result / "conmoe" / "report.html").read_text())
    fidelity = record["fidelity"]
    assert f"{fidelity['kl']['value']:.3f}" in shown.text
    assert f"{100 * fidelity['top1_agreement']['value']:.1f}"[:4] in shown.text
    for fact in ("as typed", record["calibration"]["model"], "torch", record["calibration"]["data"][0]):
        assert fact in shown.text
    portrait = load_portrait(result / "conmoe" / "report.json")
    for lost in portrait.tokens:
        assert f"{lost.kl:.2f}" in shown.text


def test_the_portrait_says_what_plan_and_statistics_say(result):
    portrait = load_portrait(result / "conmoe" / "report.json")
    plan = conmoe.read_plan(result / "conmoe")
    for seen, scope in zip(portrait.scopes, plan.scopes, strict=True):
        assert list(seen.assignment) == scope.plan.assignment_E.tolist()
        kept = [int(row.argmax()) for row in scope.plan.mixing_KE]
        assert list(seen.made_of) == kept
        assert sum(seen.tokens) == 2048 * 4  # every token chooses four experts
        assert sum(seen.contribution) == pytest.approx(1, abs=1e-4)
        drawn = plots.expert_map(seen)
        assert (drawn.kept, drawn.redirected, drawn.dropped) == (16, 16, 0)
        assert all(kept[seen.assignment[start]] == end for start, end in drawn.lines)
        matrix = torch.tensor(seen.similarity)
        assert torch.equal(matrix, matrix.T)
        assert sorted(seen.similar) == list(range(32))


def test_what_lost_most_is_what_a_whole_model_says(result):
    """Against both models loaded whole and compared at once."""
    from transformers import AutoModelForCausalLM

    tokenizer = conmoe.load_tokenizer(demo_model())
    held_out = conmoe.load_tokens(tokenizer, [], tokens=512, seq_len=128, part="evaluation")
    with torch.no_grad():
        source, model = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(held_out.ids_NS).logits.float()
            for folder in (demo_model(), result)
        )
    source, model = source.log_softmax(-1), model.log_softmax(-1)
    kl_NS = (source.exp() * (source - model)).sum(-1)[:, :-1]
    portrait = load_portrait(result / "conmoe" / "report.json")
    expected = kl_NS.flatten().sort(descending=True).values[: len(portrait.tokens)]
    assert [token.kl for token in portrait.tokens] == pytest.approx(expected.tolist(), rel=0.15)
    n, position = divmod(int(kl_NS.flatten().argmax()), kl_NS.shape[1])
    assert tokenizer.decode([source[n, position].argmax()]) == portrait.tokens[0].source
    assert tokenizer.decode([held_out.ids_NS[n, position + 1]]) == portrait.tokens[0].next


def test_lost_keeps_the_largest_whatever_the_order(result):
    tokenizer = conmoe.load_tokenizer(demo_model())
    data = conmoe.load_tokens(tokenizer, [], tokens=1024, seq_len=64, part="evaluation")
    N, S = data.ids_NS.shape
    kl_NS = torch.rand(N, S, generator=torch.Generator().manual_seed(0))
    forward, backward = Lost(data, demo_model()), Lost(data, demo_model())
    zero_S = torch.zeros(S, dtype=torch.int64)
    for n in range(N):
        forward(n, kl_NS[n], zero_S, zero_S)
        backward(N - 1 - n, kl_NS[N - 1 - n], zero_S, zero_S)
    assert forward.worst() == backward.worst()
    best = kl_NS[:, :-1].flatten().sort(descending=True).values[:20].tolist()
    assert [token.kl for token in forward.worst()[1]] == pytest.approx(best)


def test_nothing_that_was_read_becomes_part_of_the_page(result, tmp_path):
    """Names, texts, commands and warnings that are HTML are shown as what they are."""
    folder = tmp_path / "hostile"
    (folder / "conmoe").mkdir(parents=True)
    record = json.loads((result / "conmoe" / "results.json").read_text())
    record |= {"command": HOSTILE, "held_out": [HOSTILE], "form": HOSTILE, "method": HOSTILE, "keep": HOSTILE}
    record["calibration"]["data"] = [HOSTILE]
    record["warnings"] = [{"kind": "estimate fails", "layers": [0], "text": HOSTILE}]
    seen = json.loads((result / "conmoe" / "report.json").read_text())
    seen["texts"] = [{"text": HOSTILE, "kl": 1.0}]
    seen["tokens"] = [{"before": HOSTILE, "kl": 1.0, "next": HOSTILE, "source": HOSTILE, "result": HOSTILE}]
    (folder / "conmoe" / "results.json").write_text(json.dumps(record))
    (folder / "conmoe" / "report.json").write_text(json.dumps(seen))
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text(
        json.dumps(
            {
                "model": str(folder),
                "loss": {"value": 1, "stderr": None},
                "bytes": 1,
                "data": [HOSTILE],
                "domains": {HOSTILE: {"kl": {"value": 1.0, "stderr": 0.1}}},
                "tasks": {
                    HOSTILE: {HOSTILE: {"value": 0.5, "stderr": 0.1, "n": 3, "source": None, "difference": None}}
                },
                "generation": {HOSTILE: HOSTILE},
                "speed": {"units": {"x": HOSTILE}, "source": {"x": {"value": 1.0, "stderr": None}}},
            }
        )
    )
    conmoe.write_report([folder, evaluation], tmp_path / "report.html", title=HOSTILE)
    text = (tmp_path / "report.html").read_text()
    shown = Page(text)
    assert shown.scripts == 1
    assert "<img src=x" not in text
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", text)[0]
    assert shown.text.count("window.hacked = 1") >= 12


def test_the_page_loads_nothing(result):
    text = (result / "conmoe" / "report.html").read_text()
    addresses = Page(text).addresses
    assert addresses
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert not re.search(r"@import|url\(", text)
    assert "default-src 'none'" in text


def test_numbers_of_the_figures_are_those_of_the_runs():
    runs = [
        Run("a", bytes=50, source_bytes=100, numbers={"kl": Figure(0.1, 0.01)}),
        Run("b", bytes=60, source_bytes=100, numbers={"kl": Figure(0.2, 0.01)}),
        Run("c", bytes=40, source_bytes=100, numbers={"kl": Figure(0.4, None)}),
        Run("d", bytes=40, source_bytes=100, numbers={"kl": Figure(0.5, None)}),
        Run("not measured", bytes=10, source_bytes=100),
        Run("equal to its source", bytes=100, source_bytes=100, numbers={"kl": Figure(0.0, 0.0)}),
    ]
    assert plots.frontier(runs) == (2, 0)
    drawn = plots.scatter(runs)
    assert [point.number for point in drawn.points] == [1, 2, 3, 4]
    by_size = sorted(drawn.points, key=lambda point: point.x)
    assert [point.number for point in by_size] == [3, 4, 1, 2]
    by_distance = sorted(drawn.points, key=lambda point: -point.y)  # downwards on a canvas
    assert [point.number for point in by_distance] == [1, 2, 3, 4]
    assert plots.scatter([]) is None


@pytest.mark.parametrize("agreement", [0.0, 0.69, 0.7, 0.84999, 0.85, 0.949, 0.95, 1.0])
def test_the_verdict_follows_its_rule(agreement):
    words = verdict(Run("a", bytes=1, source_bytes=2, numbers={"top1_agreement": Figure(agreement, None)}))
    reached = [least for least, _ in VERDICTS if agreement >= least]
    assert words.endswith(dict(VERDICTS)[max(reached)])
    assert "50%" in words


@pytest.mark.parametrize(
    "other", [{"source_bytes": 80}, {"texts": ("code.txt",)}, {"facts": (("held-out tokens", "9"),)}]
)
def test_results_that_were_not_measured_alike_are_not_ranked(other):
    def measured(name, kl, **changed):
        same = {"source_bytes": 100, "texts": ("wiki.txt",), "facts": (("held-out tokens", "8"),)}
        return Run(name, bytes=50, numbers={"kl": Figure(kl), "top1_agreement": Figure(0.9)}, **{**same, **changed})

    alike, mixed = ([measured("a", 0.2), measured("b", 0.1, **changed)] for changed in ({}, other))
    assert (plots.frontier(alike), plots.frontier(mixed)) == ((1,), ())
    texts = [Page(page(Findings(tuple(runs)), "Both")).text for runs in (alike, mixed)]
    for sign, expected in {
        "not measured alike": 1,
        "The closest of 2": 0,
        "Filled: no other": 0,
        "measured on": 1,
    }.items():
        assert [sign in text for text in texts] == [expected == 0, expected == 1]


def test_a_verdict_names_its_text_and_tells_where_it_is_another():
    run = Run(
        "a",
        numbers={"top1_agreement": Figure(0.3)},
        texts=("built-in text, evaluation part",),
        calibrated=("wiki.txt",),
    )
    assert "of built-in text, evaluation part" in verdict(run)
    assert other_text(run) == "It was calibrated on other text: wiki.txt."
    for texts in (("wiki.txt",), ("wiki.txt, evaluation part",), ()):
        assert other_text(replace(run, texts=texts)) == ""


def test_a_run_without_anything_is_a_page_too():
    text = page(Findings((Run("bare"),)), "Bare")
    assert "how close it is to the source was not measured" in Page(text).text


def test_benches_that_are_kept_are_drawn():
    """Every file of results in this repository."""
    files = sorted(Path("benchmarks/results").glob("*.json"))
    assert files
    found = gather(files[:3])
    text = Page(page(found, "Benches")).text
    for run in found.runs:
        assert run.name in text


def test_an_evaluation_of_a_result_adds_to_it(result, tmp_path):
    evaluation = tmp_path / "evaluation.json"
    record = {"model": str(result), "loss": {"value": 1.0, "stderr": 0.1}, "bytes": 1, "data": ["a.txt"]}
    record["domains"] = {"wiki": {"kl": {"value": 0.25, "stderr": 0.01}}}
    evaluation.write_text(json.dumps(record))
    (run,) = gather([result, evaluation]).runs
    assert run.domains["wiki"]["kl"] == Figure(0.25, 0.01)
    alone = gather([evaluation]).runs[0]
    assert alone.name == result.name
    assert alone.portrait is None


def test_what_was_measured_afterwards_is_no_less_than_what_was_measured_at_once(result, tmp_path, monkeypatch):
    def record(name, **more):
        file = tmp_path / f"{name}.json"
        own = {"model": "half", "data": [f"/texts/{name}.txt"], "tokens": 8, "sequences": 2, "bytes": 1}
        file.write_text(json.dumps({**own, **more}))
        return file

    half = tmp_path / "half"
    shutil.copytree(result, half)
    numbers = {"loss": {"value": 1.0}, "kl": {"value": 0.25, "stderr": 0.01}, "source_bytes": 2}
    first = record("wiki", **numbers, domains={"part": {"kl": {"value": 0.5}}}, tasks={"one": {"acc": {"value": 0.1}}})
    second = record("code", domains={"part": {"kl": {"value": 0.7}}}, tasks={"two": {"acc": {"value": 0.2}}})
    assert Path.cwd() != tmp_path  # their folder is named as it was called where they were made
    run, added = gather([half, first, second]).runs
    assert [row.task for row in run.parts["tasks"]] == ["one", "two"]
    assert {name: found["kl"].value for name, found in run.domains.items()} == {"part": 0.5, "part (code)": 0.7}
    assert (added.name, added.texts, added.numbers["kl"].value) == ("half (wiki)", ("wiki.txt",), 0.25)
    results = half / "conmoe" / "results.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), "fidelity": None, "held_out": []}))
    (alone,) = gather([half, first]).runs
    assert (alone.texts, alone.numbers["kl"]) == (("wiki.txt",), Figure(0.25, 0.01))
    assert dict(alone.facts)["measured on"] == "/texts/wiki.txt"


@pytest.mark.parametrize("place", ["", "numbers", "half"])
def test_an_evaluation_knows_its_result_from_another_working_directory(place, result, tmp_path):
    shutil.copytree(result, tmp_path / "half")
    (tmp_path / "numbers").mkdir()
    file = tmp_path / place / "a.json"
    file.write_text(json.dumps({"model": "half", "data": [], "tasks": {"one": {"acc": {"value": 0.5}}}}))
    (run,) = gather([tmp_path / "half", file]).runs
    assert [row.task for row in run.parts["tasks"]] == ["one"]


def test_an_evaluation_knows_a_result_that_was_moved_by_its_weights(result, tmp_path, capsys):
    file = tmp_path / "written.json"
    asked = ("--no-fidelity", "--generate", "--max-new-tokens", 3)
    assert runner(capsys)("evaluate", result, *asked, "--output", file).code == 0
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "model": "elsewhere"}))
    (run,) = gather([result, file]).runs
    units = {unit: model for unit, _, model, _ in run.parts["generation"].rows}
    assert units["new tokens"].value == written["generation"]["model"]["length"]["value"]


def test_no_evaluation_hides_another(result, tmp_path):
    def number(value):
        return {"value": value, "stderr": None}

    def evaluated(name, value):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        tasks = {"arc": {"acc": number(value)}, f"only_{value}": {"acc": number(value)}}
        speed = {"units": {"peak": "bytes"}, "model": {"peak": number(value)}, "source": None, "ratio": None}
        domains = {"wiki": {"kl": number(value)}}
        file.write_text(json.dumps({"model": str(result), "tasks": tasks, "domains": domains, "speed": speed}))
        return file

    files = [evaluated(name, value) for name, value in (("a.json", 0.1), ("b.json", 0.2), ("c/b.json", 0.3))]
    (run,) = gather([result, *files]).runs
    labels = ["", *(f" ({file})" for file in files[1:])]
    values = (0.1, 0.2, 0.3)
    assert {name: each["kl"].value for name, each in run.domains.items()} == {
        f"wiki{label}": value for label, value in zip(labels, values, strict=True)
    }
    tasks = {row.task: row.result.value for row in run.parts["tasks"]}
    assert tasks == {
        **{f"arc{label}": value for label, value in zip(labels, values, strict=True)},
        **{f"only_{value}": value for value in values},
    }
    headings = re.findall(r"<h3>(Speed and memory.*?)</h3>", page(Findings((run,)), "x"))
    assert headings == [f"Speed and memory{label}" for label in labels]


def test_an_evaluation_knows_a_result_whose_weights_are_elsewhere(result, tmp_path):
    """A record may be copied alone; the evaluation lies where ``conmoe push`` puts it."""
    file = tmp_path / "half" / "conmoe" / "evaluations" / "a.json"
    shutil.copytree(result / "conmoe", tmp_path / "half" / "conmoe")
    file.parent.mkdir(exist_ok=True)
    tasks = {"arc": {"acc": {"value": 0.5}}}
    file.write_text(json.dumps({"model": "half", "tasks": tasks, "fingerprint": "of its weights"}))
    (run,) = gather([tmp_path / "half", file]).runs
    assert [row.task for row in run.parts["tasks"]] == ["arc"]


def test_an_evaluation_adds_to_a_result_of_a_demo(tmp_path):
    one = {"form": "shared", "bytes": 1, "tokens": 8, "sequences": 2}
    (tmp_path / "results.json").write_text(json.dumps({"keep": 0.5, "methods": {"a": one, "b": one}}))
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps({"model": str(tmp_path / "b"), "tasks": {"arc": {"acc": {"value": 0.5}}}}))
    assert [list(run.parts) for run in gather([tmp_path, file]).runs] == [[], ["tasks"]]


@pytest.mark.parametrize("part", ["generation", "speed"])
def test_what_was_compared_with_nothing_can_be_reported(part, tmp_path):
    file = tmp_path / "alone.json"
    measured = {"source": None, "difference": None, "ratio": None, "agreement": None, "units": {"n": "signs"}}
    record = {"model": "half", "against": None, "data": [], part: {**measured, "model": {"n": {"value": 3.0}}}}
    file.write_text(json.dumps(record))  # without a loss: --no-fidelity
    found = gather([file])
    assert found.runs[0].parts[part].rows == (("signs", None, Figure(3.0), None),)
    assert "signs" in Page(page(found, "x")).text


def test_figures_that_cannot_be_drawn_are_refused_before_the_page_is_written(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="matplotlib"):
        conmoe.write_report([result], tmp_path / "r.html", figures=tmp_path / "figures")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("texts", [0, None])
def test_a_distance_that_is_no_number_is_told_whether_any_is_one_or_not(result, texts):
    (run,) = gather([result]).runs
    portrait = run.portrait.model_copy(update={"not_finite": 3, "texts": run.portrait.texts[:texts]})
    text = Page(page(Findings((replace(run, portrait=portrait),)), "x")).text
    assert "the KL of 3 sequences is not a number" in text


def test_what_both_were_measured_on_stands_in_one_row(result, tmp_path):
    evaluation = tmp_path / "evaluation.json"
    units = {"peak": "bytes at most", "decode": "tokens per second", "unknown": "of neither"}
    sides = {side: {"peak": {"value": value, "stderr": 0.0}} for side, value in (("source", 2e9), ("model", 1e9))}
    sides["source"]["decode"] = {"value": 12.5, "stderr": 0.5}
    speed = {"turns": 3, "units": units, **sides, "ratio": {"peak": {"value": 0.5, "stderr": 0.01}}}
    evaluation.write_text(json.dumps({"model": str(result), "loss": {"value": 1.0}, "speed": speed}))
    (run,) = gather([result, evaluation]).runs
    assert [unit for unit, *_ in run.parts["speed"].rows] == ["bytes at most", "tokens per second"]
    text = Page(page(Findings((run,)), "x")).text
    for shown in ("2 GB", "1 GB", "0.500 ± 0.010", "12.50 ± 0.50", "turns: 3"):
        assert shown in text


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", ConmoeError),
        ("[]", UsageError),
        ("{}", UsageError),
        ('{"loss": 1, "model": 3}', ConmoeError),
        ('{"uses": 1}', ConmoeError),
        ('{"calibrations": 1}', ConmoeError),
    ],
)
def test_what_is_no_result_is_refused_in_a_sentence(tmp_path, text, error):
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(error, match=r"file\.json"):
        conmoe.write_report([file], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_portrait_is_named(result, tmp_path):
    (tmp_path / "r" / "conmoe").mkdir(parents=True)
    (tmp_path / "r" / "conmoe" / "results.json").write_bytes((result / "conmoe" / "results.json").read_bytes())
    (tmp_path / "r" / "conmoe" / "report.json").write_text('{"format": 1')
    with pytest.raises(ConmoeError, match=r"report\.json is damaged"):
        gather([tmp_path / "r"])


def test_on_the_command_line_with_figures(result, tmp_path, capsys):
    run = runner(capsys)
    done = run("report", result, "-o", tmp_path / "r.html", "--figures", tmp_path / "figures")
    assert done.code == 0, done.err
    assert "half" in done.out
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {"quality.png", "quality.svg", "1-errors.png", "1-map-0.svg", "1-similarity-3.png"} <= names
    assert all(file.stat().st_size > 1000 for file in (tmp_path / "figures").iterdir())
    assert run("report", tmp_path / "nothing", "-o", tmp_path / "r.html").code == 2
    assert run("report", tmp_path, "-o", tmp_path / "r.html").code == 2
