"""The chain: what is reused, what is reported, and that a run killed anywhere is taken up and ends the same."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from importlib import import_module

import pytest
from safetensors.torch import load_file, save_file

import conmoe
from tests.commands import OWN, main_until, runner, tree, write_text
from tests.conftest import token_data
from tests.families import with_loud_head

SMALL = ("--tokens", "512", "--seq-len", "32", "--eval-tokens", "256", "--sample", "128")
RESULTS = "conmoe/results.json"


@pytest.fixture
def run(capsys):
    return runner(capsys)


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


class Quiet:
    """Notes what the stages are told."""

    def __init__(self):
        self.stages, self.notes, self.done = [], [], {}

    def stage(self, name, total, unit):
        self.stages.append(name)
        self.done[name] = [0, total]
        return self

    def __enter__(self):
        name = self.stages[-1]

        def advance(done, total=None):
            self.done[name][0] += done
            self.done[name][1] = total or self.done[name][1]

        return advance

    def __exit__(self, *error):
        return None

    def note(self, text):
        self.notes.append(text)


def compress(checkpoint, tmp_path, out, keep="0.5", held_out=None, **options):
    progress = Quiet()
    request = options.pop("request", conmoe.Request(keep=keep))
    result = conmoe.compress(
        checkpoint("olmoe"),
        tmp_path / out,
        tmp_path / "work",
        token_data(),
        request,
        progress,
        calibration=conmoe.Calibration(sample=128),
        held_out=held_out,
        **options,
    )
    return result, progress


def test_the_chain_ends_with_a_model_its_plan_and_what_it_cost(checkpoint, tmp_path):
    result, progress = compress(checkpoint, tmp_path, "half", held_out=token_data(4, 24, seed=9))
    assert progress.stages == ["calibrate", "plan", "apply", "verify", "evaluate", "report"]
    assert all(done == total for done, total in progress.done.values()), progress.done
    written = json.loads((tmp_path / "half" / RESULTS).read_text())
    assert written == json.loads(json.dumps(result.as_json()))
    assert written["output"] == str(tmp_path / "half")
    assert written["fidelity"]["kl"]["value"] > 0
    assert written["fidelity"]["tokens"] == 96
    assert (written["method"], written["keep"], written["form"]) == ("conmoe", "0.5", "shared")
    assert written["approximate"] is False
    assert written["calibration"]["tokens"] == token_data().tokens
    assert conmoe.calibration_documents(tmp_path / "half") == ("document",)
    again = conmoe.evaluate(tmp_path / "half", token_data(4, 24, seed=9), against=checkpoint("olmoe"))
    assert again == result.fidelity


def test_what_is_not_finite_is_null_and_the_rest_is_read(checkpoint, tmp_path, run):
    """A source so sure of itself that its perplexity is no float any more."""
    loud, out = with_loud_head(checkpoint("olmoe"), tmp_path / "loud", 1e6), tmp_path / "out"
    done = run("compress", loud, out, "--keep", 0.5, *SMALL)
    assert done.code == 0, done.err

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    written = json.loads((out / RESULTS).read_text(), parse_constant=refuse)
    assert written["fidelity"]["perplexity"] == {"value": None, "stderr": None}
    assert written["fidelity"]["kl"]["value"] > 0
    assert "KL" in (out / "README.md").read_text()
    assert run("report", out, "--output", tmp_path / "report.html").code == 0
    evaluation = tmp_path / "evaluation.json"
    assert run("evaluate", out, "--against", loud, "--tokens", 256, "--seq-len", 32, "--output", evaluation).code == 0
    assert json.loads(evaluation.read_text(), parse_constant=refuse)["perplexity"]["value"] is None
    assert run("report", out, evaluation, "--output", tmp_path / "both.html").code == 0


def test_results_say_how_the_plan_was_refined_and_on_what_it_was_measured(checkpoint, tmp_path):
    request = conmoe.Request(refine="reconstruct", refine_options={"steps": "2"}, sequential=True, sample=64)
    text = token_data(4, 24, seed=9)
    compress(checkpoint, tmp_path, "half", request=request, held_out=text)
    written = json.loads((tmp_path / "half" / RESULTS).read_text())
    assert (written["refine"], written["refine_options"]["steps"], written["sequential"]) == ("reconstruct", 2, 64)
    assert written["held_out"] == [part.source for part in text.sources]
    assert written["held_out"]
    compress(checkpoint, tmp_path, "unmeasured")
    plain = json.loads((tmp_path / "unmeasured" / RESULTS).read_text())
    assert (plain["refine"], plain["refine_options"], plain["sequential"], plain["held_out"]) == ("none", {}, 0, [])


def test_one_calibration_serves_every_plan(checkpoint, tmp_path, monkeypatch):
    compress(checkpoint, tmp_path, "half")
    with monkeypatch.context() as patched:
        patched.setattr("conmoe.stream.Stream.run", None)  # the model cannot be run again
        result, progress = compress(checkpoint, tmp_path, "third", keep="3", verified=False)
        assert progress.stages == ["plan", "apply", "report"]
        assert "not calibrating again" in progress.notes[0]
        assert result.plan.keep == "3"
        _, progress = compress(checkpoint, tmp_path, "third-sliced", keep="3", form="sliced", verified=False)
        assert progress.stages == ["plan", "apply", "report"]  # groups and defaults depend on the form
        _, progress = compress(checkpoint, tmp_path, "third-again", keep="3", form="sliced", verified=False)
        assert progress.stages == ["apply", "report"]
        assert "not planning again" in progress.notes[1]
    _, progress = compress(checkpoint, tmp_path, "reaped", request=conmoe.Request("reap", "0.5"), form="sliced")
    assert progress.stages == ["plan", "apply", "verify", "report"]


def test_other_text_is_calibrated_again(checkpoint, run, text, tmp_path):
    work, model = tmp_path / "work", checkpoint("olmoe")
    asked = ("--keep", "4", "--data", text, *SMALL, "--work", work, "--eval-tokens", "0")
    assert run("compress", model, tmp_path / "a", *asked).code == 0
    first = tree(work / "statistics")
    text.write_text(text.read_text().replace("fox", "cat"))
    done = run("compress", model, tmp_path / "b", *asked)
    assert "calibrate " in done.err
    assert tree(work / "statistics") != first


@pytest.mark.parametrize(("method", "form"), [("reap", "sliced"), ("conmoe", "sliced"), ("conmoe", "expanded")])
def test_the_form_asked_for_is_the_form_written(method, form, checkpoint, tmp_path):
    request = conmoe.Request(method, "0.5")
    result, _ = compress(checkpoint, tmp_path, "out", request=request, form=form)
    assert result.applied.form == form
    assert result.approximate == (method == "conmoe" and form == "sliced")


def test_work_is_removed_unless_it_is_given_a_place(checkpoint, run, text, tmp_path):
    asked = ("compress", checkpoint("olmoe"), tmp_path / "out", "--keep", "0.5", "--data", text, *SMALL)
    assert run(*asked).code == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "text.txt"}
    assert run(*asked[:2], tmp_path / "other", *asked[3:], "--work", tmp_path / "work").code == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "other", "text.txt", "work"}
    assert {name for name in tree(tmp_path / "work") if name.endswith("json")} >= {"statistics/manifest.json"}


def test_nothing_is_measured_or_verified_when_that_is_not_wanted(checkpoint, run, text, tmp_path):
    asked = ("compress", checkpoint("olmoe"), tmp_path / "out", "--keep", "0.5", "--data", text, *SMALL)
    done = run(*asked, "--eval-tokens", "0", "--no-verify", "--json")
    assert done.json["fidelity"] is None
    assert "verify" not in done.err
    assert "evaluate" not in done.err
    assert json.loads((tmp_path / "out" / RESULTS).read_text()) == done.json


def test_the_source_and_the_default_text_are_used_when_nothing_else_is_said(checkpoint, run, tmp_path):
    done = run("compress", checkpoint("olmoe"), tmp_path / "out", "--keep", "0.5", *SMALL)
    assert done.code == 0
    assert done.err.count("built-in text") == 2
    assert "256 held-out tokens" in done.out


@pytest.mark.parametrize(("tokens", "measured"), [(1024, 1024), (20000, 4992), (36000, None)])
def test_what_was_not_calibrated_on_is_measured_on(tokens, measured, checkpoint, run, text, tmp_path):
    """Of two pieces of text one is calibrated on; the other has about 8,000 tokens."""
    text.write_text(text.read_text()[:16000])
    asked = (*SMALL, "--eval-tokens", tokens, "--data", text, "--no-report")
    done = run("compress", checkpoint("olmoe"), tmp_path / "out", "--keep", "0.5", *asked)
    assert done.code == 0
    builtin = measured is None
    assert ("built-in text" in done.err, "built-in text" in done.out) == (builtin, builtin)
    assert (f"held-out tokens: {text.name}, evaluation part" in done.out) is not builtin
    written = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert (written["overlap"], written["fidelity"]["tokens"]) == (0, measured or tokens)


def test_a_result_that_fails_its_check_never_gets_its_name(checkpoint, tmp_path, monkeypatch):
    def bend(*args, **kwargs):
        raise conmoe.ConmoeError("bent")

    with monkeypatch.context() as patched:
        patched.setattr(import_module("conmoe.compress"), "verify", bend)
        with pytest.raises(conmoe.ConmoeError, match="bent"):
            compress(checkpoint, tmp_path, "out")
    assert not (tmp_path / "out").exists()
    shard = tmp_path / "out.partial" / "model.safetensors"
    held = load_file(shard)
    held["lm_head.weight"][0, 0] += 1
    save_file(held, shard)
    compress(checkpoint, tmp_path, "out")  # and what failed is not taken up
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "work"}


# Kill -9 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start():
    """``start(step, arguments)``: the command line in a process of its own that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conmoe.cli", "tests.commands"])

    def begin(step, arguments):
        process = context.Process(target=main_until, args=(step, [str(argument) for argument in arguments]))
        process.start()
        return process

    return begin


