"""The recipes that quantise a compressed model: experts quantised, routers and maps untouched, and it still answers.

Each half runs where its package is installed: torchao, llm-compressor.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import conmoe
from tests.conftest import token_data
from tests.results import on_disk
from tests.test_examples import example

FAMILIES = ["olmoe", "qwen3_moe", "mixtral"]
FORMS = [("conmoe", "shared"), ("reap", "sliced")]
LOW = (torch.int8, torch.float8_e4m3fn)


@pytest.fixture
def quantiser():
    def get(package):
        pytest.importorskip(package)
        warnings.simplefilter("ignore")  # theirs
        return example(f"quantise_{package}")

    with warnings.catch_warnings():
        yield get


def compressed(family, method, form, checkpoint, calibrated, folder):
    plan = conmoe.plan(checkpoint(family), calibrated(family), request=conmoe.Request(method=method, form=form))
    conmoe.apply(checkpoint(family), plan, folder, form=form)
    return folder


def check(plain, out, load):
    before, after = on_disk(plain), on_disk(out)
    kept = [name for name in before if name.endswith((".gate.weight", "expert_map", "expert_gain"))]
    assert kept
    for name in kept:
        assert torch.equal(before[name], after[name])
    experts = {name: tensor for name, tensor in after.items() if ".experts." in name and "zero_point" not in name}
    low = sum(tensor.numel() for tensor in experts.values() if tensor.dtype in LOW)
    assert low == sum(tensor.numel() for name, tensor in before.items() if ".experts." in name)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        ours, model = load(plain)(input_ids=ids).logits, load(out)
        theirs = model(input_ids=ids).logits
        assert model.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    error = (ours - theirs).norm() / ours.norm()
    assert 0 < error < 0.2  # an expert or a scale in the wrong place gives about 1


def test_rows_of_two_models_of_one_form_stand_side_by_side(tmp_path, checkpoint, capsys):
    """Each replaces its own, and rows of the first runs, which name no model, stay as they are."""
    script, file = example("quantised", "benchmarks"), tmp_path / "rows.json"
    words = [str(checkpoint("olmoe")), "--data", "text.txt", "--output", str(file), "--models", "a", "b"]
    options = script._parse(words)

    def told(model, size):
        numbers = {name: {"value": 0.5, "stderr": None} for name in ("kl", "top1_agreement")}
        sizes = {"bytes": size, "share_of_source": 0.5, "experts_low_precision": 1.0}
        named = {"model": model} if model else {}
        return {"recipe": "none", **named, "form": "sliced", "generated": "a", "from_source": numbers, **sizes}

    old = {**told(None, 1), "source": options.source.name}
    conmoe.write_json(file, {"rows": [old]})
    for model, size in (("a", 2), ("b", 3), ("a", 4)):
        report = script._merged(file, [told(model, size)], options)
        conmoe.write_json(file, report)
    assert [(row.get("model"), row["bytes"]) for row in report["rows"]] == [(None, 1), ("b", 3), ("a", 4)]
    lines = script.table(report["rows"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 0.5000 |" in lines[-1]
    with pytest.raises(SystemExit):
        script._parse([*words, "elsewhere/a"])
    recorded = json.loads(Path("benchmarks/results-quantised.json").read_text())["rows"]
    assert len(script.table(recorded).splitlines()) == 2 + len(recorded)


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_distance_is_that_of_conmoe_evaluate_and_has_no_error_of_one_sequence(
    sequences, checkpoint, calibrated, tmp_path
):
    script, data = example("quantised", "benchmarks"), token_data(sequences, 24)
    half = compressed("olmoe", "reap", "sliced", checkpoint, calibrated, tmp_path / "half")
    source, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (checkpoint("olmoe"), half))
    found = script.distance(source, model, data.ids_NS)
    expected = conmoe.evaluate(half, data, against=checkpoint("olmoe")).as_json()
    for name, number in found.items():
        assert number == pytest.approx(expected[name], abs=1e-5), name
    assert (found["kl"]["stderr"] is None) == (sequences == 1)


@pytest.mark.parametrize("recipe", ["int8-weight-only", "fp8-weight-only"])
@pytest.mark.parametrize(("method", "form"), FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_torchao(family, method, form, recipe, checkpoint, calibrated, quantiser, tmp_path):
    script = quantiser("torchao")
    plain = compressed(family, method, form, checkpoint, calibrated, tmp_path / "plain")
    script.main([str(plain), str(tmp_path / "out"), "--recipe", recipe])
    check(plain, tmp_path / "out", script.load)


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "w8a8"])
@pytest.mark.parametrize(("method", "form"), FORMS)
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_llmcompressor(family, method, form, recipe, checkpoint, calibrated, quantiser, tmp_path, monkeypatch):
    script = quantiser("llmcompressor")
    monkeypatch.chdir(tmp_path)  # it writes logs
    plain = compressed(family, method, form, checkpoint, calibrated, tmp_path / "plain")
    lengths = ["--tokens", "1024", "--seq-len", "64"]
    script.main([str(plain), str(tmp_path / "out"), "--recipe", recipe, *lengths])
    check(plain, tmp_path / "out", script.load)


def test_llmcompressor_refuses_what_it_would_write_under_wrong_names(checkpoint, quantiser, tmp_path):
    script = quantiser("llmcompressor")
    with pytest.raises(SystemExit, match="other names"):
        script.main([str(checkpoint("mixtral")), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
