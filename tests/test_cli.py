"""Every verb, called as a user would call it, on a model of a few kilobytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pkgutil import iter_modules

import pytest
import torch

import conmoe
from conmoe.cli import app, verbs
from tests.commands import runner, write_text
from tests.families import EXPERTS

LENGTH = ("--seq-len", "32")
NUMBERS = ("loss", "source_loss", "excess_loss", "perplexity", "kl", "top1_agreement")


@pytest.fixture
def run(capsys):
    return runner(capsys)


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def test_the_verbs_from_the_first_to_the_last(run, checkpoint, text, tmp_path):
    model = checkpoint("olmoe")
    first, second, both = (tmp_path / name for name in ("first", "second", "both"))
    for seed, folder in enumerate((first, second)):
        done = run("calibrate", model, folder, "--data", text, "--tokens", 512, *LENGTH, "--seed", seed)
        assert done.code == 0
        assert done.out == ""
        assert f"Statistics of 512 tokens are in {folder}." in done.err
    assert "1,024 tokens" in run("merge-stats", first, second, both).err
    plan, out = tmp_path / "plan", tmp_path / "out"
    assert run("plan", model, both, plan, "--keep", "0.5").code == 0
    assert run("apply", model, plan, out, "--form", "shared").code == 0
    shown = run("evaluate", out, "--against", model, "--data", text, "--tokens", 256, *LENGTH)
    assert shown.code == 0
    assert "256 tokens" in shown.out
    assert "out" in shown.out
    for folder in (model, out):
        written = run("generate", folder, "The quick", "--max-new-tokens", 3)
        assert written.code == 0
        assert written.out.startswith("The quick")
        assert written.err == ""


def test_help_has_an_example_for_every_verb(run):
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        shown = run(name, "--help")
        assert shown.code == 0
        assert f"Example: conmoe {name}" in shown.out.replace("\n", " ")


def test_no_verb_shows_the_help_and_a_version_is_one_line(run):
    assert "Usage" in run().out
    assert run("--help").code == 0
    assert run("--version").out.strip() == conmoe.__version__


def test_every_file_of_verbs_is_in_the_help():
    assert sorted(verbs.FILES) == [module.name for module in iter_modules(verbs.__path__)]


# Processes of their own: what the command line imports --------------------------------------------------------------


def started(*words):
    """A Python that tells what it imports on standard error."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    return done, imported


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), (["--version"], 0), (["plan", "--help"], 0), (["plan"], 2), (["plam"], 2)]
)
def test_what_needs_no_verb_waits_for_no_library(words, code):
    done, imported = started("-m", "conmoe", *words)
    assert done.returncode == code, done.stderr
    assert "rich.console" in imported
    assert not imported & {"torch", "transformers", "scipy", "numpy", "safetensors"}


def test_a_verb_in_a_process_of_its_own_knows_consolidated_models(checkpoint, calibrated, tmp_path):
    made = conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), None, conmoe.Request(keep="4"))
    conmoe.apply(checkpoint("olmoe"), made, tmp_path / "half")
    done, _ = started("-m", "conmoe", "inspect", tmp_path / "half", "--json")
    assert json.loads(done.stdout)["family"] == "conmoe_olmoe"


def test_importing_the_package_is_all_that_transformers_needs():
    script = (
        "import conmoe; from transformers import AutoConfig; print(AutoConfig.for_model('conmoe_olmoe').model_type)"
    )
    assert started("-c", script)[0].stdout == "conmoe_olmoe\n"


# methods and plan ----------------------------------------------------------------------------------------------------


def test_methods_are_listed_with_all_that_is_known_of_them(run):
    listed, shown = run("methods", "--json").json, run("methods").out
    assert set(listed) == set(conmoe.methods())
    for name, item in listed.items():
        assert set(item) == {"paper", "needs", "form", "help", "options"}
        assert name in shown
        assert item["paper"] in shown
        assert all(set(option) == {"default", "choices", "help"} for option in item["options"].values())


def planned(run, checkpoint, calibrated, out, *arguments):
    done = run("plan", checkpoint("olmoe"), calibrated("olmoe"), out, *arguments)
    assert done.code == 0, done.err
    return json.loads((out / "plan.json").read_text())


def test_a_share_a_percentage_and_a_count_of_experts_are_the_same_plan(run, checkpoint, calibrated, tmp_path):
    plans = [
        planned(run, checkpoint, calibrated, tmp_path / f"plan{keep}", "--keep", keep) for keep in ("0.5", "50%", "4")
    ]
    assert plans[0]["scopes"] == plans[1]["scopes"] == plans[2]["scopes"]
    assert {scope["prototypes"] for scope in plans[0]["scopes"]} == {4}


def test_what_is_asked_for_reaches_the_plan(run, checkpoint, calibrated, tmp_path):
    asked = ("--option", "distance=weight", "--option", "seed=7", "--protect", "1:3", "--protect", "0:5")
    made = planned(run, checkpoint, calibrated, tmp_path / "a", "--keep", "3", *asked, "--form", "expanded")
    assert made["options"]["distance"] == "weight"
    assert made["options"]["seed"] == 7
    assert made["protected"] == {"0": [5], "1": [3]}
    assert made["default_form"] == "expanded"
    assert 5 in made["scopes"][0]["kept"]
    assert 3 in made["scopes"][1]["kept"]
    joined = planned(run, checkpoint, calibrated, tmp_path / "b", "--keep", "0.5", "--scope", "2")
    assert [scope["layers"] for scope in joined["scopes"]] == [[0, 1]]
    assert joined["scopes"][0]["prototypes"] == EXPERTS
    dropped = planned(run, checkpoint, calibrated, tmp_path / "c", "--keep", "0.5", "--option", "redirect=drop")
    assert dropped["default_form"] == "sliced"  # what the plan can be stored in
    pruned = planned(run, checkpoint, calibrated, tmp_path / "d", "--keep", "0.5", "--method", "reap")
    assert (pruned["method"], pruned["default_form"]) == ("reap", "sliced")