def asked_for(checkpoint, text, out):
    return ["compress", checkpoint("olmoe"), out, "--keep", "0.5", "--data", text, *SMALL]


def without_results(folder):
    return {name: data for name, data in tree(folder).items() if name not in OWN}


def survives(start, kill, checkpoint, run, text, tmp_path):
    """``kill(process)`` some runs, then let one finish: it must give what an uninterrupted run gives."""
    source, out = tree(checkpoint("olmoe")), tmp_path / "out"
    process = start(*kill["start"](asked_for(checkpoint, text, out)))
    kill["wait"](process)
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0)
    assert tree(checkpoint("olmoe")) == source
    if out.exists():  # then it is whole: measured and all
        assert json.loads((out / RESULTS).read_text())["fidelity"] is not None
    else:
        assert run(*asked_for(checkpoint, text, out)).code == 0
        assert {entry.name for entry in tmp_path.iterdir()} == {"out", "text.txt"}
    expected = tmp_path / "uninterrupted"
    assert run(*asked_for(checkpoint, text, expected)).code == 0
    assert without_results(out) == without_results(expected)
    numbers = [json.loads((folder / RESULTS).read_text()) for folder in (out, expected)]
    assert numbers[0]["fidelity"] == numbers[1]["fidelity"]
    return process.exitcode


