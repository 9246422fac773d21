"""What llama.cpp's converter wants of a sliced checkpoint: counts, names, files; and, with its tree at hand, the file.

The converter reads ``config.json`` through ``AutoConfig``, takes the first count of experts that it finds there, and
gathers as many experts of each layer by name; a count that was left behind, or an expert
beyond it, is an error there, or a file that no engine loads.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig

import conmoe
from conmoe.source import open_source
from tests.conftest import Checkpoint
from tests.families import EXPERTS, TINY, TOP_K, save_tiny
from tests.results import on_disk
from tests.test_examples import example

KEEP = 4
#: Where its converter looks for counts, in its order: ``find_hparam`` in ``conversion/base.py``, and ``ernie.py``.
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
USED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k")


@pytest.fixture(scope="module")
def sliced(checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """``sliced(family)``: a checkpoint with half of the experts."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            request = conmoe.Request(method="reap", keep=str(KEEP))
            out = tmp_path_factory.mktemp("sliced") / family
            plan = conmoe.plan(checkpoint(family), calibrated(family), request=request)
            made[family] = conmoe.apply(checkpoint(family), plan, out, form="sliced").folder
        return made[family]

    return get


@pytest.mark.parametrize("family", TINY)
def test_no_count_is_left_behind_under_any_name(family: str, sliced: Checkpoint):
    folder = sliced(family)
    stated = json.loads((folder / "config.json").read_text())
    assert {stated[name] for name in COUNTS if name in stated} == {KEEP}
    assert {stated[name] for name in USED if name in stated} <= {TOP_K}
    read = AutoConfig.from_pretrained(folder).to_dict()
    assert {read[name] for name in COUNTS if read.get(name) is not None} == {KEEP}
    groups = read.get("n_group") or 1
    assert KEEP % groups == 0
    assert KEEP // groups >= 2  # a group is scored by the sum of its two best


@pytest.mark.parametrize("family", TINY)
def test_tensors_are_those_of_the_family_with_fewer_experts(family: str, sliced: Checkpoint, checkpoint: Checkpoint):
    """Same names, no expert beyond the count, no table of the old size beside the routers."""
    tensors, source = on_disk(sliced(family)), on_disk(checkpoint(family))
    assert set(tensors) <= set(source)
    assert {name for name in set(source) - set(tensors) if not re.search(r"\.experts\.\d+\.", name)} == set()
    numbers = {int(found[1]) for name in tensors if (found := re.search(r"\.experts\.(\d+)\.", name))}
    assert numbers in (set(), set(range(KEEP)))
    for name, value in tensors.items():
        if (
            re.search(r"(gate|router)\.(layer\.)?(weight|bias)$|e_score_correction_bias$", name)
            and "shared" not in name
        ):
            assert value.shape[-1 if value.ndim == 1 or "e_score" in name else 0] == KEEP, name
        if ".experts." in name and not re.search(r"\.experts\.\d+\.", name):
            assert value.shape[0] == KEEP, name


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_files_are_named_as_the_converter_looks_for_them(family: str, sliced: Checkpoint, checkpoint: Checkpoint):
    """It reads ``model*.safetensors`` and nothing else, and the tokenizer by Transformers."""
    folder, source = sliced(family), checkpoint(family)
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    assert weights
    assert all(re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) for name in weights)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    config, before = (json.loads((path / "config.json").read_text()) for path in (folder, source))
    assert config["architectures"] == before["architectures"]
    assert config["model_type"] == before["model_type"]
    for name in weights:
        with safe_open(folder / name, framework="pt") as stream:
            assert (stream.metadata() or {}).get("format") == "pt"


def test_a_shared_checkpoint_does_not_pass_for_a_stock_one(
    checkpoint: Checkpoint, calibrated: Checkpoint, tmp_path: Path
):
    """The converter goes by the name of the class, and knows none of these."""
    plan = conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), request=conmoe.Request(method="conmoe", keep="4"))
    conmoe.apply(checkpoint("olmoe"), plan, tmp_path / "shared", form="shared")
    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert config["architectures"] == ["ConmoeOlmoeForCausalLM"]
    assert config["model_type"] == "conmoe_olmoe"


@pytest.mark.parametrize("parts", [("gate_exps", "up_exps"), ("gate_up_exps",)])
def test_a_file_without_a_layer_of_the_checkpoint_is_at_fault(parts: tuple[str, ...], tmp_path: Path):
    """Of three layers the first is dense; one more beyond them is a head that predicts further tokens."""
    check = example("gguf_check", "benchmarks")
    source = open_source(save_tiny("deepseek_v3", tmp_path / "model", num_hidden_layers=3, first_k_dense_replace=1))
    held = {layer.index for layer in source.layers}
    assert held == {1, 2}
    dense = [f"blk.0.ffn_{part}.weight" for part in ("gate", "up", "down")]
    moe = [f"blk.{n}.ffn_{part}.weight" for n in (1, 2) for part in ("gate_inp", "down_exps", *parts)]
    others = ["blk.1.ffn_gate_inp_shexp.weight", "blk.2.exp_probs_b.bias", "blk.3.ffn_gate_inp.weight"]
    assert check.layer_faults([*dense, *moe, *others], held, 3) == []
    for name in moe:
        assert check.layer_faults([*dense, *(each for each in moe if each != name), *others], held, 3), name
    assert check.layer_faults([*moe, "blk.0.ffn_gate_inp.weight"], held, 3)
    assert len(check.layer_faults(dense, held, 3)) == len(check.PARTS)


@pytest.mark.slow
@pytest.mark.skipif("CONMOE_LLAMA_CPP" not in os.environ, reason="CONMOE_LLAMA_CPP names no source tree of llama.cpp")
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_its_converter_takes_it_and_the_file_tells_the_truth(family: str, sliced: Checkpoint, tmp_path: Path):
    check = example("gguf_check", "benchmarks")
    words = [str(sliced(family)), "--llama-cpp", os.environ["CONMOE_LLAMA_CPP"], "--pre", "gpt-2"]
    try:
        assert check.main([*words, "--output", str(tmp_path / "found.json")]) == 0
    finally:
        sys.path[:] = [path for path in sys.path if not path.endswith("gguf-py")]
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["metadata"]["expert_count"] == KEEP
    assert row["metadata"]["expert_used_count"] == TOP_K
    assert EXPERTS != KEEP
