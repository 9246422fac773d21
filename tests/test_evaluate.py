"""Fidelity against the plain thing: both models whole in memory, Transformers' own forward, float64 arithmetic."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import conmoe
from conmoe.evaluate.paired import difference, mean, weighted
from tests.commands import write_text
from tests.conftest import token_data
from tests.families import EXPERTS, save_tiny, with_loud_head

DATA = token_data(sequences=5, seq_len=40, seed=3)


def log_probabilities(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(DATA.ids_NS).logits.double().log_softmax(-1)


def summary(rows_N):
    return rows_N.mean().item(), (rows_N.std() / math.sqrt(len(rows_N))).item()


def same(measured, rows_N, tolerance=2e-5):
    value, error = summary(rows_N)
    assert measured.value == pytest.approx(value, abs=tolerance, rel=tolerance)
    assert measured.stderr == pytest.approx(error, abs=tolerance, rel=1e-3)


@pytest.fixture(scope="module")
def results(checkpoint, calibrated, tmp_path_factory):
    """The folder of a result of each form."""
    folder = tmp_path_factory.mktemp("results")
    for form, method in (("sliced", "reap"), ("shared", "conmoe"), ("expanded", "conmoe")):
        made = conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), None, conmoe.Request(method, "0.5"))
        conmoe.apply(checkpoint("olmoe"), made, folder / form, form=form)
    return folder


@pytest.mark.parametrize("form", ["sliced", "shared", "expanded"])
def test_every_number_equals_its_definition(form, results, checkpoint):
    found = conmoe.evaluate(results / form, DATA, against=checkpoint("olmoe"))
    model, source = log_probabilities(results / form), log_probabilities(checkpoint("olmoe"))
    following = DATA.ids_NS[:, 1:, None]
    loss, source_loss = (-part[:, :-1].gather(2, following).squeeze(2).mean(1) for part in (model, source))
    same(found.loss, loss)
    same(found.source_loss, source_loss)
    same(found.excess_loss, loss - source_loss)
    same(found.kl, (source.exp() * (source - model)).sum(2).mean(1))
    same(found.top1_agreement, (model.argmax(2) == source.argmax(2)).double().mean(1))
    assert found.perplexity.value == pytest.approx(loss.mean().exp().item(), rel=1e-4)
    assert found.perplexity.stderr == pytest.approx(found.perplexity.value * found.loss.stderr)
    assert (found.tokens, found.sequences) == (200, 5)
    assert found.kl.value > 0.01  # there was something to measure


def test_sizes_are_those_of_the_files(results, checkpoint):
    found = conmoe.evaluate(results / "sliced", DATA, against=checkpoint("olmoe"))
    for bytes_, parameters, folder in (
        (found.bytes, found.parameters, results / "sliced"),
        (found.source_bytes, found.source_parameters, checkpoint("olmoe")),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.num_experts == (EXPERTS // 2 if folder == results / "sliced" else EXPERTS)
        assert parameters == sum(value.numel() for value in model.parameters())
        assert bytes_ == 4 * parameters
    shared = conmoe.evaluate(results / "shared", DATA)
    expanded = conmoe.evaluate(results / "expanded", DATA)
    assert shared.parameters < expanded.parameters
    assert shared.loss.value == pytest.approx(expanded.loss.value, abs=1e-6)


def test_a_model_against_itself_is_itself(checkpoint):
    found = conmoe.evaluate(checkpoint("mixtral"), DATA, against=checkpoint("mixtral"))
    assert (found.kl, found.top1_agreement) == (conmoe.Measured(0.0, 0.0), conmoe.Measured(1.0, 0.0))
    assert found.excess_loss == conmoe.Measured(0.0, 0.0)
    assert found.source_loss == found.loss


def test_alone_a_model_has_a_loss_and_nothing_to_compare(checkpoint):
    found = conmoe.evaluate(checkpoint("olmoe"), DATA)
    assert found.loss == conmoe.evaluate(checkpoint("olmoe"), DATA, against=checkpoint("olmoe")).loss
    assert not any((found.kl, found.top1_agreement, found.excess_loss, found.source_loss, found.source_bytes))
    assert found.as_json()["kl"] is None


def test_a_loss_beyond_all_floats_has_an_infinite_perplexity(checkpoint, tmp_path):
    loud = with_loud_head(checkpoint("olmoe"), tmp_path / "loud", 1e6)
    found = conmoe.evaluate(loud, DATA, against=checkpoint("olmoe"))
    assert 709 < found.loss.value < math.inf
    assert found.perplexity.value == math.inf
    assert math.isnan(found.perplexity.stderr)


LARGE = st.lists(st.floats(), min_size=1, max_size=6)


@given(LARGE)
@example([math.inf, -math.inf])
@example([1e200, -1e200])
@example([1e308, 1e308])
def test_means_answer_for_all_numbers(values):
    expected = np.array(values)
    with np.errstate(all="ignore"):
        value = expected.mean()
    found = mean(values)
    if np.isfinite(value) and np.abs(expected).max() < 1e100:
        assert found.value == pytest.approx(value, abs=1e-9 * np.abs(expected).max())
    elif math.isnan(value):
        assert math.isnan(found.value)
    assert not found.stderr < 0
    difference(values, values[::-1])
    assert math.isnan(found.stderr) or not weighted([found] * len(values), [1.0] * len(values)).stderr < 0


def test_one_sequence_has_no_standard_error(checkpoint):
    found = conmoe.evaluate(checkpoint("olmoe"), token_data(1, 40))
    assert math.isnan(found.loss.stderr)
    assert found.as_json()["loss"]["stderr"] is None
    json.dumps(found.as_json(), allow_nan=False)


def test_the_logits_of_a_long_sequence_are_taken_in_parts(checkpoint, monkeypatch):
    whole = conmoe.evaluate(checkpoint("olmoe"), DATA, against=checkpoint("mixtral"))
    monkeypatch.setattr(import_module("conmoe.evaluate.fidelity"), "LOGIT_TOKENS", 7)
    parts = conmoe.evaluate(checkpoint("olmoe"), DATA, against=checkpoint("mixtral"))
    for name in ("loss", "source_loss", "kl", "top1_agreement"):
        assert getattr(parts, name).value == pytest.approx(getattr(whole, name).value, abs=1e-6)


def test_the_dtype_is_an_argument(checkpoint):
    exact, rough = (conmoe.evaluate(checkpoint("olmoe"), DATA, dtype=kind).loss for kind in (None, torch.bfloat16))
    assert exact != rough
    assert rough.value == pytest.approx(exact.value, abs=0.1)


def test_models_that_cannot_be_compared_are_refused(checkpoint, tmp_path):
    other = save_tiny("olmoe", tmp_path / "other", vocab_size=300)
    with pytest.raises(conmoe.UsageError, match="vocabularies of 256 and 300"):
        conmoe.evaluate(checkpoint("olmoe"), DATA, against=other)
    large = token_data(2, 8)
    large.ids_NS[0, 0] = 256
    with pytest.raises(conmoe.UsageError, match="vocabulary of 256"):
        conmoe.evaluate(checkpoint("olmoe"), large)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(results, checkpoint, tmp_path):
    text = write_text(tmp_path)
    asked = ["evaluate", str(results / "shared"), "--against", str(checkpoint("olmoe")), "--data", str(text)]
    asked += ["--tokens", "224", "--seq-len", "32", "--json"]  # seven sequences: three and four
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone, together = (
        subprocess.run(
            [sys.executable, *how, "-m", "conmoe", *asked], env=environment, capture_output=True, text=True, check=True
        )
        for how in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])
    )
    one, two = json.loads(alone.stdout), json.loads(together.stdout)
    for name in ("loss", "source_loss", "excess_loss", "kl", "top1_agreement", "perplexity"):
        for part in ("value", "stderr"):
            assert two[name][part] == pytest.approx(one[name][part], rel=1e-6), name
    assert {name: one[name] for name in ("tokens", "bytes", "parameters")} == {
        name: two[name] for name in ("tokens", "bytes", "parameters")
    }
    assert together.stderr.count("evaluate ") == 1  # only the first process reports
