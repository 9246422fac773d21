"""The recipes that quantise a compressed model: experts quantised, routers and maps untouched, and it still answers.

Each half runs where its package is installed: torchao, llm-compressor.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import conmoe
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
