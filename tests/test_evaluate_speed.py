"""Speed and memory: real processes, tiny models; what a clock says is not held against a number."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import conmoe
from conmoe.evaluate.speed import _MEMORY, SpeedOptions, _ids, _ratios, _side
from conmoe.evaluate.timing import memory
from tests.commands import runner, write_text
from tests.conftest import token_data
from tests.families import save_tiny


def test_models_take_turns_in_processes_of_their_own(checkpoint, tmp_path, capsys):
    small = save_tiny("olmoe", tmp_path / "small", num_experts=4)
    words = ["evaluate", small, "--against", checkpoint("olmoe"), "--no-fidelity", "--speed", "--speed-turns", 1]
    words += ["--speed-repeats", 2, "--speed-batch", 2, "--speed-prompt", 8, "--speed-new", 3, "--output"]
    words += [tmp_path / "speed.json", "--data", write_text(tmp_path), "--tokens", 256, "--seq-len", 32]
    done = runner(capsys)(*words)
    assert done.code == 0, done.err
    assert "2 x 8 prompt and 3 new tokens on cpu" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    found = json.loads((tmp_path / "speed.json").read_text())["speed"]
    for side, folder in (("model", small), ("source", checkpoint("olmoe"))):
        model = AutoModelForCausalLM.from_pretrained(folder)
        bytes_ = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
        assert found[side]["weights"]["value"] == bytes_
        assert found[side]["peak"]["value"] >= found[side]["resident"]["value"] > bytes_
        for name in ("prefill", "decode"):
            each = found[side][name]
            assert 0 < each["low"] <= each["value"] <= each["high"]
            assert each["stderr"] is None  # one turn
    sides = (found["model"], found["source"])
    for name in ("weights", "resident", "peak"):
        assert found["ratio"][name]["value"] == pytest.approx(sides[0][name]["value"] / sides[1][name]["value"])
    assert found["ratio"]["weights"]["value"] < 0.8
    assert found["ratio"]["decode"]["stderr"] is None  # one turn


def turn(*seconds):
    return {name: list(seconds) for name in ("prefill_seconds", "decode_seconds")} | dict.fromkeys(_MEMORY, 8)


@pytest.mark.parametrize("repeats", [1, 3, 50])
def test_turns_are_the_units_however_many_runs_each_has(repeats):
    options = SpeedOptions(batch=1, prompt=100, new=100)
    turns = [turn(*[1.0] * repeats), turn(*[2.0] * repeats)]
    found = _side(turns, options)
    assert found["decode"] == pytest.approx({"value": 75.0, "stderr": 25.0, "low": 50.0, "high": 100.0})
    assert found["peak"] == {"value": 8.0, "stderr": 0.0, "low": 8.0, "high": 8.0}
    assert _side(turns[:1], options)["decode"]["stderr"] is None
    ratios = _ratios({"model": turns, "source": turns[:1] * 2}, options)
    assert ratios["decode"] == pytest.approx({"value": 0.75, "stderr": 0.25, "low": 0.5, "high": 1.0})


def test_the_median_of_a_turn_does_not_see_a_disturbed_run_but_the_range_does():
    options = SpeedOptions(batch=1, prompt=100, new=100)
    found = _side([turn(1.0, 1.0, 10.0), turn(1.0, 1.0, 1.0)], options)
    assert found["prefill"] == pytest.approx({"value": 100.0, "stderr": 0.0, "low": 10.0, "high": 100.0})


@pytest.mark.slow
def test_a_failure_in_the_other_process_is_one_sentence(checkpoint):
    with pytest.raises(conmoe.ConmoeError, match=r"failed in its own process: .*IndexError"):
        conmoe.evaluate_speed(
            checkpoint("olmoe"), ids_NS=torch.full((1, 8), 10_000), options=SpeedOptions(1, 8, 1, 1, 1)
        )


def test_prompts_come_from_the_text_and_go_round_it(checkpoint):
    text = token_data(sequences=2, seq_len=5).ids_NS
    flat = text.flatten().tolist()
    assert _ids(text, SpeedOptions(batch=3, prompt=4), 256).flatten().tolist() == (flat + flat)[:12]
    drawn = _ids(None, SpeedOptions(batch=3, prompt=40), 10)
    assert drawn.shape == (3, 40)
    assert set(drawn.flatten().tolist()) == set(range(10))
    with pytest.raises(conmoe.UsageError, match="more than 512 positions"):
        conmoe.evaluate_speed(checkpoint("olmoe"), options=SpeedOptions(prompt=510))


def test_memory_is_that_of_this_process_and_its_peak_stays():
    before = memory().resident
    held = torch.ones(2**24)
    during = memory()
    assert during.resident - before > 0.9 * held.nbytes
    assert during.peak >= during.resident >= during.mapped > 0
    del held
    assert memory().peak > 0.99 * during.peak
