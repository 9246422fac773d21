"""Consolidated models against the stock ones they must equal, for every family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conmoe.runtime import (
    COUNT_FIELDS,
    FAMILIES,
    class_names,
    modeling_conmoe,
    packaged_files,
    register,
    register_family,
    shared_config,
)
from conmoe.types import ConmoeError
from tests.by_hand import MAP, write_expanded, write_scope, write_shared
from tests.families import EXPERTS, TINY, save_tiny, tiny_model

register()

families = pytest.mark.parametrize("family", sorted(TINY))


def test_every_family_has_a_tiny_model():
    assert set(FAMILIES) == set(TINY)


@pytest.fixture(scope="module", params=sorted(TINY))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def shared(family, tmp_path_factory) -> Path:
    return write_shared(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def loaded(shared) -> PreTrainedModel:
    return load(shared)


def load(folder: Path, **options) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def tokens(count: int = 24) -> Tensor:
    return torch.randint(0, 250, (2, count), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(tokens()).logits


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_shared_equals_expanded(family, loaded, tmp_path, implementation):
    expanded = load(write_expanded(family, tmp_path))
    for model in (loaded, expanded):
        model.set_experts_implementation(implementation)
    difference = (logits(loaded) - logits(expanded)).abs().max()
    # Experts that are one and the same are summed in another order than copies of them.
    assert difference <= (0 if implementation == "batched_mm" else 1e-5), f"largest difference {difference:.2e}"
    assert (logits(expanded) - logits(tiny_model(family))).abs().max() > 0.1, "the map changes nothing"


def test_saved_again_it_is_the_same_checkpoint(family, shared, loaded, tmp_path):
    loaded.save_pretrained(tmp_path)
    assert keys(tmp_path) == keys(shared)
    again = load_file(tmp_path / "model.safetensors")
    for key, tensor in load_file(shared / "model.safetensors").items():
        assert torch.equal(again[key], tensor), key
    for file in packaged_files(family):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (shared, tmp_path))
    for field in ("model_type", "architectures", "auto_map", "num_logical_experts", "expert_pools"):
        assert after[field] == before[field], field
    loaded.set_experts_implementation("eager")
    reloaded = load(tmp_path, experts_implementation="eager")
    assert torch.equal(logits(reloaded), logits(loaded))


def test_only_maps_gains_and_fewer_experts_differ_from_the_stock_layout(family, shared, tmp_path):
    stock = keys(save_tiny(family, tmp_path))
    added = keys(shared) - stock
    assert {key.rpartition(".")[2] for key in added} == {"expert_map", "expert_gain"}
    layers = {key.split(".")[2] for key in added}
    assert len(added) == 2 * len(layers) == 4
    assert all(".experts." in key for key in stock - keys(shared))


def test_config_states_prototypes_and_logical_experts(shared):
    config = AutoConfig.from_pretrained(shared)
    counts = {getattr(config, field) for field in COUNT_FIELDS if hasattr(config, field)}
    assert counts == {5}
    assert config.num_logical_experts == EXPERTS
    assert type(config).__name__.startswith("Conmoe")


def test_generates_from_text(shared, loaded):
    tokenizer = AutoTokenizer.from_pretrained(shared)
    batch = tokenizer(["hello", "world"], return_tensors="pt")
    assert loaded.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (2, 9)


@families
def test_an_identity_map_is_the_stock_model_bit_for_bit(family, tmp_path):
    everything = range(EXPERTS)
    identity = load(write_shared(family, tmp_path / "shared", kept=everything, expert_map=everything))
    stock = load(save_tiny(family, tmp_path / "stock"))
    assert torch.equal(logits(identity), logits(stock))


REMOTE = """
import sys
import torch
from transformers import AutoModelForCausalLM
for source, target, ids in zip(*[iter(sys.argv[1:])] * 3):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(torch.load(ids)).logits, target + ".pt")
    model.save_pretrained(target)
