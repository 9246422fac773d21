"""DeepSeekMoE: its published fields and key layout, and its feed-forward layer against a loop over tokens."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from conmoe.runtime import register_family
from conmoe.runtime.modeling_deepseek import DeepseekConfig, DeepseekForCausalLM, DeepseekMoE
from tests.families import EXPERTS, TINY, save_tiny, tiny_model

register_family("deepseek")

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))


def test_defaults_are_those_of_the_published_model():
    with torch.device("meta"):
        model = DeepseekForCausalLM(DeepseekConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 16_375_728_128
    assert [isinstance(layer.mlp, DeepseekMoE) for layer in model.model.layers] == [False] + [True] * 27


def test_keys_on_disk_are_the_published_ones(tmp_path):
    save_tiny("deepseek", tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = {key for key in file.keys() if key.startswith("model.layers.1.mlp.")}  # noqa: SIM118  (not a mapping)
    projections = [f"{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    experts = {f"experts.{expert}.{name}" for expert in range(EXPERTS) for name in projections}
    expected = experts | {f"shared_experts.{name}" for name in projections} | {"gate.weight"}
    assert keys == {f"model.layers.1.mlp.{key}" for key in expected}


def test_a_published_checkpoint_needs_no_remote_code(tmp_path):
    save_tiny("deepseek", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    }
    config |= {"rope_theta": 10000, "rope_scaling": None, "aux_loss_alpha": 0.001, "seq_aux": True}
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model, DeepseekForCausalLM)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_model("deepseek")(IDS).logits)
        assert torch.isfinite(AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state).all()


@pytest.mark.parametrize("renormalise", [False, True])
@torch.no_grad()
def test_the_block_equals_a_loop_over_tokens(renormalise):
    block = tiny_model("deepseek", norm_topk_prob=renormalise).model.layers[1].mlp
    hidden_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    expected = []
    for token_D in hidden_TD:
        gate_E = (block.gate.weight @ token_D).softmax(0)
        gate_k, index_k = gate_E.topk(2)
        gate_k = gate_k / gate_k.sum() if renormalise else gate_k
        outputs = [
            gate * feed_forward(block.experts, expert, token_D) for gate, expert in zip(gate_k, index_k, strict=True)
        ]
        expected.append(sum(outputs) + block.shared_experts(token_D))
    torch.testing.assert_close(block(hidden_TD.unsqueeze(0))[0], torch.stack(expected))


def feed_forward(experts, expert, token_D):
    gate_I, up_I = (experts.gate_up_proj[expert] @ token_D).chunk(2)
    return experts.down_proj[expert] @ (F.silu(gate_I) * up_I)


@torch.no_grad()
def test_implementations_of_the_experts_agree():
    model = tiny_model("deepseek")
    results = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        results.append(model(IDS).logits)
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[2], results[0], atol=1e-5, rtol=1e-5)


def test_layers_are_sparse_where_the_config_says():
    config = TINY["deepseek"](num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    layers = AutoModelForCausalLM.from_config(config).model.layers
    assert [isinstance(layer.mlp, DeepseekMoE) for layer in layers] == [False, False, True, False, True, False]


def test_new_experts_and_routers_are_initialised():
    model = AutoModelForCausalLM.from_config(TINY["deepseek"](initializer_range=0.02))
    block = model.model.layers[1].mlp
    for tensor in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
        assert 0.01 < tensor.std() < 0.03


def test_router_logits_are_recorded():
    with torch.no_grad():
        output = tiny_model("deepseek").model(IDS, output_router_logits=True)
    assert [logits.shape for logits in output.router_logits] == [(48, EXPERTS)] * 2


def test_another_scoring_function_is_refused():
    with pytest.raises(ValueError, match="not known"):
        DeepseekConfig(scoring_func="sigmoid")


def test_the_config_survives_a_round_trip(tmp_path):
    TINY["deepseek"](n_shared_experts=3).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).n_shared_experts == 3