def test_protected_experts_are_told(run, checkpoint, calibrated, tmp_path):
    done = run("plan", checkpoint("olmoe"), calibrated("olmoe"), tmp_path / "p", "--keep", "3", "--protect", "1:3")
    assert "Protected in layer 1: 3." in done.err


# JSON and tables -----------------------------------------------------------------------------------------------------


def test_json_is_one_object_and_all_else_goes_to_standard_error(run, checkpoint, text, tmp_path):
    model, out = checkpoint("olmoe"), tmp_path / "out"
    made = run("compress", model, out, "--keep", "0.5", "--data", text, "--tokens", 512, *LENGTH, "--json")
    assert made.json["fidelity"]["kl"]["value"] > 0
    assert "calibrate" in made.err
    measured = run(
        *("evaluate", out, "--against", model, "--data", text, "--tokens", 256, *LENGTH, "--json"),
        *("--output", tmp_path / "new" / "numbers.json"),
    )
    numbers = measured.json
    assert numbers["tokens"] == 256
    for name in NUMBERS:
        assert set(numbers[name]) == {"value", "stderr"}
    assert numbers["bytes"] < numbers["source_bytes"]
    assert numbers["parameters"] < numbers["source_parameters"]
    assert json.loads((tmp_path / "new" / "numbers.json").read_text()) == numbers
    alone = run("evaluate", model, "--data", text, "--tokens", 32, *LENGTH, "--json").json
    assert alone["kl"] is None
    assert alone["loss"]["stderr"] is None  # of a single sequence


def test_text_that_was_calibrated_on_is_noticed(run, checkpoint, text, tmp_path):
    text.write_text(text.read_text()[:6000])
    data = ("--data", text, "--tokens", 512, *LENGTH)
    measured = ("--eval-data", text, "--eval-tokens", 256)
    made = run("compress", checkpoint("olmoe"), tmp_path / "out", "--keep", "0.5", *data, *measured)
    assert "were calibrated on" in made.err
    assert "were calibrated on" in run("evaluate", tmp_path / "out", *data).err


def test_without_text_the_built_in_one_is_used_and_named(run, checkpoint, tmp_path):
    done = run("calibrate", checkpoint("olmoe"), tmp_path / "s", "--tokens", 256, *LENGTH)
    assert done.code == 0
    assert "built-in text" in done.err


@pytest.mark.parametrize("width", [80, 120])
def test_the_fidelity_table_fits_the_terminal(width, run, monkeypatch, checkpoint, text, tmp_path):
    monkeypatch.setattr("conmoe.cli.console.stdout._width", width)
    model = shutil.copytree(checkpoint("olmoe"), tmp_path / "a-model-with-a-name-as-long-as-they-are")
    shown = run("evaluate", model, "--against", checkpoint("olmoe"), "--data", text, "--tokens", 256, *LENGTH)
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= width
    assert all(heading in lines[1] for heading in ("model", "size", "KL", "agreement", "excess loss", "ppl"))
    assert "100.00" in shown.out.replace("\n", "")
    assert "…" not in shown.out


def test_nothing_empty_is_printed_where_nobody_watches(run, checkpoint, text, tmp_path):
    done = run("calibrate", checkpoint("olmoe"), tmp_path / "s", "--data", text, "--tokens", 256, *LENGTH)
    assert all(line.strip() for line in done.err.splitlines())
    assert "\x1b" not in done.err


def test_debug_may_stand_anywhere_and_shows_where_it_went_wrong(run, checkpoint, tmp_path):
    assert run("inspect", "--debug", checkpoint("olmoe")).code == 0
    with pytest.raises(conmoe.UsageError, match="does not exist"):
        conmoe.cli.main(["inspect", str(tmp_path / "none"), "--debug"])


def test_an_interrupted_verb_says_how_to_go_on(run, checkpoint, monkeypatch):
    monkeypatch.setattr(conmoe, "inspect", lambda *given, **options: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it
    try:
        done = run("inspect", checkpoint("olmoe"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 130
    assert done.err.strip() == (
        "Error: Interrupted; what was finished is kept, and the same command goes on from there."
    )


def test_the_seed_of_a_sampled_text_is_an_argument(run, checkpoint):
    asked = ("generate", checkpoint("olmoe"), "x", "--max-new-tokens", 8, "--temperature", 2.0, "--seed")
    state = torch.random.get_rng_state()
    texts = [run(*asked, seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_brackets_in_a_name_are_no_markup(run, checkpoint, tmp_path):
    model = shutil.copytree(checkpoint("olmoe"), tmp_path / "[bold]a[/]")
    assert "[bold]a[/]" in run("inspect", model).out.replace("\n", "")
    assert "[/bold]none" in run("inspect", tmp_path / "[/bold]none").err
