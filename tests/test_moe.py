"""The structural rule finds every family's parts, and the canonical experts are the family's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

import conmoe
from conmoe.moe import canonical, count_field, family_layout, logical_rows, moe_layers
from conmoe.ops.experts import expert_output, select, tensors
from conmoe.source import open_source
from tests.conftest import token_data
from tests.families import EXPERTS, TINY, TOP_K, save_tiny, tiny_model

families = pytest.mark.parametrize("family", TINY)
TRANSPOSED, BIASED = {"gpt_oss"}, {"gpt_oss"}


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in module.named_parameters()}


@families
def test_every_moe_layer_is_found_with_its_numbers(family):
    model = tiny_model(family)
    first = {"ernie4_5_moe": 1, "deepseek": 1, "deepseek_v2": 1, "deepseek_v3": 1, "glm4_moe": 1}.get(family, 0)
    layers = moe_layers(model)
    assert [layer.index for layer in layers] == list(range(first, model.config.num_hidden_layers))
    for layer in layers:
        assert (layer.logical, layer.stored, layer.top_k) == (EXPERTS, EXPERTS, TOP_K)
        grouped = family in ("deepseek_v2", "deepseek_v3", "glm4_moe")
        assert (layer.groups, layer.groups_used) == ((2, 1) if grouped else (1, 1))
        assert model.get_submodule(layer.experts) is model.get_submodule(layer.block).experts
        assert layer.decoder == f"model.layers.{layer.index}"
    assert getattr(model.config, count_field(model.config)) == EXPERTS


@families
def test_a_family_layout_and_the_canonical_one_are_inverse(family):
    model = tiny_model(family)
    for layer in moe_layers(model):
        module = model.get_submodule(layer.experts)
        values = parameters(module)
        experts = canonical(module, values)
        assert experts.gate_EID.shape == (EXPERTS, 16, 32)
        assert (experts.gate_bias_EI is not None) == (family in BIASED)
        back = family_layout(module, tensors(experts))
        assert back.keys() == values.keys()
        assert all(torch.equal(back[name], value) and back[name].is_contiguous() for name, value in values.items())
        few = family_layout(module, tensors(select(experts, torch.tensor([5, 1]))))
        assert all(torch.equal(few[name], value[[5, 1]]) for name, value in values.items())


@families
def test_reading_a_layer_writes_nothing_and_copies_nothing(family):
    model = tiny_model(family)
    module = model.get_submodule(moe_layers(model)[0].experts)
    values = parameters(module)
    memory = {value.untyped_storage().data_ptr() for value in values.values()}
    assert {value.untyped_storage().data_ptr() for value in tensors(canonical(module, values)).values()} <= memory


@families
def test_canonical_experts_answer_as_the_module_does(family):
    """Expert by expert and token by token, against the module's own forward."""
    model = tiny_model(family)
    module = model.get_submodule(moe_layers(model)[-1].experts)
    experts = canonical(module, parameters(module))
    generator = torch.Generator().manual_seed(0)
    x_TD = 3 * torch.randn(12, 32, generator=generator)
    index_Tk = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in x_TD])
    weight_Tk = torch.rand(12, TOP_K, generator=generator)
    expected = torch.zeros_like(x_TD)
    for token, (chosen, gates) in enumerate(zip(index_Tk.tolist(), weight_Tk.tolist(), strict=True)):
        for expert, gate in zip(chosen, gates, strict=True):
            expected[token] += gate * expert_output(experts, expert, x_TD[token : token + 1])[0]
    forward: Any = type(module).forward
    with torch.no_grad():
        got = forward.__wrapped__(module, x_TD, index_Tk, weight_Tk)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@families
def test_router_rows_are_found_wherever_the_family_keeps_them(family):
    model = tiny_model(family)
    layer = moe_layers(model)[-1]
    rows = {name.removeprefix(f"{layer.block}."): axis for name, axis in logical_rows(model, layer).items()}
    bias = {
        "deepseek_v3": {"gate.e_score_correction_bias": 0},
        "glm4_moe": {"gate.e_score_correction_bias": 0},
        "minimax_m2": {"e_score_correction_bias": 0},
        "ernie4_5_moe": {"gate.moe_statics.e_score_correction_bias": 1},
        "gpt_oss": {"router.bias": 0},
    }
    router = layer.router.rpartition(".")[2]
    assert rows == {f"{router}.weight": 0, **bias.get(family, {})}


