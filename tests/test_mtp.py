"""Heads that predict further tokens: what a result holds of them, tensor by tensor, in every family that has one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import conmoe
from conmoe.fit import fit
from conmoe.mtp import find_heads, note, settle
from conmoe.ops.plans import prune
from conmoe.source import open_source
from conmoe.types import Plan
from tests.commands import runner, write_text
from tests.families import EXPERTS, TINY, TOP_K, save_tiny
from tests.heads import LAYOUTS, with_head
from tests.results import hand_made

GROUPS = {"deepseek_v3": 2, "glm4_moe": 2}
D = 32

Made = Callable[[str], tuple[Path, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def get(family: str) -> tuple[Path, dict[str, Tensor]]:
        if family not in made:
            made[family] = with_head(family, tmp_path_factory.mktemp("heads") / family)
        return made[family]

    return get


def plan_of(folder: Path, kept: list[int]) -> Plan:
    """A plan that keeps these experts of every layer."""
    layers = [layer.index for layer in open_source(folder).layers]
    return hand_made(folder, {(layer,): prune(torch.tensor(kept), EXPERTS) for layer in layers})


def on_disk(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def parts(head: dict[str, Tensor], block: str, expert: int) -> list[np.ndarray]:
    """All weights of one expert of a head, one by one or fused."""
    single = [value for name, value in head.items() if name.startswith(f"{block}.experts.{expert}.")]
    fused = [
        head[f"{block}.experts.{name}"] for name in ("gate_up_proj", "down_proj") if f"{block}.experts.{name}" in head
    ]
    return [value.numpy() for value in single] or [value[expert].numpy() for value in fused]


def expected_experts(family: str, head: dict[str, Tensor], block: str, count: int) -> list[int]:
    """Those of lowest mean |w| / rms(w), equally many in each group, by a loop in NumPy."""
    flat = []
    for expert in range(EXPERTS):
        weights = np.concatenate([part.astype(np.float64).ravel() for part in parts(head, block, expert)])
        flat.append(np.abs(weights).mean() / np.sqrt((weights**2).mean()))
    groups = GROUPS.get(family, 1)
    size = EXPERTS // groups
    chosen = [
        sorted(range(start, start + size), key=lambda e: (flat[e], e))[: count // groups]
        for start in range(0, EXPERTS, size)
    ]
    return sorted(expert for group in chosen for expert in group)


def block_of(head: dict[str, Tensor]) -> str:
    return next(name for name in head if ".experts." in name).partition(".experts.")[0]


def expected_head(family: str, head: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    block = block_of(head)
    kept = expected_experts(family, head, block, count)
    found = {}
    for name, value in head.items():
        rest = name.removeprefix(f"{block}.experts.")
        expert, _, part = rest.partition(".")
        if rest == name:
            row = name.startswith(f"{block}.gate.")
            found[name] = value[kept] if row else value
        elif not expert.isdecimal():
            found[name] = value[kept]
        elif int(expert) in kept:
            found[f"{block}.experts.{kept.index(int(expert))}.{part}"] = value
    return found


@pytest.mark.parametrize("form", ["sliced", "shared"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_a_pruned_head_has_the_experts_of_heaviest_tails_renumbered_and_their_router_rows(
    family, form, headed, tmp_path
):
    folder, head = headed(family)
    plan = plan_of(folder, [0, 2, 4, 6])
    applied = conmoe.apply(folder, plan, tmp_path / "out", form=form)
    found, expected = on_disk(tmp_path / "out"), expected_head(family, head, 4)
    prefix = ("mtp.", f"model.layers.{TINY[family]().num_hidden_layers}.")
    assert {name for name in found if name.startswith(prefix)} == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert applied.heads.policy == "prune"
    assert applied.dropped == ()
    assert "not measured" in note(applied.heads)
    record = applied.heads.as_json()
    assert record is not None
    assert record["experts"] == {block_of(head): expected_experts(family, head, block_of(head), 4)}
    assert {*record["copied"], *record["rewritten"]} == expected.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[LAYOUTS[family][2]] == 1
    conmoe.verify(tmp_path / "out", folder, plan, form)
    dropped = conmoe.apply(folder, plan, tmp_path / "without", form=form, mtp="drop")
    assert set(dropped.dropped) == head.keys()
    ids = torch.arange(9).unsqueeze(0)
    logits = [AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("out", "without")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_dropped_head_leaves_nothing_and_no_field_that_announces_it(family, headed, tmp_path):
    folder, head = headed(family)
    plan = plan_of(folder, [0, 2, 4, 6])
    applied = conmoe.apply(folder, plan, tmp_path / "out", form="sliced", mtp="drop")
    assert not head.keys() & on_disk(tmp_path / "out").keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[LAYOUTS[family][2]] == 0
    assert not config.get("num_mtp_layers")
    assert not find_heads(open_source(tmp_path / "out")).entries
    assert set(applied.heads.dropped) == head.keys()
    assert note(applied.heads).startswith("Dropped the head")
    conmoe.verify(tmp_path / "out", folder, plan, "sliced", mtp="drop")


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("mtp", ["auto", "keep", "prune"])
def test_where_the_number_of_experts_stays_the_head_stays_bit_for_bit(family, mtp, headed, tmp_path):
    folder, head = headed(family)
    for form, kept in (("expanded", list(range(EXPERTS))), ("sliced", list(range(EXPERTS)))):
        applied = conmoe.apply(folder, plan_of(folder, kept), tmp_path / form, form=form, mtp=mtp)
        found = on_disk(tmp_path / form)
        assert all(torch.equal(found[name], value) for name, value in head.items())
        assert (applied.heads.policy, set(applied.heads.copied)) == ("keep", head.keys())
        assert json.loads((tmp_path / form / "config.json").read_text())[LAYOUTS[family][2]] == 1


def test_a_head_with_more_experts_than_the_configuration_states_cannot_be_kept(headed, tmp_path):
    folder, _ = headed("deepseek_v3")
    with pytest.raises(conmoe.UsageError, match=r"has 8 experts.*states 4 for every layer.*--mtp prune"):
        conmoe.apply(folder, plan_of(folder, [0, 2, 4, 6]), tmp_path / "out", form="sliced", mtp="keep")
    assert not list(tmp_path.iterdir())


def test_a_head_that_no_router_could_use_is_dropped_with_the_reason(headed):
    source = open_source(headed("deepseek_v3")[0])
    for count, reason in ((1, f"chooses {TOP_K} experts"), (3, "multiple of 2"), (2, "too few"), (16, "pools of 16")):
        settled = settle(source, count, "auto")
        assert settled.policy == "drop"
        assert reason in note(settled)
        with pytest.raises(conmoe.UsageError, match="--mtp prune: "):
            settle(source, count, "prune")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda head, block: head.pop(f"{block}.experts.3.up_proj.weight"), "are not 8 of one shape"),
        (lambda head, block: head.pop(f"{block}.gate.weight"), "router"),
        (
            lambda head, block: head.update({f"{block}.experts.0.up_proj.weight": torch.zeros(3, 3)}),
            "are not 8 of one shape",
        ),
        (
            lambda head, block: head.update(
                {name: value.to(torch.float8_e4m3fn) for name, value in head.items() if ".experts." in name}
            ),
            "not plain numbers",
        ),
    ],
)
def test_a_head_that_is_not_understood_is_dropped_with_the_reason(change, reason, headed, tmp_path):
    folder, head = headed("deepseek_v3")
    shutil.copytree(folder, tmp_path / "odd")
    changed = dict(head)
    change(changed, block_of(head))
    rest = {name: value for name, value in on_disk(folder).items() if name not in head}
    save_file({**rest, **changed}, tmp_path / "odd" / "model.safetensors", {"format": "pt"})
    applied = conmoe.apply(tmp_path / "odd", plan_of(tmp_path / "odd", [0, 2, 4, 6]), tmp_path / "out", form="sliced")
    assert set(applied.dropped) == changed.keys()
    assert reason in note(applied.heads)


def test_fused_experts_of_a_head_are_pruned_too(headed, tmp_path):
    """As Qwen3.5 stores them."""
    folder, head = headed("qwen3_5_moe_text")
    block = block_of(head)
    if f"{block}.experts.gate_up_proj" in head:
        return  # this release of Transformers writes them fused, and the other tests have them so
    fused = {name: value for name, value in head.items() if ".experts." not in name}
    stack = {
        part: torch.stack([head[f"{block}.experts.{e}.{part}.weight"] for e in range(EXPERTS)])
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    fused[f"{block}.experts.gate_up_proj"] = torch.cat((stack["gate_proj"], stack["up_proj"]), dim=1)
    fused[f"{block}.experts.down_proj"] = stack["down_proj"]
    shutil.copytree(folder, tmp_path / "fused")
    rest = {name: value for name, value in on_disk(folder).items() if name not in head}
    save_file({**rest, **fused}, tmp_path / "fused" / "model.safetensors", {"format": "pt"})
    plan = plan_of(tmp_path / "fused", [1, 2, 5])
    conmoe.apply(tmp_path / "fused", plan, tmp_path / "out", form="sliced")
    found, expected = on_disk(tmp_path / "out"), expected_head("qwen3_5_moe_text", fused, 3)
    assert {name for name in found if name.startswith("mtp.")} == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_head_without_experts_is_kept_whatever_becomes_of_the_layers(tmp_path):
    """ERNIE 4.5's, a dense layer."""
    folder = save_tiny("ernie4_5_moe", tmp_path / "model")
    head = {
        f"model.mtp_{name}": torch.randn(D, D)
        for name in ("block.0.mlp.up_proj.weight", "linear_proj.0.weight", "emb_norm.0.weight")
    }
    save_file({**on_disk(folder), **head}, folder / "model.safetensors", {"format": "pt"})
    for mtp in ("auto", "keep", "prune"):
        plan = plan_of(folder, [0, 1, 2])
        applied = conmoe.apply(folder, plan, tmp_path / mtp, form="sliced", mtp=mtp)
        found = on_disk(tmp_path / mtp)
        assert all(torch.equal(found[name], value) for name, value in head.items())
        assert (applied.heads.policy, applied.dropped) == ("keep", ())
        conmoe.verify(tmp_path / mtp, folder, plan, "sliced", mtp=mtp)


