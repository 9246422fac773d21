"""Every form of every family on disk and loaded: what is kept is the source's, what is computed is right."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import conmoe
from conmoe.ops.plans import identity, prune
from conmoe.types import LayerPlan, Plan
from tests.conftest import Checkpoint, token_data
from tests.families import EXPERTS, TINY, save_tiny
from tests.results import (
    FORMS,
    assert_bits,
    blocks,
    by_layer,
    config_of,
    edit_config,
    expected_disk,
    hand_made,
    kept,
    load,
    load_stock,
    logits,
    on_disk,
    redirected,
    silenced,
    without_maps,
)

families = pytest.mark.parametrize("family", TINY)
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")

Planned = Callable[[str, str, str], Plan]
Written = Callable[[str, str, str], Path]


APPLY = importlib.import_module("conmoe.apply")  # the package shows the function of that name


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def planned(checkpoint: Checkpoint, calibrated: Checkpoint) -> Planned:
    """``planned(family, method, form)``: half of the experts stay."""
    made: dict[tuple[str, str, bool], Plan] = {}

    def get(family: str, method: str, form: str) -> Plan:
        key = family, method, form == "sliced"
        if key not in made:
            request = conmoe.Request(method=method, form=form)
            made[key] = conmoe.plan(checkpoint(family), calibrated(family), request=request)
        return made[key]

    return get


@pytest.fixture(scope="module")
def written(checkpoint: Checkpoint, planned: Planned, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """``written(family, method, form)``: the checkpoint of that plan; never written to."""
    made: dict[tuple[str, str, str], Path] = {}

    def get(family: str, method: str, form: str) -> Path:
        if (family, method, form) not in made:
            out = tmp_path_factory.mktemp("results") / f"{family}-{method}-{form}"
            plan = planned(family, method, form)
            made[family, method, form] = conmoe.apply(checkpoint(family), plan, out, form=form).folder
        return made[family, method, form]

    return get


@pytest.fixture
def copied(checkpoint: Checkpoint, tmp_path: Path) -> Callable[[str], Path]:
    """``copied(family)``: a checkpoint that a test may change."""
    return lambda family: shutil.copytree(checkpoint(family), tmp_path / f"own-{family}")


def halved(layers: list[int] | tuple[int, ...], folder: Path, form: str = "sliced") -> Plan:
    """Every layer keeps every other expert."""
    return hand_made(folder, {(layer,): prune(torch.arange(0, EXPERTS, 2), EXPERTS) for layer in layers}, form)


def moe_of(folder: Path) -> list[int]:
    return [layer.index for layer in conmoe.source.open_source(folder).layers]


# On disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "form"), [("reap", "sliced"), ("conmoe", "sliced"), ("conmoe", "shared"), ("conmoe", "expanded")]
)
@families
def test_what_is_kept_is_the_sources_bit_for_bit_under_its_names(family, method, form, checkpoint, planned, written):
    plan, result = planned(family, method, form), written(family, method, form)
    tensors = on_disk(result)
    assert_bits(without_maps(tensors), expected_disk(checkpoint(family), plan, form))
    maps = {name: value for name, value in tensors.items() if name not in without_maps(tensors)}
    assert len(maps) == (2 * len(plan.scopes) if form == "shared" else 0)
    for scope in plan.scopes if form == "shared" else ():
        found = {name.rpartition(".")[2]: value for name, value in maps.items() if f"layers.{scope.layers[0]}." in name}
        assert torch.equal(found["expert_map"], scope.plan.assignment_E)
        assert torch.equal(found["expert_gain"], torch.ones(EXPERTS))
    conmoe.verify(result, checkpoint(family), plan, form)


@pytest.mark.parametrize("form", FORMS)
@families
def test_keeping_everything_changes_nothing(family, form, checkpoint, calibrated, tmp_path):
    plan = conmoe.plan(checkpoint(family), calibrated(family), request=conmoe.Request(keep="100%"))
    conmoe.apply(checkpoint(family), plan, tmp_path / "all", form=form)
    assert_bits(without_maps(on_disk(tmp_path / "all")), on_disk(checkpoint(family)))
    if form == "shared":
        assert torch.equal(logits(load(tmp_path / "all")), logits(load_stock(checkpoint(family))))
    else:
        before, after = config_of(checkpoint(family)), config_of(tmp_path / "all")
        assert after == before


# The sliced form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reap", "frequency"])
@families
def test_sliced_answers_as_the_source_with_dropped_logits_at_minus_infinity(
    family, method, checkpoint, planned, written
):
    plan = planned(family, method, "sliced")
    dropped = {layer: (part.assignment_E < 0).nonzero().flatten().tolist() for layer, part in by_layer(plan).items()}
    assert all(len(experts) == EXPERTS // 2 for experts in dropped.values())
    source = load_stock(checkpoint(family))
    untouched = logits(source)
    with silenced(source, dropped):
        expected = logits(source)
    assert torch.equal(logits(source), untouched)
    got = logits(load_stock(written(family, method, "sliced")))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (expected - untouched).abs().max() > 0.01, "dropping experts changes nothing"


@families
def test_every_size_in_a_sliced_config_is_right(family, checkpoint, written):
    before, after = config_of(checkpoint(family)), config_of(written(family, "reap", "sliced"))
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed
    assert changed <= set(COUNTS)
    config = AutoConfig.from_pretrained(written(family, "reap", "sliced"))
    assert {getattr(config, name) for name in COUNTS if hasattr(config, name)} == {EXPERTS // 2}
    for _, _, router, experts in blocks(load_stock(written(family, "reap", "sliced"))):
        assert len(experts.down_proj) == experts.num_experts == EXPERTS // 2
        assert router.weight.shape[0] == EXPERTS // 2


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen3_moe", {"num_local_experts": None, "num_experts": EXPERTS}),  # as published
        ("qwen3_moe", {"num_experts": EXPERTS}),
        ("glm4_moe", {"n_routed_experts": None, "num_local_experts": EXPERTS, "n_group": 1}),
        ("ernie4_5_moe", {"moe_num_experts": None, "num_experts": EXPERTS}),
        ("mixtral", {"num_local_experts": None}),  # the default of its class
    ],
)
@pytest.mark.parametrize("form", ["sliced", "shared"])
def test_the_count_is_changed_under_whatever_name_states_it(family, fields, form, copied, tmp_path):
    folder = copied(family)
    edit_config(folder, **fields)
    plan = hand_made(folder, {(layer,): first_half() for layer in moe_of(folder)})
    conmoe.apply(folder, plan, tmp_path / "out", form=form)
    stated = {name: value for name, value in config_of(tmp_path / "out").items() if name in COUNTS}
    assert set(stated.values()) == {EXPERTS // 2}
    assert {name for name, value in fields.items() if value == EXPERTS} <= set(stated)
    for _, _, _, experts in blocks(load(tmp_path / "out")):
        assert len(experts.down_proj) == EXPERTS // 2


def first_half() -> LayerPlan:
    """The first half answers for the second."""
    return conmoe.ops.plans.remap(torch.arange(EXPERTS // 2), torch.arange(EXPERTS) % (EXPERTS // 2))


def every_other() -> LayerPlan:
    """Of two neighbours the first answers for both."""
    return conmoe.ops.plans.remap(torch.arange(0, EXPERTS, 2), torch.arange(EXPERTS) // 2)


# The shared and the expanded form -----------------------------------------------------------------------------------


@families
def test_shared_expanded_and_a_redirected_source_are_one(family, checkpoint, planned, written):
    plan = planned(family, "conmoe", "shared")
    answers = {
        layer: [kept(part)[prototype] for prototype in part.assignment_E] for layer, part in by_layer(plan).items()
    }
    source = load_stock(checkpoint(family))
    before = logits(source)
    with redirected(source, answers):
        expected = logits(source)
    assert (expected - before).abs().max() > 0.01, "redirecting changes nothing"
    shared, expanded = written(family, "conmoe", "shared"), written(family, "conmoe", "expanded")
    assert torch.equal(logits(load(shared)), expected)
    assert torch.equal(logits(load_stock(expanded)), expected)
    eager = logits(load(shared, experts_implementation="eager"))
    torch.testing.assert_close(eager, expected, rtol=1e-4, atol=1e-5)


@families
def test_configs_of_shared_and_expanded(family, checkpoint, written):
    stock = config_of(checkpoint(family))
    assert config_of(written(family, "conmoe", "expanded")) == stock
    shared = config_of(written(family, "conmoe", "shared"))
    assert shared["num_logical_experts"] == EXPERTS
    assert {shared[name] for name in COUNTS if name in stock} == {EXPERTS // 2}
    assert shared["model_type"] == f"conmoe_{stock['model_type']}"


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, experts_implementation="batched_mm")
    with torch.no_grad():
        torch.save(model.eval()(torch.load(sys.argv[1])).logits, folder + ".pt")
assert "conmoe" not in sys.modules
"""


