"""What inspect says of a checkpoint, against the model in memory and against what compressing really leaves."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import conmoe
from conmoe.allocate import experts_kept, parse_keep
from tests.commands import runner
from tests.families import EXPERTS, TINY, TOP_K, save_tiny, tiny_model

SHARED = {"qwen2_moe": 1, "qwen3_next": 1, "qwen3_5_moe_text": 1, "deepseek_v2": 1, "deepseek_v3": 1}
SHARED |= {"glm4_moe": 1, "ernie4_5_moe": 2, "deepseek": 2}


@pytest.fixture
def run(capsys):
    return runner(capsys)


@pytest.mark.parametrize("family", TINY)
def test_inspect_counts_what_the_model_in_memory_has(family, run, checkpoint):
    found = run("inspect", checkpoint(family), "--json")
    assert found.code == 0
    assert found.err == ""
    model = tiny_model(family)
    state = model.state_dict()
    routed = [value for name, value in state.items() if ".experts." in name and "shared" not in name]
    counts = {name.rpartition(".experts.")[0] for name in state if ".experts." in name}
    expected = {
        "family": model.config.model_type,
        "layers": model.config.num_hidden_layers,
        "moe_layers": len(counts),
        "experts": EXPERTS,
        "stored_experts": EXPERTS,
        "experts_per_token": TOP_K,
        "shared_experts": SHARED.get(family, 0),
        "parameters": sum(value.numel() for value in state.values()),
        "routed_expert_bytes": sum(value.nbytes for value in routed),
        "total_bytes": sum(value.nbytes for value in state.values()),
    }
    assert {name: found.json[name] for name in expected} == expected
    half = next(saving for saving in found.json["savings"] if saving["keep"] == 0.5)
    assert half["experts"] == EXPERTS // 2
    assert half["saved_bytes"] == expected["routed_expert_bytes"] // 2


def test_inspect_reads_headers_only(run, checkpoint, tmp_path):
    shutil.copytree(checkpoint("olmoe"), tmp_path / "hollow")
    file = tmp_path / "hollow" / "model.safetensors"
    size, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as stream:
        stream.truncate(8 + header)
        stream.truncate(size)  # a hole instead of the data
    facts = [run("inspect", folder, "--json").json for folder in (checkpoint("olmoe"), tmp_path / "hollow")]
    for each in facts:
        del each["estimated_seconds"]  # measured
    assert facts[0] == facts[1]


def test_inspect_shows_a_table_of_a_result_too(run, checkpoint, calibrated, tmp_path):
    model = checkpoint("deepseek_v3")
    assert "DeepseekV3" in run("inspect", model).out
    made = conmoe.plan(model, calibrated("deepseek_v3"), None, conmoe.Request(keep="3"))
    conmoe.apply(model, made, tmp_path / "out")
    found = run("inspect", tmp_path / "out", "--json").json
    assert (found["experts"], found["stored_experts"]) == (EXPERTS, 3)
    assert run("inspect", tmp_path / "out").code == 0


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_what_a_keep_would_leave_is_what_it_leaves(family, checkpoint, calibrated, tmp_path):
    model = checkpoint(family)
    for saving in conmoe.inspect(model).savings:
        plan = conmoe.plan(model, calibrated(family), None, conmoe.Request(keep=str(saving.keep)))
        done = conmoe.apply(model, plan, tmp_path / str(saving.keep))
        maps = 12 * EXPERTS * len(plan.scopes)  # an index and a gain for each logical expert
        assert done.bytes == saving.bytes + maps
        assert saving.bytes + saving.saved_bytes == done.source_bytes


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_the_legal_counts_are_those_that_can_be_written_sliced(family, checkpoint, calibrated, tmp_path):
    legal = []
    for count in range(1, EXPERTS + 1):
        try:
            plan = conmoe.plan(checkpoint(family), calibrated(family), None, conmoe.Request("frequency", str(count)))
            conmoe.apply(checkpoint(family), plan, tmp_path / str(count))
        except conmoe.UsageError:
            continue
        legal.append(count)
    assert conmoe.inspect(checkpoint(family)).legal_sliced_counts == tuple(legal)
    assert (checkpoint(family) / "config.json").is_file()


def test_active_parameters_leave_out_the_experts_that_are_not_chosen(checkpoint):
    found = conmoe.inspect(checkpoint("olmoe"))
    idle = found.routed_expert_bytes // 4 * (EXPERTS - TOP_K) // EXPERTS
    assert found.active_parameters == found.parameters - idle
    assert found.routed_share == found.routed_expert_bytes / found.total_bytes
    assert found.estimated_peak_bytes > 2 * found.total_bytes / found.layers / 2
    assert found.estimated_seconds > 0


def test_router_groups_are_told(checkpoint, tmp_path):
    assert conmoe.inspect(checkpoint("deepseek_v3")).router_groups == 2
    assert conmoe.inspect(checkpoint("olmoe")).router_groups == 1
    wide = conmoe.inspect(save_tiny("olmoe", tmp_path / "wide", num_experts=32))
    assert wide.legal_sliced_counts == tuple(range(TOP_K, 33))


def test_tied_embeddings_are_counted_once(tmp_path):
    found = conmoe.inspect(save_tiny("olmoe", tmp_path / "tied", tie_word_embeddings=True))
    model = tiny_model("olmoe", tie_word_embeddings=True)
    assert found.parameters == sum(value.numel() for value in model.parameters())


def test_json_has_what_the_object_has(run, checkpoint):
    shown, found = run("inspect", checkpoint("olmoe"), "--json").json, conmoe.inspect(checkpoint("olmoe"))
    expected = json.loads(json.dumps(found.as_json()))
    for each in (shown, expected):
        del each["estimated_seconds"]  # measured
    assert shown == expected


@pytest.mark.parametrize("typed", ["1.0", "100%", "8", "3", "1", "0.5"])
def test_a_keep_that_is_shown_asks_for_what_it_says(typed, run, checkpoint):
    shown = dict(
        re.findall(r"--keep (\S+)\s+\S\s+(\d+) experts", run("inspect", checkpoint("olmoe"), "--keep", typed).out)
    )
    assert str(experts_kept(parse_keep(typed), EXPERTS)) in shown.values()
    for keep, experts in shown.items():
        assert experts_kept(parse_keep(keep), EXPERTS) == int(experts)