@pytest.mark.parametrize("form", ["sliced", "shared"])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_transformers_drafts_with_the_pruned_head_and_decodes_the_same_tokens(family, form, headed, tmp_path):
    folder, _ = headed(family)
    conmoe.apply(folder, plan_of(folder, [1, 3, 4, 7]), tmp_path / "out", form=form)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*"]  # the class knows the depth of published models
    ids = torch.arange(5).unsqueeze(0)
    tokens = [
        model.generate(ids, max_new_tokens=12, do_sample=False, use_mtp=use, eos_token_id=None) for use in (True, False)
    ]
    assert torch.equal(*tokens)


def test_verify_finds_a_damaged_head(headed, tmp_path):
    folder, head = headed("deepseek_v3")
    plan = plan_of(folder, [0, 2, 4, 6])
    conmoe.apply(folder, plan, tmp_path / "out", form="sliced")
    found = on_disk(tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    for name in (f"{block_of(head)}.gate.weight", f"{block_of(head)}.experts.1.up_proj.weight"):
        save_file({**found, name: found[name] + 1}, file, {"format": "pt"})
        with pytest.raises(conmoe.ConmoeError, match="head for further tokens"):
            conmoe.verify(tmp_path / "out", folder, plan, "sliced")
    save_file({key: value for key, value in found.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(conmoe.ConmoeError, match="holds no"):
        conmoe.verify(tmp_path / "out", folder, plan, "sliced")


def test_a_size_that_is_asked_for_counts_the_head(headed, tmp_path):
    folder, _ = headed("deepseek_v3")
    source = open_source(folder)
    whole = sum(entry.nbytes for entry in source.entries.values())
    for share, mtp in ((86, "auto"), (95, "auto"), (72, "drop")):
        found = fit(source, conmoe.Request(method="frequency", fit=f"{share}%"), mtp)
        assert found.bytes <= share * whole / 100
        half = found.kept // 2  # of each group
        plan = plan_of(folder, [*range(half), *range(4, 4 + half)])
        applied = conmoe.apply(folder, plan, tmp_path / "out", form="sliced", mtp=mtp, force=True)
        assert applied.bytes == found.bytes


@pytest.fixture
def run(capsys):
    return runner(capsys)


def test_compress_accounts_for_every_tensor_of_the_head(run, headed, tmp_path):
    folder, head = headed("glm4_moe")
    found = run(
        *("compress", folder, tmp_path / "out", "--method", "reap", "--keep", "4", "--refine", "none"),
        *("--tokens", "64", "--seq-len", "32", "--eval-tokens", "0", "--data", write_text(tmp_path), "--json"),
    )
    assert found.code == 0
    assert "Pruned the head for further tokens (MTP) to 4 experts" in found.err
    record = json.loads((tmp_path / "out" / "conmoe" / "results.json").read_text())["mtp"]
    assert record == found.json["mtp"]
    assert record["policy"] == "prune"
    (experts,) = record["experts"].values()
    block = block_of(head)
    gone = {
        name
        for name in head
        if name.startswith(f"{block}.experts.") and int(name.split(".experts.")[1].split(".")[0]) not in experts
    }
    rows = {f"{block}.gate.weight", f"{block}.gate.e_score_correction_bias"}
    assert {*record["copied"], *gone, *rows} | {n for n in head if f"{block}.experts." in n} == head.keys()
    assert on_disk(tmp_path / "out").keys() >= {*record["copied"], *record["rewritten"]}


def test_compress_refuses_to_keep_a_head_before_any_text_is_read(run, headed, checkpoint, tmp_path):
    folder, _ = headed("glm4_moe")
    arguments = (
        "compress",
        folder,
        tmp_path / "out",
        "--method",
        "reap",
        "--keep",
        "4",
        "--data",
        tmp_path / "none.txt",
    )
    found = run(*arguments, "--mtp", "keep")
    assert (found.code, "no engine could load it" in found.err) == (2, True)
    assert "none.txt" in run(*arguments, "--mtp", "prune").err
    assert "--mtp takes" in run(*arguments, "--mtp", "kept").err
    assert not list(tmp_path.iterdir())
    assert settle(open_source(checkpoint("glm4_moe")), 4, "keep").policy is None


def test_inspect_shows_the_head(run, headed, checkpoint, tmp_path):
    folder, head = headed("qwen3_next")
    plan = plan_of(folder, [0, 2, 4, 6])
    saving = next(each for each in conmoe.inspect(folder).savings if each.keep == 0.5)
    assert conmoe.apply(folder, plan, tmp_path / "sliced", form="sliced").bytes < saving.bytes  # router rows
    for form in ("sliced", "shared"):
        conmoe.apply(folder, plan, tmp_path / form, form=form, force=True)
        pruned = conmoe.inspect(tmp_path / form).mtp
        assert pruned is not None
        assert (pruned.experts, pruned.odd) == (4, "")
        assert saving.bytes - conmoe.inspect(tmp_path / form).total_bytes < 8192
    found = run("inspect", folder, "--json").json["mtp"]
    assert found == {"tensors": len(head), "bytes": sum(v.nbytes for v in head.values()), "experts": EXPERTS, "odd": ""}
    assert "head for further tokens" in run("inspect", folder).out
    assert run("inspect", checkpoint("qwen3_next"), "--json").json["mtp"] is None