def test_shared_runs_where_the_package_is_not(written, tmp_path):
    torch.save(token_data(4, seed=9).ids_NS, tmp_path / "ids")
    folders = [shutil.copytree(written(each, "conmoe", "shared"), tmp_path / each) for each in ("deepseek", "mixtral")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "ids"), *map(str, folders)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=240)
    for folder in folders:
        torch.testing.assert_close(torch.load(f"{folder}.pt"), logits(load(folder)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "layers", "scope"),
    [("olmoe", 3, 2), ("olmoe", 4, 4), ("glm4_moe", 5, 4), ("gpt_oss", 3, 2), ("granitemoe", 3, 2)],
)
def test_a_scope_stores_one_pool_and_shares_it(family, layers, scope, tmp_path):
    folder = save_tiny(family, tmp_path / "source", num_hidden_layers=layers)
    conmoe.calibrate(folder, tmp_path / "stats", token_data(4), conmoe.Calibration(sample=64))
    plan = conmoe.plan(folder, tmp_path / "stats", request=conmoe.Request(scope=scope))
    windows = [part.layers for part in plan.scopes]
    moe = [layer for window in windows for layer in window]
    assert moe == moe_of(folder)
    assert [len(window) for window in windows] == [scope] * (len(moe) // scope) + [len(moe) % scope][: len(moe) % scope]
    assert [part.plan.mixing_KE.shape[0] for part in plan.scopes] == [4 * len(window) for window in windows]

    for form in ("shared", "expanded"):
        conmoe.apply(folder, plan, tmp_path / form, form=form)
        conmoe.verify(tmp_path / form, folder, plan, form)
        assert_bits(without_maps(on_disk(tmp_path / form)), expected_disk(folder, plan, form))
    shared = load(tmp_path / "shared")
    assert torch.equal(logits(shared), logits(load_stock(tmp_path / "expanded")))
    modules = {layer: experts for layer, _, _, experts in blocks(shared)}
    for window in windows:
        for name, tensor in modules[window[0]].named_parameters():
            assert len(tensor) == 4 * len(window)
            assert {modules[layer].get_parameter(name).data_ptr() for layer in window} == {tensor.data_ptr()}
    assert len({modules[window[0]].down_proj.data_ptr() for window in windows}) == len(windows)


def test_keeping_all_of_a_scope_is_the_source(tmp_path):
    folder = save_tiny("olmoe", tmp_path / "source", num_hidden_layers=3)
    conmoe.calibrate(folder, tmp_path / "stats", token_data(4))
    plan = conmoe.plan(folder, tmp_path / "stats", request=conmoe.Request(scope=2, keep="8"))
    for form in ("shared", "expanded"):
        conmoe.apply(folder, plan, tmp_path / form, form=form)
        assert torch.equal(logits(load(tmp_path / form)), logits(load_stock(folder)))
    assert_bits(on_disk(tmp_path / "expanded"), on_disk(folder))


# Mixtures, new weights and gains ------------------------------------------------------------------------------------

GAINS = [1.0, 0.5, 1.25, 1.0, 3.0, 1.0, 0.7, 1.0]
ASSIGNMENT = [0, 0, 1, 1, 2, 2, 3, 3]
SPEAKERS = [0, 3, 4, 6]  # of each prototype the largest part, or the first


def merging(*, gains: bool = True, weights: dict[str, torch.Tensor] | None = None) -> LayerPlan:
    mixing = torch.zeros(4, EXPERTS, dtype=torch.float64)
    mixing[0, 0] = 1
    mixing[1, 2:4] = torch.tensor([0.25, 0.75])
    mixing[2, 4] = 1
    mixing[3, [1, 6, 7]] = torch.tensor([1.5, 0.25, 0.25], dtype=torch.float64)
    gain = torch.tensor(GAINS if gains else [1.0] * EXPERTS, dtype=torch.float64)
    return LayerPlan(torch.tensor(ASSIGNMENT), mixing, gain, weights or {})


def stored_of(plan: LayerPlan, form: str) -> tuple[list[int], list[float]]:
    """The prototype in each stored place, and what its down projection is multiplied by."""
    if form == "expanded":
        return ASSIGNMENT, plan.gain_E.tolist()
    return [0, 1, 2, 3], plan.gain_E[SPEAKERS].tolist() if form == "sliced" else [1.0] * 4


def mixed(tensor: torch.Tensor, plan: LayerPlan, form: str, *, down: bool) -> torch.Tensor:
    """The weighted sums in float64, scaled if they are down projections, and rounded once."""
    prototypes, scales = stored_of(plan, form)
    recipes = plan.mixing_KE[prototypes]
    if down:
        recipes = recipes * torch.tensor(scales, dtype=torch.float32).double()[:, None]
    return torch.einsum("ke,e...->k...", recipes, tensor.double()).to(tensor.dtype)


@pytest.mark.parametrize("form", FORMS)
@families
def test_mixtures_are_summed_and_rounded_once(family, form, tmp_path):
    groups = {"n_group": 1} if "n_group" in TINY[family]().to_dict() else {}
    folder = save_tiny(family, tmp_path / "source", dtype=torch.bfloat16, **groups)
    plan = merging()
    whole = hand_made(folder, {(layer,): plan for layer in moe_of(folder)})
    conmoe.apply(folder, whole, tmp_path / "out", form=form)
    conmoe.verify(tmp_path / "out", folder, whole, form)
    before = {layer: experts for layer, _, _, experts in blocks(load_stock(folder))}
    result = load(tmp_path / "out")
    for layer, _, router, experts in blocks(result):
        for name, value in experts.named_parameters():
            expected = mixed(before[layer].get_parameter(name), plan, form, down=name.startswith("down"))
            assert value.dtype == expected.dtype == torch.bfloat16
            # Sums in float32 and in float64 may fall on two sides of the middle between two neighbours.
            assert (value != expected).float().mean() < 1e-3, (layer, name)
            torch.testing.assert_close(value, expected, msg=f"{name} of layer {layer}")
        if form == "shared":
            assert router.expert_gain.tolist() == torch.tensor(GAINS).tolist()
    assert torch.isfinite(logits(result)).all()


@pytest.mark.parametrize("form", ["shared", "expanded"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "granitemoe"])
def test_gains_act_in_the_router_as_in_the_weights(family, form, checkpoint, tmp_path):
    """Against the source itself, its gates multiplied and its experts replaced by their mixtures."""
    folder, plan = checkpoint(family), merging()
    whole = hand_made(folder, {(layer,): plan for layer in moe_of(folder)})
    conmoe.apply(folder, whole, tmp_path / "out", form=form)
    source = load_stock(folder)
    hooks = []
    for _, _, _, experts in blocks(source):
        for name, value in experts.named_parameters():
            value.data = mixed(value.data, merging(gains=False), "expanded", down=name.startswith("down"))
        gain = torch.tensor(GAINS)
        hooks.append(
            experts.register_forward_pre_hook(lambda module, args, gain=gain: (*args[:2], args[2] * gain[args[1]]))
        )
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(source), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_new_weights_stand_where_they_belong(family, form, checkpoint, tmp_path):
    D, width = 32, 16
    new = {
        "down_EDI": torch.randn(4, D, width, generator=torch.Generator().manual_seed(1)),
        "up_EID": torch.randn(4, width, D, generator=torch.Generator().manual_seed(2)),
    }
    plan = merging(gains=False, weights=new)
    whole = hand_made(checkpoint(family), {(layer,): plan for layer in moe_of(checkpoint(family))})
    conmoe.apply(checkpoint(family), whole, tmp_path / "out", form=form)
    prototypes, _ = stored_of(plan, form)
    before = {layer: experts for layer, _, _, experts in blocks(load_stock(checkpoint(family)))}
    for layer, _, _, experts in blocks(load(tmp_path / "out")):
        gate_up = mixed(before[layer].gate_up_proj, plan, form, down=False)
        if family == "gpt_oss":  # transposed, gate and up interleaved
            expected = {"down_proj": new["down_EDI"][prototypes].mT, "gate_up_proj": gate_up}
            gate_up[:, :, 1::2] = new["up_EID"][prototypes].mT
            for name in ("gate_up_proj_bias", "down_proj_bias"):
                expected[name] = mixed(before[layer].get_parameter(name), plan, form, down=False)
        else:
            expected = {"down_proj": new["down_EDI"][prototypes], "gate_up_proj": gate_up}
            gate_up[:, width:] = new["up_EID"][prototypes]
        for name, value in experts.named_parameters():
            torch.testing.assert_close(value.data, expected[name])


# Layers that the plan leaves alone ----------------------------------------------------------------------------------


def test_an_unplanned_layer_stays_as_it_is(checkpoint, tmp_path):
    folder = checkpoint("mixtral")
    plan = hand_made(folder, {(1,): first_half()})
    for form in ("shared", "expanded"):
        conmoe.apply(folder, plan, tmp_path / form, form=form)
        conmoe.verify(tmp_path / form, folder, plan, form)
        assert_bits(without_maps(on_disk(tmp_path / form)), expected_disk(folder, plan, form))
    assert torch.equal(logits(load(tmp_path / "shared")), logits(load_stock(tmp_path / "expanded")))
    with pytest.raises(conmoe.UsageError, match="one number of experts for all layers"):
        conmoe.apply(folder, plan, tmp_path / "sliced", form="sliced")


# Refusals -----------------------------------------------------------------------------------------------------------


def refused(folder: Path, plan: Plan, out: Path, form: str, sentence: str) -> None:
    with pytest.raises(conmoe.UsageError, match=sentence) as caught:
        conmoe.apply(folder, plan, out, form=form)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


def test_a_form_that_cannot_hold_a_plan_is_refused_before_anything_is_written(checkpoint, tmp_path):
    folder, out = checkpoint("olmoe"), tmp_path / "out"
    refused(folder, halved([0, 1], folder), out, "expanded", "drops experts, which the expanded form cannot")
    scoped = hand_made(folder, {(0, 1): identity(2 * EXPERTS)})
    refused(folder, scoped, out, "sliced", "no sliced form")
    one = conmoe.ops.plans.remap(torch.tensor([3]), torch.zeros(EXPERTS, dtype=torch.int64))
    narrow = hand_made(folder, {(0,): one, (1,): one})
    refused(folder, narrow, out, "sliced", "1 experts would be left, but every token goes to 2")
    uneven = hand_made(folder, {(0,): first_half(), (1,): one})
    refused(folder, uneven, out, "sliced", "one number of experts for all layers")
    for plan in (narrow, uneven):
        conmoe.apply(folder, plan, out, form="shared", force=True)
        conmoe.apply(folder, plan, tmp_path / "expanded", form="expanded", force=True)
        assert torch.equal(logits(load(out)), logits(load_stock(tmp_path / "expanded")))


def test_a_plan_of_another_checkpoint_is_refused(checkpoint, copied, tmp_path):
    plan = halved([0, 1], checkpoint("olmoe"))
    refused(checkpoint("qwen2_moe"), plan, tmp_path / "out", "sliced", "made for another checkpoint")
    changed = copied("olmoe")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    refused(changed, plan, tmp_path / "out", "sliced", "made for another checkpoint")


def test_a_plan_with_other_layers_or_experts_is_refused(checkpoint, tmp_path):
    folder = checkpoint("glm4_moe")  # its layer 0 is dense
    refused(folder, halved([0, 1], folder), tmp_path / "out", "sliced", "names layer 0, which has no experts")
    wrong = hand_made(folder, {(1,): identity(EXPERTS + 1)})
    refused(folder, wrong, tmp_path / "out", "shared", "another number of experts")


@pytest.mark.parametrize(
    ("kept_experts", "sentence"),
    [
        ([0, 1, 2, 4], "2 groups, which must keep equally many"),
        ([0, 4], "each of the router's 2 groups has 1, too few"),
    ],
)
def test_router_groups_stay_even(kept_experts, sentence, checkpoint, tmp_path):
    folder = checkpoint("deepseek_v3")
    plan = hand_made(folder, {(layer,): prune(torch.tensor(kept_experts), EXPERTS) for layer in moe_of(folder)})
    refused(folder, plan, tmp_path / "out", "sliced", sentence)


def test_what_is_consolidated_is_not_consolidated_again(written, tmp_path):
    folder = written("olmoe", "conmoe", "shared")
    refused(folder, hand_made(folder, {(0,): first_half()}), tmp_path / "out", "shared", "consolidated already")


def test_a_family_without_shared_classes_is_refused_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    def none(model_type: str) -> None:
        raise conmoe.ConmoeError("no such classes")

    folder = checkpoint("olmoe")
    monkeypatch.setattr(conmoe.runtime, "class_names", none)
    with pytest.raises(conmoe.ConmoeError, match="no such classes"):
        conmoe.apply(folder, hand_made(folder, {(0,): first_half()}), tmp_path / "out", form="shared")
    assert not list(tmp_path.iterdir())


# Everything beside the experts --------------------------------------------------------------------------------------

CARD = """---
license: other
license_name: a-licence
license_link: LICENSE
language:
- en
---
# A model
"""


def test_what_belongs_to_a_model_comes_with_it(copied, tmp_path):
    folder = copied("qwen3_moe")
    files = {
        "chat_template.jinja": "{{ messages[0]['content'] }}",
        "LICENSE": "as you like",
        "NOTICE": "of whom",
        "generation_config.json": '{"temperature": 0.6, "do_sample": true}',
        "tokenization_own.py": "# a tokenizer",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "README.md": CARD,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    for form in ("sliced", "shared"):
        plan = hand_made(folder, {(layer,): first_half() for layer in (0, 1)})
        out = conmoe.apply(folder, plan, tmp_path / form, form=form).folder
        for name in {*files, "tokenizer.json", "tokenizer_config.json"} - {"README.md"}:
            assert (out / name).read_bytes() == (folder / name).read_bytes(), name
        assert not list(out.glob("*.bin"))
        assert (
            AutoTokenizer.from_pretrained(out)("hello").input_ids
            == AutoTokenizer.from_pretrained(folder)("hello").input_ids
        )
        card = (out / "README.md").read_text()
        for line in ("# own-qwen3\\_moe, ", "license: other", "license_name: a-licence", "language:\n- en"):
            assert line in card
        assert ("**Approximation:**" in card) == (form == "sliced")
        assert json.loads((out / "conmoe" / "plan.json").read_text())["method"] == "conmoe"
        again = conmoe.read_plan(out / "conmoe")
        assert torch.equal(again.scopes[0].plan.assignment_E, first_half().assignment_E)
        assert not [file for file in out.rglob("*") if file.suffix in (".tmp", ".partial")]


def with_tensors(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_tokens_are_left_out_and_the_config_says_so(family, copied, tmp_path):
    """They follow the last layer; the class of the family knows them by the number they have in the largest model."""
    names = ("eh_proj.weight", "mlp.experts.0.down_proj.weight", "mlp.gate.weight", "shared_head.head.weight")
    extra = {f"model.layers.3.{name}": torch.randn(4, 4) for name in names}
    folder = with_tensors(copied(family), **extra)
    edit_config(folder, num_nextn_predict_layers=1)
    plan = hand_made(folder, {(layer,): every_other() for layer in moe_of(folder)})
    for form in ("sliced", "shared"):
        applied = conmoe.apply(folder, plan, tmp_path / form, form=form)
        assert set(applied.dropped) == set(extra)
        assert config_of(tmp_path / form)["num_nextn_predict_layers"] == 0
        assert_bits(without_maps(on_disk(tmp_path / form)), expected_disk_without(folder, plan, form, extra))
        load(tmp_path / form)
    applied = conmoe.apply(folder, plan, tmp_path / "expanded", form="expanded")
    assert applied.dropped == ()
    assert config_of(tmp_path / "expanded")["num_nextn_predict_layers"] == 1
    assert extra.keys() <= on_disk(tmp_path / "expanded").keys()


def expected_disk_without(folder: Path, plan: Plan, form: str, names: dict[str, torch.Tensor]) -> dict:
    return {name: value for name, value in expected_disk(folder, plan, form).items() if name not in names}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("olmoe", "model.layers.0.mlp.experts.8.down_proj.weight"),
        ("olmoe", "model.layers.2.mlp.gate.weight"),
        ("deepseek_v3", "model.layers.4.eh_proj.weight"),  # beyond the one layer that the config tells of
        ("qwen2_moe", "model.layers.0.mlp.mystery"),
    ],
)
def test_a_tensor_without_a_place_is_an_error(family, name, copied, tmp_path):
    folder = copied(family)
    plan = hand_made(folder, {(layer,): first_half() for layer in moe_of(folder)})
    with_tensors(folder, **{name: torch.randn(4, 4)})
    with pytest.raises(conmoe.ConmoeError, match=name.replace(".", r"\.")):
        conmoe.apply(folder, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Shards and interruptions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_shards_in_and_shards_out(family, form, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(APPLY, "SHARD_BYTES", 30_000)
    sharded = tmp_path / "sharded"
    load_stock(checkpoint(family)).save_pretrained(sharded, max_shard_size="25KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    plan = hand_made(sharded, {(layer,): first_half() for layer in (0, 1)})
    out = conmoe.apply(sharded, plan, tmp_path / "out", form=form).folder
    conmoe.verify(out, sharded, plan, form)
    tensors, files = on_disk(out), sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as stream:
            assert name in stream.keys()  # noqa: SIM118
    assert_bits(without_maps(tensors), expected_disk(sharded, plan, form))
    load(out)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def stopping(after: int) -> Callable[[int, int], None]:
    seen = 0

    def advance(done: int, total: int) -> None:
        nonlocal seen
        seen += done
        if seen > after * total / 100:
            raise Stop

    return advance


@pytest.mark.parametrize("percent", [0, 40, 99])
def test_a_killed_run_resumes_to_the_same_bytes(percent, checkpoint, planned, tmp_path, monkeypatch):
    monkeypatch.setattr(APPLY, "SHARD_BYTES", 20_000)
    folder, plan = checkpoint("mixtral"), planned("mixtral", "conmoe", "shared")
    before = bytes_in(folder)
    conmoe.apply(folder, plan, tmp_path / "whole")
    with pytest.raises(Stop):
        conmoe.apply(folder, plan, tmp_path / "out", advance=stopping(percent))
    assert not (tmp_path / "out").exists()
    seen = []
    conmoe.apply(folder, plan, tmp_path / "out", advance=lambda done, total: seen.append((done, total)))
    assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "whole")
    assert sum(done for done, _ in seen) == seen[0][1]
    assert bytes_in(folder) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "whole"]


def test_another_plan_does_not_resume_what_one_plan_began(checkpoint, tmp_path, monkeypatch):
    """Also where the two differ in nothing but the shares of a mixture, a gain, or new weights."""
    monkeypatch.setattr(APPLY, "SHARD_BYTES", 20_000)
    folder = checkpoint("olmoe")
    base = merging(gains=False)
    other_shares = merging(gains=False).mixing_KE.clone()
    other_shares[1, 2:4] = torch.tensor([0.5, 0.5])
    variants = {
        "gains": merging(),
        "shares": LayerPlan(base.assignment_E, other_shares, base.gain_E),
        "weights": merging(gains=False, weights={"down_EDI": torch.ones(4, 32, 16)}),
    }
    for name, layer_plan in variants.items():
        plan = hand_made(folder, {(0,): layer_plan, (1,): layer_plan})
        with pytest.raises(Stop):
            conmoe.apply(folder, hand_made(folder, {(0,): base, (1,): base}), tmp_path / "out", advance=stopping(90))
        conmoe.apply(folder, plan, tmp_path / "out")
        conmoe.apply(folder, plan, tmp_path / "fresh")
        assert bytes_in(tmp_path / "out") == bytes_in(tmp_path / "fresh"), name
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "fresh")


def test_an_existing_result_is_replaced_by_force_only(checkpoint, tmp_path):
    folder, out = checkpoint("olmoe"), tmp_path / "out"
    plan = halved([0, 1], folder)
    conmoe.apply(folder, plan, out)
    (out / "precious").write_text("mine")
    with pytest.raises(conmoe.UsageError, match="exists; choose another name"):
        conmoe.apply(folder, plan, out)
    with pytest.raises(Stop):
        conmoe.apply(folder, plan, out, force=True, advance=stopping(10))
    assert (out / "precious").exists()
    conmoe.apply(folder, plan, out, force=True)
    assert not (out / "precious").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(conmoe.UsageError, match="writes a folder there"):
        conmoe.apply(folder, plan, tmp_path / "file", force=True)


# Verification -------------------------------------------------------------------------------------------------------


def flip(file: Path, name: str) -> None:
    """Flip the lowest bit of the last byte but three of a tensor: a small change of a float32."""
    tensors = load_file(file)
    raw = tensors[name].view(torch.uint8).reshape(-1)
    raw[-4] ^= 1
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("family", "form", "name"),
    [
        ("mixtral", "shared", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("mixtral", "sliced", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        ("gpt_oss", "expanded", "model.layers.1.mlp.experts.down_proj_bias"),
        ("gpt_oss", "shared", "model.layers.0.mlp.experts.gate_up_proj"),
        ("olmoe", "shared", "model.layers.0.self_attn.q_proj.weight"),
        ("olmoe", "sliced", "model.layers.1.mlp.gate.weight"),
        ("deepseek_v3", "sliced", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("olmoe", "shared", "model.layers.1.mlp.gate.expert_map"),
        ("olmoe", "shared", "model.layers.1.mlp.gate.expert_gain"),
    ],
)
def test_verify_sees_one_flipped_bit(family, form, name, checkpoint, planned, written, tmp_path):
    damaged = shutil.copytree(written(family, "conmoe", form), tmp_path / "damaged")
    conmoe.verify(damaged, checkpoint(family), planned(family, "conmoe", form), form)
    flip(damaged / "model.safetensors", name)
    with pytest.raises(conmoe.ConmoeError, match=rf"{name.replace('.', '[.]')} in .* differs from"):
        conmoe.verify(damaged, checkpoint(family), planned(family, "conmoe", form), form)


def test_verify_sees_values_that_are_not_finite(checkpoint, tmp_path):
    folder, plan = checkpoint("olmoe"), merging()
    whole = hand_made(folder, {(0,): plan, (1,): plan})
    conmoe.apply(folder, whole, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.1.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(conmoe.ConmoeError, match="differs from what the plan makes"):
        conmoe.verify(tmp_path / "out", folder, whole, "shared")
