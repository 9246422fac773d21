"""A model writes its own calibration text: seeded, resumable, and distributed as the model says."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import conmoe
from conmoe import UsageError, selftext
from conmoe.demo import demo_model
from tests.commands import runner

SMALL = {"tokens": 300, "length": 24, "batch": 8}


def documents(folder):
    return [json.loads(line) for line in (folder / selftext.TEXT).read_text(encoding="utf-8").split("\n") if line]


def test_the_same_seed_writes_the_same_text_and_another_seed_another(tmp_path):
    files = [
        conmoe.write_text(demo_model(), tmp_path / name, seed=seed, **SMALL)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    a, b, c = (file.read_text(encoding="utf-8") for file in files)
    assert a == b
    assert a != c


def test_there_are_as_many_tokens_as_asked_for_in_documents_that_the_model_ended_or_that_are_full(tmp_path):
    told = []
    conmoe.write_text(demo_model(), tmp_path / "out", advance=told.append, **SMALL)
    counts = [line["tokens"] for line in documents(tmp_path / "out")]
    assert sum(told) >= SMALL["tokens"] > sum(told[:-1])
    assert sum(counts) == sum(told)
    assert max(counts) <= SMALL["length"]


def test_a_killed_run_goes_on_to_the_same_text(tmp_path):
    whole = conmoe.write_text(demo_model(), tmp_path / "whole", **SMALL).read_bytes()

    def stop(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conmoe.write_text(demo_model(), tmp_path / "killed", advance=stop, **SMALL)
    begun = sorted((tmp_path / "killed.partial").glob("0*.jsonl"))
    assert len(begun) == 1
    stamp = begun[0].stat().st_mtime_ns
    watched = []
    resumed = conmoe.write_text(
        demo_model(),
        tmp_path / "killed",
        advance=lambda tokens: watched.append(begun[0].stat().st_mtime_ns),
        **SMALL,
    )
    assert resumed.read_bytes() == whole
    assert set(watched) == {stamp}


def test_a_killed_run_goes_on_after_texts_with_line_separators(tmp_path):
    """JSON leaves U+2028 and U+0085 as they are, and so does a run that reads what was written before."""

    def stop(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conmoe.write_text(demo_model(), tmp_path / "out", advance=stop, **SMALL)
    (begun,) = (tmp_path / "out.partial").glob("0*.jsonl")
    line = {"text": "one\u2028two\x85three", "tokens": 300}
    begun.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    conmoe.write_text(demo_model(), tmp_path / "out", **SMALL)
    assert documents(tmp_path / "out") == [line]


def test_first_tokens_are_distributed_as_the_model_says(tmp_path):
    """Against the model's own probabilities, by a chi-squared test of the likeliest tokens and the rest."""
    from scipy.stats import chisquare

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    with torch.no_grad():
        p_V = model(torch.tensor([[first]])).logits[0, -1].double().softmax(-1)
    ids_BS = selftext._sample(model, first, tokenizer.eos_token_id, 2000, 1, 1.0, 0)
    top = p_V.topk(12).indices
    seen = torch.bincount(ids_BS.flatten(), minlength=len(p_V))[top].tolist()
    expected = (2000 * p_V[top]).tolist()
    assert chisquare([*seen, 2000 - sum(seen)], [*expected, 2000 - sum(expected)]).pvalue > 1e-3


def test_the_text_can_be_calibrated_on(tmp_path):
    file = conmoe.write_text(demo_model(), tmp_path / "out", tokens=2048, length=128)
    tokenizer = conmoe.load_tokenizer(demo_model())
    data = conmoe.load_tokens(tokenizer, [conmoe.parse_spec(str(file))], tokens=1024, seq_len=64)
    assert data.tokens == 1024


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"tokens": 0}, {"length": 0}, {"batch": 0}])
def test_nothing_to_sample_is_refused_before_a_model_is_loaded(tmp_path, wrong):
    with pytest.raises(UsageError):
        conmoe.write_text(tmp_path / "no model is here", tmp_path / "out", **wrong)
    assert not (tmp_path / "out.partial").exists()


def test_on_the_command_line(capsys, tmp_path):
    run = runner(capsys)
    done = run("write-text", demo_model(), tmp_path / "out", "--tokens", "64", "--length", "16")
    assert done.code == 0, done.err
    assert documents(tmp_path / "out")
    assert run("write-text", demo_model(), tmp_path / "out", "--tokens", "64").code == 2