def at_step(step):
    return {"start": lambda arguments: (step, arguments), "wait": lambda process: None}


def after(seconds):
    def wait(process):
        time.sleep(seconds)
        process.kill()

    return {"start": lambda arguments: (10**9, arguments), "wait": wait}


@pytest.mark.parametrize("step", [3, 9, 14, 20, 26])
def test_a_run_killed_between_two_steps_is_taken_up(step, start, checkpoint, run, text, tmp_path):
    assert survives(start, at_step(step), checkpoint, run, text, tmp_path) == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_before_any_step_is_taken_up(start, checkpoint, run, text, tmp_path):
    for step in range(200):
        folder = tmp_path / str(step)
        folder.mkdir()
        if survives(start, at_step(step), checkpoint, run, write_text(folder), folder) == 0:
            break
    assert step > 20  # so many names change


@pytest.mark.slow
def test_a_run_killed_at_any_moment_is_taken_up(start, checkpoint, run, text, tmp_path):
    begun = time.perf_counter()
    process = start(10**9, asked_for(checkpoint, text, tmp_path / "out"))
    process.join()
    whole, number = time.perf_counter() - begun, random.Random(0)
    for trial in range(20):
        folder = tmp_path / f"trial-{trial}"
        folder.mkdir()
        survives(start, after(whole * number.random()), checkpoint, run, write_text(folder), folder)


def test_a_run_killed_again_and_again_still_ends(start, checkpoint, run, text, tmp_path):
    for step in range(2, 40, 3):
        process = start(step, asked_for(checkpoint, text, tmp_path / "out"))
        process.join()
        if process.exitcode == 0:
            break
    if not (tmp_path / "out").exists():
        assert run(*asked_for(checkpoint, text, tmp_path / "out")).code == 0
    assert run(*asked_for(checkpoint, text, tmp_path / "once")).code == 0
    assert without_results(tmp_path / "out") == without_results(tmp_path / "once")
