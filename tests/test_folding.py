"""Condensed layers folded into dense ones: stock models that answer as the shared form does, or one clear sentence."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

import conmoe
from conmoe import folding
from conmoe.evaluate.fidelity import measure
from conmoe.ops import plans
from conmoe.preview import preview
from conmoe.runtime import register_family
from conmoe.source import open_source
from conmoe.types import LayerPlan
from tests.conftest import token_data
from tests.families import EXPERTS, TINY, TOP_K, VOCAB, save_tiny, spread_weights, tiny_tokenizer
from tests.results import config_of, hand_made, load, load_stock, logits, on_disk

DOCS = Path(__file__).parent.parent / "docs" / "condensing.md"

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 255,
    "pad_token_id": 254,
}
_TYPES = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
_NUM, _ROUTED = {"num_experts": EXPERTS}, {"n_routed_experts": EXPERTS, "n_shared_experts": 1}
#: Families that nothing else is tested with: configuration class and what it takes beside the sizes.
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("AfmoeConfig", {**_NUM, "num_shared_experts": 1, "num_dense_layers": 1}),
    "axk1": ("AXK1Config", {**_ROUTED, **_TYPES, **_LATENT}),
    "axk2": ("AXK2Config", {**_ROUTED, **_TYPES, **_LATENT}),
    "beam": ("BeamConfig", {**_NUM, **_TYPES, "n_group": 1, "topk_group": 1}),
    "cohere2_moe": ("Cohere2MoeConfig", {**_NUM, **_TYPES, "num_shared_experts": 1}),
    "deepseek_v32": ("DeepseekV32Config", {**_ROUTED, **_TYPES, **_LATENT}),
    "dots1": ("Dots1Config", {**_ROUTED, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "exaone_moe": ("ExaoneMoeConfig", {**_NUM, **_TYPES, "num_shared_experts": 1, "n_group": 1, "topk_group": 1}),
    "flint": ("FlintConfig", {**_NUM, "mlp_only_layers": [0], "shared_expert_intermediate_size": 24}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", {**_ROUTED, **_TYPES, **_LATENT}),
    "hy_v3": ("HYV3Config", {**_NUM, **_TYPES, "num_shared_experts": 1}),
    "hy_v4": ("HYV4Config", {**_ROUTED, **_TYPES, **_LATENT}),
    "laguna": (
        "LagunaConfig",
        {**_NUM, **_TYPES, "shared_expert_intermediate_size": 24, "moe_routed_scaling_factor": 2.5},
    ),
    "mellum": ("MellumConfig", {"num_local_experts": EXPERTS, **_TYPES}),
}
Checkpoint = Callable[[str], Path]


@pytest.fixture(scope="module")
def any_checkpoint(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Like ``checkpoint``, of the further families too, where this release of Transformers has them."""

    def get(family: str) -> Path:
        if family in TINY:
            return checkpoint(family)
        name, own = FURTHER[family]
        if not hasattr(transformers, name):
            pytest.skip(f"Transformers {transformers.__version__} has no {name}")
        folder = tmp_path_factory.getbasetemp() / f"further-{family}"
        if not folder.exists():
            config: PretrainedConfig = getattr(transformers, name)(**{**_SIZES, **own})
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config)
            spread_weights(model, 0)
            model.eval().save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        register_family(family)
        return folder

    return get


def condensed(members: list[int], gates: list[float]) -> LayerPlan:
    return plans.condense(torch.tensor(members, dtype=torch.int64), torch.tensor(gates), EXPERTS)


def sparse_layers(folder: Path) -> list[int]:
    return [layer.index for layer in open_source(folder).layers]


def chosen(folder: Path) -> dict[int, LayerPlan]:
    """Layers that the family can have dense, the deepest it can, of several widths where it can have several."""
    source = open_source(folder)
    layers = sparse_layers(folder)
    three, none = condensed([1, 4, 6], [0.3, 0.05, 0.6]), condensed([], [])
    if len(layers) > 2 and folding.can_be_dense(source, layers[1:2]):
        return {layers[1]: three}
    if len(layers) > 2 and folding.can_be_dense(source, [layers[0], layers[1]]):
        return {layers[0]: three, layers[1]: none}
    return {layers[0]: three} if folding.dense_positions(source.config) == "first" else {layers[-1]: three}


