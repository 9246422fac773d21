"""Compressed models in the hands of Transformers: ways to generate that must not change what is generated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

from conmoe import Calibration, Request, apply, calibrate, load_tokenizer, load_tokens, plan
from conmoe.runtime import register
from tests.by_hand import write_shared
from tests.families import TINY, save_tiny

register()

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "disable_compile": True}
TEXTS = ["Once upon a time", "def close(self):", "12"]
#: Transformers takes back no tokens where a layer keeps a running state, compressed or not.
STATEFUL = {"qwen3_5_moe_text", "qwen3_next"}


@pytest.fixture(scope="module", params=sorted(TINY))
def family(request) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shared(family, tmp_path_factory) -> Path:
    return write_shared(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def model(shared) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(shared).eval()


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory) -> Path:
    """A folder with an OLMoE and what was made of it: ``source``, ``shared`` and ``sliced``."""
    folder = tmp_path_factory.mktemp("olmoe")
    source = save_tiny("olmoe", folder / "source")
    data = load_tokens(load_tokenizer(source), [], tokens=1024, seq_len=64)
    calibrate(source, folder / "statistics", data, Calibration())
    for form, method in {"shared": "conmoe", "sliced": "reap"}.items():
        apply(source, plan(source, folder / "statistics", None, Request(method)), folder / form)
        assert json.loads((folder / form / "config.json").read_text())["num_experts"] == 4
    return folder


forms = pytest.mark.parametrize("form", ["shared", "sliced"])


def load(folder: Path, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def ids(text: str = TEXTS[0]) -> Tensor:
    return torch.tensor([list(text.encode())])


def test_the_kind_of_cache_changes_nothing(model):
    expected = model.generate(ids(), **GREEDY)
    assert torch.equal(model.generate(ids(), use_cache=False, **GREEDY), expected)
    assert torch.equal(model.generate(ids(), cache_implementation="static", **GREEDY), expected)


def test_a_padded_batch_is_continued_as_each_text_alone(shared, model):
    tokenizer = AutoTokenizer.from_pretrained(shared)
    together = model.generate(**tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left"), **GREEDY)
    for text, row in zip(TEXTS, together, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **GREEDY)[0]
        assert torch.equal(row[-NEW:], alone[-NEW:]), text


def test_as_a_draft_it_leaves_the_tokens_of_its_source_alone(family, shared, model, tmp_path):
    source = load(save_tiny(family, tmp_path))
    if family in STATEFUL:
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            source.generate(ids(), assistant_model=model, **GREEDY)
        return
    assert torch.equal(source.generate(ids(), assistant_model=model, **GREEDY), source.generate(ids(), **GREEDY))


@forms
def test_layers_may_lie_on_disk(olmoe, tmp_path, form):
    expected = load(olmoe / form).generate(ids(), **GREEDY)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    placed = load(olmoe / form, device_map=places, offload_folder=tmp_path)
    assert placed.model.layers[1].mlp.gate.weight.is_meta
    assert torch.equal(placed.generate(ids(), **GREEDY), expected)
    assert torch.equal(load(olmoe / form, device_map="auto").generate(ids(), **GREEDY), expected)


@forms
def test_saved_and_loaded_again_it_generates_the_same(olmoe, tmp_path, form):
    before = load(olmoe / form)
    before.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).generate(ids(), **GREEDY), before.generate(ids(), **GREEDY))


@forms
def test_a_pipeline_takes_the_folder(olmoe, form):
    generator = pipeline("text-generation", model=str(olmoe / form), device="cpu")
    answers = generator(TEXTS, **GREEDY, return_full_text=False, batch_size=1)
    model, tokenizer = load(olmoe / form), AutoTokenizer.from_pretrained(olmoe / form)
    for text, (answer,) in zip(TEXTS, answers, strict=True):
        expected = model.generate(**tokenizer(text, return_tensors="pt"), **GREEDY)[0, -NEW:]
        assert answer["generated_text"] == tokenizer.decode(expected)


REMOTE = """
import sys
from transformers import pipeline
generator = pipeline("text-generation", model=sys.argv[1], device="cpu", trust_remote_code=True)
print(generator(sys.argv[2], max_new_tokens=8, do_sample=False, eos_token_id=None)[0]["generated_text"])
assert "conmoe" not in sys.modules
"""


@pytest.mark.slow
def test_a_pipeline_needs_no_package(olmoe, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", REMOTE, str(olmoe / "shared"), TEXTS[0]]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    generator = pipeline("text-generation", model=str(olmoe / "shared"), device="cpu")
    answer = generator(TEXTS[0], **GREEDY)[0]["generated_text"]
    assert done.stdout.decode("utf-8") == f"{answer}\n"


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@forms
def test_it_compiles_into_one_graph(olmoe, form, implementation):
    model = load(olmoe / form, experts_implementation=implementation)
    tokens_BS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens_BS).logits
        torch._dynamo.reset()
        got = torch.compile(model, fullgraph=True)(tokens_BS).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@forms
def test_a_compiled_model_generates_the_same(olmoe, form):
    model = load(olmoe / form)
    expected = model.generate(ids(), **GREEDY)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(ids(), cache_implementation="static", **GREEDY), expected)
