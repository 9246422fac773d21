"""Sources in FP8 and compressed-tensors: read as what they stand for, cut as what they are."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import conmoe
from conmoe.artifacts import kept_experts
from conmoe.checkpoint import read_parameter
from conmoe.keeping import MERGING
from conmoe.lowprec import renumbered_modules
from conmoe.ops.dequantise import dequantise, grid, unpack
from conmoe.ops.plans import prune, remap
from conmoe.progress import SILENT
from conmoe.registry import methods
from conmoe.source import open_source, read_experts
from conmoe.types import LayerPlan, Plan
from tests.commands import runner, tree, write_text
from tests.conftest import Checkpoint, token_data
from tests.families import EXPERTS, save_tiny
from tests.heads import with_head
from tests.low_precision import BLOCK, KINDS, fp8_block, int4_group, numbers_of, packed, quantised
from tests.results import (
    FORMS,
    assert_bits,
    by_layer,
    config_of,
    edit_config,
    expected_disk,
    hand_made,
    load,
    load_stock,
    logits,
    on_disk,
    silenced,
    without_maps,
)
from tests.test_stream import streamed_logits, whole_model

APPLY = importlib.import_module("conmoe.apply")  # the package shows the function of that name
LAYERS = {"olmoe": (0, 1), "qwen3_moe": (0, 1), "deepseek_v3": (1, 2)}
#: Which model is stored how in the tests of results.
PAIRS = [("qwen3_moe", "fp8-block"), ("deepseek_v3", "fp8-even"), ("olmoe", "ct-int4"), ("olmoe", "ct-fp8")]
pairs = pytest.mark.parametrize(("family", "kind"), PAIRS)

MOE_LAYERS = {"deepseek_v3": (1, 2), "qwen3_next": (0, 1)}

Low = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def low(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Low:
    """``low(family, kind)``: a tiny model in low precision; never written to."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, kind: str) -> Path:
        if (family, kind) not in made:
            folder = tmp_path_factory.mktemp("low") / f"{family}-{kind}"
            made[family, kind] = quantised(checkpoint(family), folder, kind)
        return made[family, kind]

    return get


def half(family: str) -> LayerPlan:
    """Four experts stay: in a router of two groups, two of each."""
    return prune(torch.tensor([1, 2, 4, 7]), EXPERTS)


def redirect() -> LayerPlan:
    return remap(torch.tensor([1, 2, 4, 7]), torch.tensor([0, 0, 1, 1, 2, 3, 3, 3]))


def plan_for(folder: Path, family: str, form: str) -> Plan:
    made = half(family) if form == "sliced" else redirect()
    return hand_made(folder, {(layer,): made for layer in LAYERS[family]}, form)


# What is read -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_every_parameter_is_the_number_that_a_plain_loop_finds(family, kind, low):
    source, plain = (open_source(folder) for folder in (low(family, kind), numbers_of(low(family, kind))))
    assert source.layout.sources.keys() == plain.layout.sources.keys()
    for name in plain.layout.sources:
        got, expected = (read_parameter(each.layout, each.model, name, torch.float32) for each in (source, plain))
        assert torch.equal(got, expected), name
    assert torch.equal(read_experts(source, source.layers[0]).gate_EID, read_experts(plain, plain.layers[0]).gate_EID)


@pytest.mark.parametrize("tile", [(16, 8), (5, 7), (0, 0), (1, 0), (1, 6)])
def test_tiles_at_the_edges_are_smaller(tile):
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(-8, 8, (21, 20), generator=generator).to(torch.int8)
    M, N = grid(value.shape, tile)
    scale, zero = torch.rand(M, N, generator=generator), torch.randint(-8, 8, (M, N), generator=generator)
    got = dequantise(value, scale, tile, zero)
    for o in range(21):
        for i in range(20):
            m, n = o // (tile[0] or 21), i // (tile[1] or 20)
            assert got[o, i] == (value[o, i].float() - zero[m, n]) * scale[m, n]


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_what_was_packed(bits):
    value = torch.randint(0, 2**bits, (3, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(packed(value, bits), bits).long(), value - 2 ** (bits - 1))


def test_blocks_are_those_of_transformers():
    weight = torch.randn(48, 24, generator=torch.Generator().manual_seed(0))
    parts, _ = fp8_block(weight)
    theirs = Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["weight_scale_inv"], torch.float32)
    assert torch.equal(dequantise(parts["weight"], parts["weight_scale_inv"], BLOCK), theirs)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("ct")])
