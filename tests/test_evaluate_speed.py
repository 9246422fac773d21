"""Speed and memory: real processes, tiny models; what a clock says is not held against a number."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import conmoe
from conmoe.evaluate.speed import SpeedOptions, _ids
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
            assert each["stderr"] >= 0
    sides = (found["model"], found["source"])
    for name in ("weights", "resident", "peak"):
        assert found["ratio"][name]["value"] == pytest.approx(sides[0][name]["value"] / sides[1][name]["value"])
    assert found["ratio"]["weights"]["value"] < 0.8
    assert found["ratio"]["decode"]["stderr"] is None  # one turn


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