# What is refused ----------------------------------------------------------------------------------------------------


def tiny_config(name: str, **fields) -> PretrainedConfig:
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 16,
    }
    return getattr(transformers, name)(**{**small, **fields})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (("LlamaConfig", {}), "dense model .type 'llama'.: it has no experts"),
        (("Qwen3Config", {"head_dim": 8}), "dense model .type 'qwen3'."),
        (("JetMoeConfig", {"kv_channels": 8}), "experts of model type 'jetmoe' are built in a way"),
        (("NemotronHConfig", {"layer_types": ["moe", "moe"]}), "experts of model type 'nemotron_h' are not gated MLPs"),
        (("GPT2Config", {}), "dense model"),
    ],
)
def test_what_departs_from_the_rule_is_refused_in_one_sentence(config, sentence):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(config[0], **config[1]))
    with pytest.raises(conmoe.UsageError, match=sentence) as caught:
        moe_layers(model)
    assert "\n" not in str(caught.value)


def changed(change) -> conmoe.UsageError:
    model = tiny_model("olmoe")
    for layer in model.model.layers:
        change(layer.mlp)
    with pytest.raises(conmoe.UsageError) as caught:
        moe_layers(model)
    return caught.value


def test_a_block_that_departs_from_the_rule_is_refused():
    assert "no router" in str(changed(lambda block: setattr(block, "gate", None)))
    assert "how many experts a token gets" in str(changed(lambda block: delattr(block.gate, "top_k")))
    assert "not gated MLPs" in str(changed(lambda block: setattr(block.experts, "has_gate", False)))
    assert "two sets" in str(changed(lambda block: setattr(block, "twin", copy.deepcopy(block))))
    wide = torch.nn.Parameter(torch.zeros(EXPERTS + 1, 32))
    assert "one row for each" in str(changed(lambda block: setattr(block.gate, "weight", wide)))
    table = torch.zeros(256, TOP_K, dtype=torch.int64)
    assert "by a table" in str(changed(lambda block: block.gate.register_buffer("table", table)))


def folder_with(config: dict, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "no_such_model"}, "cannot be used"),
        ({"model_type": "t5"}, "not supported"),
        ({"model_type": "dbrx"}, "not supported"),
        ({"model_type": "olmoe", "quantization_config": {"quant_method": "gptq"}}, "is quantised"),
    ],
)
def test_a_folder_of_something_else_is_refused_in_one_sentence(config, sentence, tmp_path):
    with pytest.raises(conmoe.UsageError, match=sentence) as caught:
        open_source(folder_with(config, tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_a_language_model_beside_others_is_refused_before_it_is_calibrated(tmp_path):
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5MoeConfig(text_config=TINY["qwen3_5_moe_text"]().to_dict(), vision_config=vision)
    transformers.Qwen3_5MoeForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    with pytest.raises(conmoe.UsageError, match="holds a language model beside others"):
        conmoe.calibrate(tmp_path / "model", tmp_path / "statistics", token_data(2))
    assert not (tmp_path / "statistics").exists()


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(conmoe.UsageError, match=r"is no model: it holds no config\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_experts": 9}, "stored as 8 tensors, but the configuration asks for 1 for each of 9 experts"),
        ({"num_experts": 7}, "asks for 1 for each of 7 experts"),
        ({"intermediate_size": 8}, r"has shape \[32, 16\], but the configuration of the model asks for \[32, 8\]"),
        ({"vocab_size": 300}, r"has shape \[256, 32\]"),
        ({"num_hidden_layers": 3}, "holds no tensor for model.layers.2"),
    ],
)
def test_a_config_that_its_tensors_contradict_is_refused_on_headers_alone(fields, sentence, tmp_path):
    folder = save_tiny("olmoe", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(conmoe.ConmoeError, match=sentence):
        open_source(folder)