def test_numbers_are_those_of_compressed_tensors(kind):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    function, config = KINDS[kind]
    parts, numbers = function(weight)
    scheme = quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    theirs = compressors.BaseCompressor.get_value_from_registry(config["format"]).decompress(dict(parts), scheme)
    # theirs is rounded to the dtype of the scale
    assert torch.equal(theirs["weight"].bfloat16(), numbers.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_streamed_logits_are_those_of_transformers_on_the_same_checkpoint(family, dtype, tmp_path):
    """On a CPU Transformers dequantises FP8 itself."""
    folder = quantised(save_tiny(family, tmp_path / "full", dtype=dtype), tmp_path / "low", "fp8-even")
    ids = token_data(3).ids_NS
    with torch.no_grad():
        expected = whole_model(folder)(ids).logits
        assert torch.equal(expected, whole_model(numbers_of(folder))(ids).logits)
    assert torch.equal(streamed_logits(folder, ids, 3), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_numbers(kind, low, tmp_path):
    for name, folder in (("low", low("olmoe", kind)), ("plain", numbers_of(low("olmoe", kind)))):
        conmoe.calibrate(folder, tmp_path / name, token_data(4), conmoe.Calibration(sample=32))
    for file in sorted((tmp_path / "plain").glob("*.safetensors")):
        assert_bits(load_file(tmp_path / "low" / file.name), load_file(file))


def test_a_wider_dtype_is_not_rounded_to_the_models(tmp_path):
    folder = quantised(save_tiny("olmoe", tmp_path / "full", dtype=torch.bfloat16), tmp_path / "low", "fp8-block")
    source = open_source(folder, dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = on_disk(folder)
    expected = dequantise(stored[name], stored[f"{name}_scale_inv"], BLOCK)
    assert torch.equal(read_parameter(source.layout, source.model, name, torch.float32), expected)
    assert not torch.equal(expected, expected.bfloat16().float())


# What is written ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pairs
def test_kept_experts_keep_every_byte_and_the_result_loads_like_the_source(family, kind, form, low, tmp_path):
    source, out = low(family, kind), tmp_path / "out"
    plan = plan_for(source, family, form)
    applied = conmoe.apply(source, plan, out, form=form)
    assert_bits(without_maps(on_disk(out)), expected_disk(source, plan, form))
    assert applied.source_bytes == sum(tensor.nbytes for tensor in on_disk(source).values())
    assert applied.bytes == sum(tensor.nbytes for tensor in on_disk(out).values())
    assert config_of(out)["quantization_config"] == config_of(source)["quantization_config"]
    read = []
    conmoe.verify(out, source, plan, form, advance=read.append)
    assert sum(read) == applied.bytes
    if kind.startswith("fp8"):
        ids = token_data(4, seed=9).ids_NS
        implementation = {"experts_implementation": "batched_mm"}
        assert torch.equal(streamed_logits(out, ids, 4, **implementation), logits(load(out)))


@pytest.mark.parametrize("form", FORMS)
@pairs
def test_keeping_everything_changes_nothing(family, kind, form, low, tmp_path):
    source = low(family, kind)
    everyone = torch.arange(EXPERTS)
    plan = hand_made(source, {(layer,): remap(everyone, everyone) for layer in LAYERS[family]}, form)
    conmoe.apply(source, plan, tmp_path / "all", form=form)
    assert_bits(without_maps(on_disk(tmp_path / "all")), on_disk(source))
    if form != "shared":
        assert config_of(tmp_path / "all") == config_of(source)


@pairs
def test_sliced_answers_as_the_numbers_with_dropped_logits_at_minus_infinity(family, kind, low, tmp_path):
    folder, out = low(family, kind), tmp_path / "out"
    plan = plan_for(folder, family, "sliced")
    conmoe.apply(folder, plan, out)
    source = load_stock(numbers_of(folder))
    dropped = {layer: (part.assignment_E < 0).nonzero().flatten().tolist() for layer, part in by_layer(plan).items()}
    with silenced(source, dropped):
        expected = logits(source)
    ids = token_data(4, seed=9).ids_NS
    torch.testing.assert_close(streamed_logits(out, ids, 4), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(source)).abs().max() > 0.01, "dropping experts changes nothing"


@pairs
def test_shared_is_expanded(family, kind, low, tmp_path):
    folder, ids = low(family, kind), token_data(4, seed=9).ids_NS
    plan = plan_for(folder, family, "shared")
    for form in ("shared", "expanded"):
        conmoe.apply(folder, plan, tmp_path / form, form=form)
    got = [
        streamed_logits(tmp_path / form, ids, 4, experts_implementation="batched_mm") for form in ("shared", "expanded")
    ]
    assert torch.equal(*got)
    assert not torch.equal(got[0], streamed_logits(folder, ids, 4, experts_implementation="batched_mm"))


def test_layers_that_predict_further_tokens_go_with_their_scales(low, tmp_path):
    folder = shutil.copytree(low("deepseek_v3", "fp8-block"), tmp_path / "source")
    edit_config(folder, num_nextn_predict_layers=1)
    tensors = on_disk(folder)
    further = {
        name.replace(".layers.2.", ".layers.3."): value.clone()
        for name, value in tensors.items()
        if ".layers.2." in name
    }
    save_file(tensors | further, folder / "model.safetensors", {"format": "pt"})
    plan = plan_for(folder, "deepseek_v3", "shared")
    assert set(conmoe.apply(folder, plan, tmp_path / "shared").dropped) == further.keys()
    conmoe.apply(folder, plan, tmp_path / "expanded", form="expanded")
    assert further.keys() <= on_disk(tmp_path / "expanded").keys()
    assert config_of(tmp_path / "shared")["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("method", ["cd-moe", "mone", "naee"])
def test_what_stands_in_for_experts_stands_beside_their_scales(method, low, tmp_path):
    """Static gates, constants, thresholds: the experts that stay keep their bytes."""
    folder = low("qwen3_moe", "fp8-block")
    conmoe.calibrate(folder, tmp_path / "stats", token_data(4), conmoe.Calibration(sample=32))
    options = {"skip": True} if method == "naee" else {}
    request = conmoe.Request(method, options=options, form="shared")
    plan = conmoe.plan(folder, tmp_path / "stats", request=request)
    conmoe.apply(folder, plan, tmp_path / "out")
    conmoe.verify(tmp_path / "out", folder, plan, "shared")
    assert conmoe.evaluate(tmp_path / "out", token_data(2, seed=3), against=folder).kl.value > 0


def test_a_pool_of_two_layers_moves_with_its_scales(tmp_path):
    folder = quantised(save_tiny("olmoe", tmp_path / "full"), tmp_path / "low", "ct-int4")
    rows = torch.tensor([1, 3, 6, 9, 12, 15])
    plan = hand_made(folder, {(0, 1): remap(rows, torch.arange(2 * EXPERTS) // 3 % 6)})
    conmoe.apply(folder, plan, tmp_path / "out")
    assert_bits(without_maps(on_disk(tmp_path / "out")), expected_disk(folder, plan, "shared"))
    conmoe.verify(tmp_path / "out", folder, plan, "shared")


def test_lists_of_modules_follow_their_experts(checkpoint, tmp_path):
    """Expert 4 of the first layer stays in full precision, and is expert 2 of the result; expert 0 goes."""
    path = "model.layers.{}.mlp.experts.{}.down_proj"
    named = ["lm_head", path.format(0, 4), path.format(1, 0), "model.layers.0.mlp.gate"]
    folder = quantised(checkpoint("olmoe"), tmp_path / "low", "fp8-block", modules_to_not_convert=named)
    plan = plan_for(folder, "olmoe", "sliced")
    conmoe.apply(folder, plan, tmp_path / "out")
    assert_bits(on_disk(tmp_path / "out"), expected_mixed(folder, plan))
    found = config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert found == ["lm_head", path.format(0, 2), "model.layers.0.mlp.gate"]
    conmoe.verify(tmp_path / "out", folder, plan, "sliced")
    conmoe.apply(folder, plan_for(folder, "olmoe", "shared"), tmp_path / "expanded", form="expanded")
    found = config_of(tmp_path / "expanded")["quantization_config"]["modules_to_not_convert"]
    assert found == ["lm_head", path.format(0, 4), "model.layers.0.mlp.gate"]


@pytest.mark.parametrize(
    ("family", "block"), [("deepseek_v3", "model.layers.3.mlp"), ("qwen3_next", "mtp.layers.0.mlp")]
)
@pytest.mark.parametrize(("policy", "count"), [("keep", 8), ("prune", 4), ("drop", 4)])
def test_lists_of_modules_follow_the_experts_of_heads(family, block, policy, count, tmp_path):
    """Two experts of a head are named as left in full precision: where they stay, their new names are."""
    kept = list(range(EXPERTS))[:: EXPERTS // count]
    full, head = with_head(family, tmp_path / "full")
    named = [f"{block}.experts.{expert}.up_proj" for expert in range(EXPERTS)]
    every = [name.removesuffix(".weight") for name in head]  # a head whose experts are cut is in full precision
    source = quantised(full, tmp_path / "low", "fp8-even", modules_to_not_convert=every)
    plan = hand_made(source, {(layer,): prune(torch.tensor(kept), EXPERTS) for layer in MOE_LAYERS[family]})
    made = conmoe.apply(source, plan, tmp_path / "out", form="sliced", mtp=policy)
    stored = {name.removesuffix(".weight") for name in on_disk(tmp_path / "out")}
    found = config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    listed = [name for name in found if name.startswith(f"{block}.experts.")]
    assert made.heads.policy == policy
    assert sorted(listed) == sorted(name for name in stored if name.startswith(f"{block}.experts."))
    assert len([name for name in listed if name in named]) == (0 if policy == "drop" else count)


def expected_mixed(folder: Path, plan: Plan) -> dict[str, torch.Tensor]:
    """Like ``expected_disk``, for experts that do not all have the same tensors."""
    stock = on_disk(folder)
    rows = {layer: part.mixing_KE.argmax(dim=1).tolist() for layer, part in by_layer(plan).items()}
    expected = {}
    for name, tensor in stock.items():
        pieces = name.split(".")
        if "experts" in pieces:
            layer, place = int(pieces[2]), pieces.index("experts") + 1
            for slot, row in enumerate(rows[layer]):
                if row == int(pieces[place]):
                    expected[".".join([*pieces[:place], str(slot), *pieces[place + 1 :]])] = tensor
        elif name.endswith("mlp.gate.weight"):
            expected[name] = tensor[rows[int(pieces[2])]]
        else:
            expected[name] = tensor
    return expected


def test_places_of_copies_are_all_named():
    config = {"groups": {"a": {"targets": ["x.layers.0.mlp.experts.1"]}}, "ignore": ["x.layers.0.mlp.experts.12.up"]}
    found = renumbered_modules(config, {(0, 1): [(0, 0), (1, 5)]})
    assert found == {
        "groups": {"a": {"targets": ["x.layers.0.mlp.experts.0", "x.layers.1.mlp.experts.5"]}},
        "ignore": [],
    }


def test_a_killed_run_resumes_to_the_same_bytes(low, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    seen = 0

    def advance(done: int, total: int) -> None:
        nonlocal seen
        seen += done
        if seen > total / 2:
            raise Stop

    monkeypatch.setattr(APPLY, "SHARD_BYTES", 8_000)
    folder = low("qwen3_moe", "fp8-block")
    plan = plan_for(folder, "qwen3_moe", "shared")
    conmoe.apply(folder, plan, tmp_path / "whole")
    with pytest.raises(Stop):
        conmoe.apply(folder, plan, tmp_path / "out", advance=advance)
    assert not (tmp_path / "out").exists()
    conmoe.apply(folder, plan, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    conmoe.verify(tmp_path / "out", folder, plan, "shared")


@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_verify_sees_one_flipped_bit(part, low, tmp_path):
    folder, out = low("qwen3_moe", "fp8-block"), tmp_path / "out"
    plan = plan_for(folder, "qwen3_moe", "sliced")
    conmoe.apply(folder, plan, out)
    tensors, name = on_disk(out), f"model.layers.1.mlp.experts.2.up_proj.{part}"
    tensors[name].view(torch.uint8).reshape(-1)[0] ^= 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(conmoe.ConmoeError, match=rf"experts.2.up_proj.{part} in .* differs from"):
        conmoe.verify(out, folder, plan, "sliced")


# What is refused ----------------------------------------------------------------------------------------------------


def one_sentence(caught: pytest.ExceptionInfo[conmoe.ConmoeError], *parts: str) -> None:
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert not [part for part in parts if part not in text], text


UNKNOWN = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "mxfp4": {"quant_method": "mxfp4"},
    "fp4 experts": {"quant_method": "fp8", "weight_block_size": [16, 8], "expert_dtype": "fp4"},
    "format nvfp4-pack-quantized": {**KINDS["ct-int4"][1], "format": "nvfp4-pack-quantized"},
    "sparse format": {**KINDS["ct-fp8"][1], "sparsity_config": {"format": "sparse-24-bitmask"}},
    "quantised cache": {**KINDS["ct-fp8"][1], "kv_cache_scheme": {"num_bits": 8}},
    "rotated weights": {**KINDS["ct-fp8"][1], "transform_config": {"config_groups": {"R1": {}}}},
    "cannot be read": {"quant_method": "fp8", "weight_block_size": [16]},
}


@pytest.mark.parametrize("named", UNKNOWN)
def test_other_formats_are_refused_by_name(named, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "quantization_config": UNKNOWN[named]}))
    with pytest.raises(conmoe.UsageError) as caught:
        conmoe.inspect(folder)
    one_sentence(caught, named, str(folder))


NAME = "model.layers.1.mlp.experts.3.down_proj"
DAMAGE = {
    "no scale": (lambda t: t.pop(f"{NAME}.weight_scale_inv"), [f"{NAME}.weight_scale_inv", "missing"]),
    "no weight": (lambda t: t.pop(f"{NAME}.weight"), [f"{NAME}.weight", "missing"]),
    "a scale of another shape": (
        lambda t: t.update({f"{NAME}.weight_scale_inv": torch.ones(2, 3)}),
        [f"{NAME}.weight_scale_inv", "[2, 3]", "[2, 2]"],
    ),
    "a scale of another dtype": (
        lambda t: t.update({f"{NAME}.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}),
        [f"{NAME}.weight_scale_inv", "I32"],
    ),
    "a weight in full precision": (
        lambda t: t.update({f"{NAME}.weight": torch.ones(32, 16)}),
        [f"{NAME}.weight", "no matrix as its configuration"],
    ),
    "a weight of another shape": (
        lambda t: t.update(
            {
                f"{NAME}.weight": torch.ones(32, 8).to(torch.float8_e4m3fn),
                f"{NAME}.weight_scale_inv": torch.ones(2, 1),
            }
        ),
        [f"{NAME}.weight", "[32, 8]", "[32, 16]"],
    ),
    "FP8 elsewhere": (
        lambda t: t.update({f"{NAME}.other": torch.ones(2).to(torch.float8_e4m3fn)}),
        [f"{NAME}.other", "FP8"],
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_part_that_does_not_fit_is_named(case, low, tmp_path):
    folder = shutil.copytree(low("qwen3_moe", "fp8-block"), tmp_path / "damaged")
    damage, parts = DAMAGE[case]
    tensors = on_disk(folder)
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(conmoe.ConmoeError) as caught:
        conmoe.inspect(folder)
    one_sentence(caught, *parts)


def test_packed_parts_that_disagree_are_named(low, tmp_path):
    folder = shutil.copytree(low("olmoe", "ct-int4"), tmp_path / "damaged")
    tensors, name = on_disk(folder), "model.layers.1.mlp.experts.3.down_proj.weight_shape"
    tensors[name] = torch.tensor([32, 15])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(conmoe.ConmoeError) as caught:
        streamed_logits(folder, token_data(1).ids_NS, 1)
    one_sentence(caught, name, "[32, 16]")


def test_a_number_that_is_none_is_named(low, tmp_path):
    folder = shutil.copytree(low("olmoe", "fp8-block"), tmp_path / "damaged")
    tensors, name = on_disk(folder), "model.layers.0.mlp.experts.3.down_proj.weight"
    tensors[f"{name}_scale_inv"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(conmoe.ConmoeError) as caught:
        streamed_logits(folder, token_data(1).ids_NS, 1)
    one_sentence(caught, name, str(folder / "model.safetensors"), "NaN")


REFUSED = {
    "merging": (conmoe.Request("mergemoe"), "'mergemoe' makes new ones"),
    "fusion": (conmoe.Request("conmoe", options={"fusion": "frequency"}), "'conmoe' makes new ones"),
    "refit": (conmoe.Request("reap", refine="refit"), "--refine refit makes new ones"),
    "reconstruct": (conmoe.Request("conmoe", refine="reconstruct"), "--refine reconstruct makes new ones"),
    "gains where weights hold them": (conmoe.Request("reap", refine="gains"), "--refine gains scales them"),
    "folded": (conmoe.Request("cd-moe", form="sliced"), "folds them into dense layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_new_experts_are_refused_before_any_work(case, low, tmp_path):
    request, sentence = REFUSED[case]
    folder = low("qwen3_moe", "fp8-block")
    with pytest.raises(conmoe.UsageError) as caught:
        conmoe.check(folder, tmp_path / "out", request)
    one_sentence(caught, sentence, "FP8, blocks of 16 x 8", "--method reap --refine none", "dequantise")
    assert not list(tmp_path.iterdir())


def test_what_can_be_asked_of_full_precision_still_can(checkpoint, tmp_path):
    for request, _ in REFUSED.values():
        conmoe.check(checkpoint("qwen3_moe"), tmp_path / "out", request)


@pytest.mark.parametrize("form", ["sliced", "expanded"])
def test_a_plan_that_scales_experts_is_refused_where_it_would_be_written(form, low, tmp_path):
    folder = low("olmoe", "fp8-block")
    gains = torch.tensor([1, 1.5] * 4, dtype=torch.float64)
    plan = hand_made(folder, {(0,): replace(redirect(), gain_E=gains), (1,): redirect()}, form)
    with pytest.raises(conmoe.UsageError) as caught:
        conmoe.apply(folder, plan, tmp_path / "out", form=form)
    one_sentence(caught, "layer 0", f"makes new ones in the {form} form")
    assert not list(tmp_path.iterdir())
    conmoe.apply(folder, plan, tmp_path / "shared", form="shared")
    conmoe.verify(tmp_path / "shared", folder, plan, "shared")


def test_experts_named_by_a_pattern_are_refused(checkpoint, tmp_path):
    pattern = r"re:.*experts\.3\.down_proj"
    folder = quantised(checkpoint("olmoe"), tmp_path / "low", "ct-fp8", ignore=[pattern])
    with pytest.raises(conmoe.UsageError) as caught:
        conmoe.check(folder, tmp_path / "out", conmoe.Request("reap"))
    one_sentence(caught, repr(pattern), "ignore")


def test_experts_in_full_precision_can_be_merged_whatever_the_rest_is(checkpoint, tmp_path):
    experts = [
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"
        for layer in (0, 1)
        for expert in range(EXPERTS)
        for name in ("gate", "up", "down")
    ]
    folder = quantised(checkpoint("olmoe"), tmp_path / "low", "fp8-block", modules_to_not_convert=experts)
    request = conmoe.Request("hc-smoe", refine="refit")
    conmoe.check(folder, tmp_path / "out", request)
    conmoe.calibrate(folder, tmp_path / "stats", token_data(), conmoe.Calibration(sample=64))
    plan = conmoe.plan(folder, tmp_path / "stats", request=request)
    conmoe.apply(folder, plan, tmp_path / "out")
    conmoe.verify(tmp_path / "out", folder, plan, plan.default_form)


@pytest.mark.parametrize("name", [name for name in methods() if not methods()[name].condenses])
def test_the_list_of_methods_that_merge_is_right(name, checkpoint, calibrated):
    options = {"threshold": 1e-3} if name == "dern" else {}  # no units of random weights are alike
    request = conmoe.Request(name, options=options, protect=("none",))
    plan = conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), request=request)
    keeps = all(expert is not None for scope in plan.scopes for expert in kept_experts(scope.plan))
    assert keeps == (name not in MERGING)


# Full precision again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp8-block", "ct-int4-asym"])
def test_dequantised_it_is_the_numbers_and_can_be_refined(kind, low, tmp_path):
    folder, out = low("deepseek_v3", kind), tmp_path / "out"
    before = tree(folder)
    done = conmoe.dequantise(folder, out)
    assert tree(folder) == before
    assert_bits(on_disk(out), on_disk(numbers_of(folder)))
    assert config_of(out) == config_of(numbers_of(folder))
    assert done.bytes == sum(tensor.nbytes for tensor in on_disk(out).values())
    assert {"tokenizer.json", "generation_config.json"} <= {file.name for file in out.iterdir()}
    conmoe.check(out, tmp_path / "small", conmoe.Request("mergemoe", refine="refit"))
    with pytest.raises(conmoe.UsageError) as caught:
        conmoe.dequantise(out, tmp_path / "again")
    one_sentence(caught, str(out), "full precision")


# The command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    return runner(capsys)


SMALL = ("--tokens", "256", "--seq-len", "64", "--eval-tokens", "128")


def test_compress_keeps_experts_unless_told_otherwise_and_says_so(run, low, tmp_path):
    folder, text = low("qwen3_moe", "fp8-block"), write_text(tmp_path)
    data = ("--data", text, "--eval-data", text, *SMALL)
    done = run("compress", folder, tmp_path / "out", "--keep", "0.5", "--json", *data)
    assert done.code == 0, done.err
    assert "stay as they are" in done.err
    assert done.json["refine"] == "none"
    assert done.json["fidelity"]["kl"]["value"] > 0
    assert load(tmp_path / "out")
    refused = run("compress", folder, tmp_path / "no", "--keep", "0.5", "--refine", "refit", *data)
    assert refused.code == 2
    assert "--refine refit makes new ones" in refused.err
    assert not (tmp_path / "no").exists()
    assert not list(tmp_path.glob("no.*"))
    generated = run("generate", tmp_path / "out", "The quick", "--max-new-tokens", "4")
    assert generated.code == 0, generated.err


def test_layers_planned_one_after_the_other_see_the_kept_ones(run, low, tmp_path):
    folder, text = low("deepseek_v3", "fp8-block"), write_text(tmp_path)
    arguments = ("--keep", "0.5", "--refine", "gains", "--form", "shared", "--sequential", "--data", text, *SMALL)
    done = run("compress", folder, tmp_path / "out", *arguments, "--eval-data", text, "--json")
    assert done.code == 0, done.err
    assert done.json["sequential"]
    assert "stay as they are" not in done.err


def test_inspect_counts_bytes_and_parameters(run, low):
    folder = low("deepseek_v3", "fp8-block")
    found, plain = (conmoe.inspect(each) for each in (folder, numbers_of(folder)))
    assert found.quantisation == "FP8, blocks of 16 x 8"
    assert plain.quantisation is None
    assert (found.parameters, found.active_parameters) == (plain.parameters, plain.active_parameters)
    tensors = on_disk(folder)
    assert found.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    experts = [tensor for name, tensor in tensors.items() if ".experts." in name]
    assert found.routed_expert_bytes == sum(tensor.nbytes for tensor in experts)
    assert "FP8, blocks of 16 x 8" in run("inspect", folder).out


def test_what_a_refusal_names_can_be_done(run, low, tmp_path):
    folder = low("qwen3_moe", "fp8-block")
    assert "conmoe dequantise" in run("compress", folder, tmp_path / "no", "--keep", "0.5", "--refine", "refit").err
    assert run("dequantise", folder, tmp_path / "full").code == 0
    assert run("inspect", tmp_path / "full", "--json").json["quantisation"] is None
    again = run("dequantise", folder, tmp_path / "full")
    assert again.code == 2
    assert "exists" in again.err


def test_only_full_precision_is_tuned(low, tmp_path):
    folder = low("qwen3_moe", "fp8-block")
    with pytest.raises(conmoe.UsageError) as caught:
        conmoe.tune(folder, tmp_path / "out", token_data(), conmoe.Tuning(), SILENT)
    one_sentence(caught, "only full precision can be trained")


def test_fit_counts_what_is_stored(low, tmp_path):
    folder = low("qwen3_moe", "fp8-block")
    whole = sum(tensor.nbytes for tensor in on_disk(folder).values())
    conmoe.calibrate(folder, tmp_path / "stats", token_data(4), conmoe.Calibration(sample=32))
    plan = conmoe.plan(folder, tmp_path / "stats", request=conmoe.Request("reap", fit="95%"))
    assert conmoe.apply(folder, plan, tmp_path / "out").bytes <= 0.95 * whole


def test_int4_experts_are_an_eighth_of_float32():
    parts, _ = int4_group(torch.randn(16, 64))
    assert parts["weight_packed"].nbytes * 8 == 16 * 64 * 4