CAN = ("qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "deepseek")
FURTHER_CAN = ("flint", "exaone_moe", "laguna", "afmoe")
SLOW_CAN = ("beam", "deepseek_v32", "dots1", "glm4_moe_lite", "hy_v3", "mellum")


@pytest.mark.parametrize(
    "family", [*CAN, *FURTHER_CAN, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW_CAN)]
)
def test_a_folded_model_is_stock_and_answers_as_the_shared_one(family, any_checkpoint, tmp_path):
    folder = any_checkpoint(family)
    per_layer = chosen(folder)
    plan = hand_made(folder, {(index,): layer for index, layer in per_layer.items()})
    for form in ("sliced", "shared"):
        conmoe.apply(folder, plan, tmp_path / form, form=form)
        conmoe.verify(tmp_path / form, folder, plan, form)
    folded, shared = load_stock(tmp_path / "sliced"), load(tmp_path / "shared")
    torch.testing.assert_close(logits(folded), logits(shared), rtol=1e-4, atol=1e-4)
    assert sparse_layers(tmp_path / "sliced") == [i for i in sparse_layers(folder) if i not in per_layer]
    assert logits(folded).std() > 0.1
    assert folded.num_parameters() < load_stock(folder).num_parameters() or family in ("ernie4_5_moe",)


@pytest.mark.parametrize("family", [*TINY, *FURTHER])
def test_the_table_of_the_docs_says_which_families_can(family, any_checkpoint):
    folder = any_checkpoint(family)
    source = open_source(folder)
    assert row(family) == (folding.dense_positions(source.config), refusal(folder) is None)
    assert (refusal(folder) is None) == (family in (*CAN, *FURTHER_CAN, *SLOW_CAN))


def test_the_table_has_no_other_families():
    named = re.findall(r"^\| `(\w+)` ", DOCS.read_text().split("## Which families")[1], re.MULTILINE)
    assert named == sorted({*TINY, *FURTHER})


