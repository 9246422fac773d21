"""What an effort decides, and what it leaves to those who say otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import conmoe
from conmoe.effort import DEFAULT_EFFORT, EFFORTS, PLAIN_SAMPLE, settle
from conmoe.registry import bind_options, get_refinement, methods
from conmoe.request import check_request
from conmoe.source import open_source
from tests.commands import runner, write_text

STANDARD = EFFORTS[DEFAULT_EFFORT]


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_is_a_refinement_with_options_that_exist(effort):
    preset = EFFORTS[effort]
    bound = bind_options(get_refinement(preset.refine), preset.refine_options)
    assert {name: bound[name] for name in preset.refine_options} == dict(preset.refine_options)
    settings = settle(effort, "conmoe")
    assert (settings.refine, settings.sequential, settings.sequential_sample) == (preset.refine, True, preset.sample)
    assert settings.tokens >= settings.sequential_sample >= settings.sample


def test_more_effort_is_more_work():
    amounts = [
        each.tokens * each.refine_options.get("steps", 1) * each.refine_options.get("batch", 1)
        for each in EFFORTS.values()
    ]
    assert amounts == sorted(amounts)
    assert len(set(amounts)) == len(amounts)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("scope", [1, 2])
def test_no_effort_asks_for_what_would_be_refused(method, scope, effort, checkpoint):
    """Every method can be asked for by its name alone: what cannot be refined is not."""
    if scope == 2 and methods()[method].condenses:
        pytest.skip("condensed layers share nothing, whatever the effort")
    settings = settle(effort, method, scope=scope)
    request = conmoe.Request(
        method=method,
        scope=scope,
        sequential=settings.sequential,
        sample=settings.sequential_sample,
        refine=settings.refine,
        refine_options=settings.refine_options,
    )
    if scope == 2 and methods()[method].form == "sliced":
        assert settings.refine == "none"
        return  # some of them refuse pools for reasons of their own
    check_request(open_source(checkpoint("olmoe")).layers, request)
    assert (settings.refine == "none") == (method in ("cd-moe", "mc-smoe"))


def test_what_is_said_counts():
    plain = settle("best", "reap", refine="none")
    assert (plain.refine, plain.sequential, plain.sample, dict(plain.refine_options)) == (
        "none",
        False,
        PLAIN_SAMPLE,
        {},
    )
    assert settle("quick", "reap", refine="none", sequential=True).sequential
    own = settle("standard", "conmoe", refine_options={"steps": "7"}, tokens=10, sample=5)
    assert own.refine_options == {**STANDARD.refine_options, "steps": "7"}
    assert (own.tokens, own.sample, own.sequential_sample) == (10, 5, 5)
    at_once = settle("standard", "conmoe", sequential=False)
    assert (at_once.sample, at_once.sequential_sample) == (STANDARD.sample, 0)
    other = settle("standard", "conmoe", refine="gains")
    assert (other.refine, dict(other.refine_options)) == ("gains", {})
    assert settle("standard", "conmoe", scope=2).sequential is False
    pooled = settle("standard", "conmoe", scope=2, options={"redirect": "drop"})
    assert (pooled.refine, pooled.sequential) == ("none", False)
    with pytest.raises(conmoe.UsageError, match="quick, standard, best, not 'much'"):
        settle("much", "conmoe")


def test_compress_reconstructs_unless_told_otherwise(checkpoint, tmp_path: Path, capsys):
    run, text = runner(capsys), write_text(tmp_path)
    asked = ("--keep", "0.5", "--data", text, "--tokens", 512, "--seq-len", 32, "--eval-tokens", 0)
    few = ("--refine-option", "steps=4", "--refine-option", "batch=64")
    model = checkpoint("olmoe")

    def made(name: str, *words: object) -> Any:
        done = run("compress", model, tmp_path / name, *asked, *words)
        assert done.code == 0, done.err
        return json.loads((tmp_path / name / "conmoe" / "plan.json").read_text())

    default = made("default", *few)
    # the text has no more tokens
    assert (default["method"], default["refine"], default["sequential"]) == ("conmoe", "reconstruct", 512)
    assert default["refine_options"]["steps"] == 4
    quick = made("quick", "--effort", "quick", "--form", "sliced")
    assert (quick["refine"], quick["default_form"]) == ("refit", "sliced")
    copies = made("copies", "--method", "conmoe", "--refine", "none")
    assert (copies["refine"], copies["sequential"]) == ("none", 0)
    assert all(None not in scope["kept"] for scope in copies["scopes"])
    record = json.loads((tmp_path / "default" / "conmoe" / "results.json").read_text())
    assert record["refine"] == "reconstruct"
    wrong = run("compress", model, tmp_path / "wrong", *asked, "--refine", "none", *few)
    assert wrong.code == 2
    assert "--refine" in wrong.err