assert "conmoe" not in sys.modules
"""


def test_remote_code_needs_no_package(tmp_path):
    torch.save(tokens(), tmp_path / "ids.pt")
    folders = {family: write_shared(family, tmp_path / family) for family in sorted(TINY)}
    arguments = []
    for family, folder in folders.items():
        arguments += [str(folder), str(tmp_path / f"{family}-again"), str(tmp_path / "ids.pt")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", REMOTE, *arguments]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for family, folder in folders.items():
        again = tmp_path / f"{family}-again"
        assert torch.equal(torch.load(f"{again}.pt"), logits(load(folder))), family
        assert torch.equal(torch.load(f"{again}.pt"), logits(load(again))), family
        assert keys(again) == keys(folder)
        assert {file.name for file in packaged_files(family)} <= {file.name for file in again.iterdir()}
    torch.set_num_threads(threads)


def test_gains_multiply_the_gates(tmp_path):
    doubled = load(write_shared("olmoe", tmp_path / "doubled", gains=[2.0] * EXPERTS))
    plain = load(write_shared("olmoe", tmp_path / "plain"))
    block = "model.layers.0.mlp"
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).unsqueeze(0)
    with torch.no_grad():
        expected, got = (model.get_submodule(block)(hidden) for model in (plain, doubled))
    torch.testing.assert_close(got, 2 * expected)


def test_gains_keep_float32_when_the_model_does_not(tmp_path):
    gains = [1 + index / 1000 for index in range(EXPERTS)]
    model = load(write_shared("deepseek_v3", tmp_path, gains=gains), dtype=torch.bfloat16)
    gate = model.model.layers[1].mlp.gate
    assert torch.equal(gate.expert_gain, torch.tensor(gains))
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32


def test_a_model_can_be_built_from_its_config(tmp_path):
    config = AutoConfig.from_pretrained(write_shared("mixtral", tmp_path))
    model = AutoModelForCausalLM.from_config(config)
    gate, experts = model.model.layers[1].mlp.gate, model.model.layers[1].mlp.experts
    assert gate.weight.shape[0] == EXPERTS
    assert experts.num_experts == len(experts.gate_up_proj) == config.num_local_experts == 5
    assert gate.expert_map.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert torch.equal(gate.expert_gain, torch.ones(EXPERTS))
    assert torch.isfinite(logits(model)).all()


def test_router_logits_and_the_balancing_loss_count_logical_experts(tmp_path):
    model = load(write_shared("qwen3_moe", tmp_path))
    with torch.no_grad():
        output = model(tokens(), labels=tokens(), output_router_logits=True)
    assert output.router_logits[0].shape[-1] == EXPERTS
    assert torch.isfinite(output.aux_loss)


POOLS = {1: (1, 6), 2: (1, 6), 3: (3, 3)}


@pytest.fixture
def scoped(tmp_path) -> Path:
    return write_scope("glm4_moe", tmp_path / "scoped", POOLS, num_hidden_layers=4)


def test_layers_of_a_scope_share_memory_and_file(scoped, tmp_path):
    assert not [key for key in keys(scoped) if key.startswith("model.layers.2.mlp.experts.")]
    model = load(scoped)
    owner, sharer, other = (model.model.layers[index].mlp.experts for index in (1, 2, 3))
    for name, tensor in owner.named_parameters():
        assert sharer.get_parameter(name) is tensor
        assert len(tensor) == 6
        assert len(other.get_parameter(name)) == 3
    model.save_pretrained(tmp_path / "again")
    assert keys(tmp_path / "again") == keys(scoped)
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_a_scope_answers_as_its_expanded_model(scoped):
    model = load(scoped)
    expanded = tiny_model("glm4_moe", num_hidden_layers=4)
    originals = [getattr(layer.mlp, "experts", None) for layer in expanded.model.layers]
    pools = {owner: {k: v.clone() for k, v in originals[owner].named_parameters()} for owner, _ in POOLS.values()}
    for layer, (owner, size) in POOLS.items():
        for name, tensor in originals[layer].named_parameters():
            tensor.data.copy_(pools[owner][name][torch.arange(EXPERTS) % size])
    torch.testing.assert_close(logits(model), logits(expanded), atol=1e-5, rtol=1e-5)


def test_a_scope_beside_tied_word_embeddings(tmp_path):
    pools = {0: (0, 4), 1: (0, 4)}
    model = load(write_scope("olmoe", tmp_path / "tied", pools, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[1].mlp.experts.down_proj is model.model.layers[0].mlp.experts.down_proj
    model.save_pretrained(tmp_path / "again")
    assert keys(tmp_path / "again") == keys(tmp_path / "tied")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_a_pool_of_a_scope_may_exceed_the_experts_of_a_layer(tmp_path):
    config = AutoConfig.from_pretrained(write_scope("olmoe", tmp_path, {0: (0, 8), 1: (0, 8)}))
    config.expert_pools, config.num_experts = {"0": [0, 11], "1": [0, 11]}, 11
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        layer.mlp.gate.expert_map.copy_(torch.arange(3, 11))
    model.save_pretrained(tmp_path / "wide")
    assert torch.equal(logits(load(tmp_path / "wide")), logits(model.eval()))


def test_vllm_may_not_run_layers_that_share_a_pool(scoped):
    config = AutoConfig.from_pretrained(scoped)
    config._attn_implementation = "vllm"
    with torch.device("meta"), pytest.raises(ValueError, match="vLLM cannot serve"):
        AutoModelForCausalLM.from_config(config)


def test_vllm_finds_no_router_that_it_would_replace(tmp_path, monkeypatch):
    # As the model is built there, but for the attention itself.
    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        monkeypatch.setitem(functions, "vllm", functions["sdpa"])
    folder = write_shared("phimoe", tmp_path, gains=torch.linspace(0.5, 1.5, EXPERTS).tolist())
    stock, built = load(folder), AutoModelForCausalLM.from_pretrained(folder, attn_implementation="vllm")
    routers = [layer.mlp.router for layer in built.model.layers]
    assert all(not isinstance(module, torch.nn.Linear) for router in routers for module in router.modules())
    assert built.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(logits(built), logits(stock))
    built.train()
    assert not torch.equal(logits(built), logits(stock))  # in training it draws at random, as the stock router does


@pytest.mark.parametrize("first", [False, True])
def test_the_router_of_older_releases_puts_indices_first(first):
    class Router(torch.nn.Module):
        def forward(self):
            output = torch.zeros(1, 8), torch.tensor([[0.5, 0.25]]), torch.tensor([[3, 6]])
            return output[::-1] if first else output

    router = Router()
    modeling_conmoe._remap(router, 8, 5)
    router.expert_gain[6] = 2
    output = router()[::-1] if first else router()
    assert [tensor.tolist() for tensor in output[1:]] == [[[0.5, 0.5]], [[3, 1]]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "lacks model.layers.1.mlp.gate.expert_map"),
        ([*MAP[:-1], 5], "names experts 0 to 5, but the checkpoint stores experts 0 to 4"),
        ([*MAP[:-1], -1], "names experts -1 to 4"),
    ],
)
def test_a_bad_map_is_refused(tmp_path, value, message):
    write_shared("olmoe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.expert_map"]
    if value is not None:
        tensors["model.layers.1.mlp.gate.expert_map"] = torch.tensor(value)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_map_of_the_wrong_length_is_refused(tmp_path):
    write_shared("olmoe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.gate.expert_map"] = torch.tensor(MAP[:-1])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        load(tmp_path)
    with pytest.raises(ValueError, match="expert_map, or has them in a length"):
        load(tmp_path, ignore_mismatched_sizes=True)


def test_a_stock_loader_fails_instead_of_misreading(tmp_path):
    folder = write_shared("olmoe", tmp_path)
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "trust_remote_code" in result.stderr


def test_registration_is_idempotent_and_open_to_other_families():
    register()
    register_family("flex_olmo")
    assert class_names("flex_olmo").causal == "FlexOlmoForCausalLM"
    assert "conmoe_flex_olmo" in AutoConfig.for_model("conmoe_flex_olmo").model_type
    with pytest.raises(ConmoeError, match="no causal language model"):
        register_family("no_such_family")


def test_shared_config_wants_the_expert_count_it_replaces():
    with pytest.raises(ConmoeError, match="states no expert count of 8"):
        shared_config({"num_experts": 16}, "olmoe", "OlmoeForCausalLM", prototypes=4, logical=8)