def row(family: str) -> tuple[str, bool]:
    """What the docs say of a family: where dense layers can be, and whether condensed ones can be folded."""
    (line,) = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{family}` ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return cells[1], cells[2] == "yes"


def refusal(folder: Path) -> str | None:
    plan = hand_made(folder, {(index,): layer for index, layer in chosen(folder).items()})
    try:
        folding.fold(open_source(folder), plan)
    except conmoe.UsageError as error:
        return str(error)
    return None


def test_refusals_say_why(any_checkpoint):
    expected = {
        "olmoe": "cannot call single layers dense",
        "qwen2_moe": "more than add up its experts .*shared_expert_gate",
        "qwen3_next": "more than add up its experts .*shared_expert_gate",
        "axk1": "post_mlp_layernorm",
        "cohere2_moe": "force_rope would change too",
        "hy_v4": "activate otherwise",
    }
    for family, words in expected.items():
        found = refusal(any_checkpoint(family))
        assert found is not None
        assert "--form shared" in found
        assert re.search(words, found), found


def test_layers_that_a_configuration_cannot_call_dense_are_refused_before_anything_is_written(checkpoint, tmp_path):
    folder = checkpoint("deepseek_v3")
    plan = hand_made(folder, {(2,): condensed([0], [0.5])})
    with pytest.raises(conmoe.UsageError, match="only its first layers dense, and the plan condenses layers 2;"):
        conmoe.apply(folder, plan, tmp_path / "out", form="sliced")
    every = hand_made(folder, {(index,): condensed([0], [0.5]) for index in (1, 2)})
    with pytest.raises(conmoe.UsageError, match="condenses every layer"):
        conmoe.apply(folder, every, tmp_path / "out", form="sliced")
    assert not list(tmp_path.iterdir())


def test_dense_at_both_ends(checkpoint):
    source = open_source(checkpoint("ernie4_5_moe"))
    assert [folding.can_be_dense(source, layers) for layers in ([1], [2], [1, 2])] == [True, True, False]


def test_what_is_folded_is_copied_and_only_down_projections_are_rounded_once(tmp_path):
    folder = save_tiny("deepseek_v3", tmp_path / "source", dtype=torch.bfloat16, num_hidden_layers=4)
    gates = [0.3, 0.07]
    plan = hand_made(folder, {(1,): condensed([2, 5], gates), (2,): condensed([], [])})
    conmoe.apply(folder, plan, tmp_path / "out", form="sliced")
    conmoe.verify(tmp_path / "out", folder, plan, "sliced")
    before, after = on_disk(folder), on_disk(tmp_path / "out")
    mlp = "model.layers.{}.mlp.".format
    width = config_of(tmp_path / "out")["intermediate_size"]
    assert width == max(2 * 16 + 16, 48) == 48
    for name in ("gate_proj", "up_proj"):
        parts = [before[f"{mlp(1)}experts.{e}.{name}.weight"] for e in (2, 5)]
        parts.append(before[f"{mlp(1)}shared_experts.{name}.weight"])
        assert torch.equal(after[f"{mlp(1)}{name}.weight"], torch.cat(parts))
        alone = before[f"{mlp(2)}shared_experts.{name}.weight"]
        assert torch.equal(after[f"{mlp(2)}{name}.weight"], torch.cat([alone, torch.zeros(32, 32).bfloat16()]))
    down = [
        (before[f"{mlp(1)}experts.{e}.down_proj.weight"].double() * float(torch.tensor(gate))).bfloat16()
        for e, gate in zip((2, 5), gates, strict=True)
    ]
    down.append(before[f"{mlp(1)}shared_experts.down_proj.weight"])
    assert torch.equal(after[f"{mlp(1)}down_proj.weight"], torch.cat(down, dim=1))
    untouched = [name for name in before if not name.startswith((mlp(1), mlp(2)))]
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert set(after) - set(untouched) == {
        f"{mlp(layer)}{name}.weight" for layer in (1, 2) for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_dense_layers_of_the_source_are_filled_up_with_neurons_of_zeros(checkpoint, tmp_path):
    folder = checkpoint("deepseek_v3")
    plan = hand_made(folder, {(1,): condensed([0, 1, 2, 3, 4], [0.1] * 5)})
    conmoe.apply(folder, plan, tmp_path / "out", form="sliced")
    before, after = on_disk(folder), on_disk(tmp_path / "out")
    assert config_of(tmp_path / "out")["intermediate_size"] == 6 * 16
    gate, down = (f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "down_proj"))
    assert torch.equal(after[gate][:48], before[gate])
    assert torch.equal(after[down][:, :48], before[down])
    assert not after[gate][48:].any()
    assert not after[down][:, 48:].any()


def test_other_layers_may_be_pruned_evenly(checkpoint, tmp_path):
    folder = checkpoint("qwen3_moe")
    kept = plans.prune(torch.tensor([0, 2, 3, 7]), EXPERTS)
    plan = hand_made(folder, {(0,): kept, (1,): condensed([1, 4], [0.3, 0.4])})
    for form in ("sliced", "shared"):
        conmoe.apply(folder, plan, tmp_path / form, form=form)
        conmoe.verify(tmp_path / form, folder, plan, form)
    folded, shared = load_stock(tmp_path / "sliced"), load(tmp_path / "shared")
    torch.testing.assert_close(logits(folded), logits(shared), rtol=1e-4, atol=1e-4)
    assert [layer.logical for layer in open_source(tmp_path / "sliced").layers] == [4]


def test_a_layer_without_experts_or_neurons_is_silent(checkpoint, tmp_path):
    folder = checkpoint("qwen3_moe")
    plan = hand_made(folder, {(1,): condensed([], [])})
    conmoe.apply(folder, plan, tmp_path / "out", form="sliced")
    conmoe.verify(tmp_path / "out", folder, plan, "sliced")
    stock = load_stock(folder)
    stock.model.layers[1].mlp.forward = torch.zeros_like
    torch.testing.assert_close(logits(load_stock(tmp_path / "out")), logits(stock), rtol=1e-4, atol=1e-4)


def test_damage_to_a_folded_layer_is_found(checkpoint, tmp_path):
    folder = checkpoint("glm4_moe")
    plan = hand_made(folder, {(1,): condensed([3], [0.4])})
    conmoe.apply(folder, plan, tmp_path / "out", form="sliced")
    file = tmp_path / "out" / "model.safetensors"
    shutil.copy(file, tmp_path / "whole")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        tensors = load_file(tmp_path / "whole")
        tensors[name][3, 5] += 0.5
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(conmoe.ConmoeError, match=name):
            conmoe.verify(tmp_path / "out", folder, plan, "sliced")


def test_a_folded_layer_that_computes_something_else_is_found(checkpoint, tmp_path, monkeypatch):
    folder = checkpoint("glm4_moe")
    plan = hand_made(folder, {(1,): condensed([3, 4], [0.4, 0.2])})
    monkeypatch.setattr(folding, "PROJECTIONS", (("up_proj", "gate_proj", "down_proj"),))
    monkeypatch.setattr(folding, "_check_activation", lambda *args: None)
    conmoe.apply(folder, plan, tmp_path / "out", form="sliced")
    with pytest.raises(conmoe.ConmoeError, match=r"layers\.1\.mlp .* does not answer as its experts do"):
        conmoe.verify(tmp_path / "out", folder, plan, "sliced")


def test_a_folded_result_can_be_measured_without_being_written(checkpoint, tmp_path):
    folder = checkpoint("qwen3_moe")
    plan = hand_made(folder, {(0,): condensed([1, 4], [0.3, 0.4])})
    conmoe.apply(folder, plan, tmp_path / "out", form="sliced")
    made = preview(open_source(folder), plan, "sliced")
    data = token_data(2, 12, seed=5)
    # sums of floats differ in the last bits with where their operands happen to lie in memory
    assert measure(made, data, None).loss.value == pytest.approx(
        conmoe.evaluate(tmp_path / "out", data).loss.value, rel=1e-6
    )
