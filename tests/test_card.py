"""Cards and manifests: what a card says is what was measured, nothing foreign breaks it, and no flipped byte passes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils._fixes import yaml_dump
from transformers import AutoConfig

import conmoe
from conmoe.manifest import EDITABLE, RESULT_MANIFEST, check_files, list_files, read_result_manifest, sha256
from conmoe.report.escape import block, code, escaped
from conmoe.report.measured import METRICS
from conmoe.report.sections import BEGIN, END, measured_card, refresh_card
from conmoe.runtime import modeling_conmoe
from tests.commands import tree
from tests.conftest import measured_half

HOSTILE = (
    "a | b",
    "<script>alert(1)</script>",
    "x\n---\nlicense: mit\n---\n# owned",
    "`code` ``more`` | [link](javascript:alert(1))",
    "![i](http://x/y.png)",
    "'\": {a: &b *c !!python/object:os.system ls}",
    "\u202egpj.exe\u0000\u2028",
    "-->" + END,
    "# " * 400,
)


@pytest.fixture(scope="module")
def made(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return measured_half(checkpoint("qwen3_moe"), folder)


@pytest.fixture
def result(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "half"))


def results(folder: Path) -> dict:
    return json.loads((folder / "conmoe" / "results.json").read_text())


def test_the_numbers_of_the_card_are_those_of_the_results(made):
    fidelity = results(made)["fidelity"]
    card = ModelCard.load(made / "README.md")
    assert card.data.model_name == "qwen3_moe-conmoe"
    found = {each.metric_type: each for each in card.data.eval_results}
    assert len(found) == len(METRICS)
    for key, _, metric, _ in METRICS:
        assert found[metric].metric_value == fidelity[key]["value"]
        assert found[metric].metric_args["stderr"] == fidelity[key]["stderr"]
        assert found[metric].metric_args["tokens"] == fidelity["tokens"]
    assert f"{fidelity['kl']['value']:.2f}"[:3] in card.text
    assert "conmoe compress qwen3_moe half --keep 0.5" in card.text
    assert "## What was not tested" in card.text


def test_a_card_of_a_folder_names_no_base_model_and_one_of_the_hub_does(checkpoint, calibrated, tmp_path):
    commit = "0123456789abcdef"
    cached = tmp_path / "models--owner--some-moe" / "snapshots" / commit
    shutil.copytree(checkpoint("olmoe"), cached)
    plan = conmoe.plan(cached, calibrated("olmoe"), None, conmoe.Request("reap", "0.5"))
    out = conmoe.apply(cached, plan, tmp_path / "out").folder
    data = ModelCard.load(out / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("owner/some-moe", "finetune")
    source = read_result_manifest(out).source
    assert (source.name, source.revision, source.fingerprint) == ("owner/some-moe", commit, plan.source)
    plain = conmoe.apply(checkpoint("olmoe"), plan, tmp_path / "plain").folder
    assert ModelCard.load(plain / "README.md").data.base_model is None


def test_writing_a_card_again_changes_nothing_and_keeps_what_people_wrote(result):
    card = result / "README.md"
    assert refresh_card(result) == card.read_text()
    text = card.read_text().replace("library_name:", "widget: mine\nlibrary_name:")
    text = text.replace(BEGIN, f"My own words.\n\n{BEGIN}") + "\nAnd more.\n"
    card.write_text(text)
    again = refresh_card(result)
    assert "My own words." in again
    assert again.rstrip().endswith("And more.")
    assert ModelCard(again).data["widget"] == "mine"
    card.write_text(again)
    assert refresh_card(result) == again
    card.write_text("no marks, no metadata")
    assert ModelCard(refresh_card(result)).text.lstrip().startswith("no marks")


def test_what_is_no_number_is_called_so_and_what_was_not_measured_is_not_spoken_of(made):
    broken = {"value": None, "stderr": None}
    mine = {**results(made)}
    mine["fidelity"] = {**mine["fidelity"], "kl": broken, "perplexity": {"value": float("nan")}, "excess_loss": None}
    task = {"acc": {**broken, "n": 3, "source": {"value": 0.5}, "difference": None}, "alias": "a task"}
    record = {"loss": broken, "domains": {"wiki": {"kl": broken}}, "tasks": {"arc": task}}
    card = ModelCard(measured_card((made / "README.md").read_text(), mine, {"after": record}, name="x"))
    rows = [line for line in card.text.splitlines() if "not a number" in line]
    told = [row.split(" ")[1] for row in rows]
    assert told == ["perplexity", "KL(source", "loss,", "wiki", "arc"]
    assert all(row.count("not a number") == 1 for row in rows)
    assert {each.metric_type for each in card.data["eval_results"]}.isdisjoint({"kl_divergence", "perplexity", "acc"})


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_foreign_breaks_the_card(made, name):
    number = {"value": 1.0, "stderr": 0.5}
    record = {
        "data": [name],
        "loss": number,
        "tokens": name,
        "domains": {name: {"kl": number, "data": [name]}},
        "tasks": {name: {name: {**number, "n": 3, "source": number, "difference": name}}},
        "generation": {"units": {name: name}, "model": {name: number}, "source": None, name: name},
        "speed": {"x": name, "units": {name: name}, "ratio": {name: 2.0}, "agreement": {name: number}},
    }
    mine = {**results(made), "held_out": [name], "command": name, "versions": {name: name}}
    mine["calibration"] = {**mine["calibration"], "data": [name], "dtype": name}
    text = measured_card((made / "README.md").read_text(), mine, {name: record}, name=name)
    body = text.removeprefix("---\n").split("\n---\n", 1)[1]
    data = ModelCard(text).data.to_dict()
    before = ModelCard.load(made / "README.md").data.to_dict()
    assert set(data) == set(before)
    assert data["tags"] == before["tags"]
    outside = [line for line in fenced_out(body) if line not in (BEGIN, END)]
    assert not [line for line in outside if "<" in line or "](" in line.replace("\\]", "")], outside
    assert sum(line.startswith("# ") for line in outside) == 1
    for table in tables(outside):
        assert len({cells(row) for row in table}) == 1, table
    again = measured_card(text, mine, {name: record}, name=name)
    assert again == text


def test_what_both_were_measured_on_stands_side_by_side_in_the_card(made):
    bytes_of = {side: {"peak": {"value": value, "stderr": 5e5}} for side, value in (("source", 2e9), ("model", 1e9))}
    generation = {
        "prompts": 32,
        "prompts_from": str(made / "prompts.txt"),
        "seed": 0,
        "units": {"length": "new tokens", "loops": "share that end in a loop", "equal": "tokens before they part"},
        "model": {"length": {"value": 128.0, "stderr": 0.0}, "loops": {"value": 0.25, "stderr": 0.05}},
        "source": None,
        "difference": None,
        "agreement": {"equal": {"value": 3.5, "stderr": 0.5}},
    }
    speed = {"units": {"peak": "bytes at most"}, **bytes_of, "ratio": {"peak": {"value": 0.5, "stderr": 0.01}}}
    record = {"generation": generation, "speed": speed, "task_options": {"limit": 20}, "tasks": {"t": {"acc": 0.5}}}
    lines = measured_card((made / "README.md").read_text(), results(made), {"a": record}, name="x").splitlines()
    for line in (
        "| new tokens |  | 128 |  |",
        "| share that end in a loop |  | 0.250 ± 0.050 |  |",
        "Measured with: prompts 32; prompts from prompts.txt; seed 0; tokens before they part 3.5.",
        "| bytes at most | 2 GB | 1 GB | 0.500 ± 0.010 |",
    ):
        assert line in lines
    assert any("the first 20 documents of each" in line for line in lines)


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        (conmoe.Request(), True),
        (conmoe.Request(budget="4,6"), True),
        (conmoe.Request("reap", form="shared"), False),
        (conmoe.Request("mone"), False),
        (conmoe.Request("mc-smoe"), False),
        (conmoe.Request("cd-moe", form="shared"), False),
        (conmoe.Request("naee", options={"skip": True}, form="shared"), False),
        (conmoe.Request(scope=2), False),
    ],
)
def test_a_card_promises_an_engine_what_the_modelling_file_lets_it_run(asked, served, checkpoint, calibrated, tmp_path):
    plan = conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), None, asked)
    conmoe.apply(checkpoint("olmoe"), plan, tmp_path / "out", form="shared")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    config._attn_implementation = "vllm"
    try:
        modeling_conmoe._refuse_unfit_engine(config)
        runs = True
    except ValueError:
        runs = False
    text = (tmp_path / "out" / "README.md").read_text()
    assert (runs, "vLLM serves it" in text, "vLLM does not serve it" in text) == (served, served, not served)


def fenced_out(body: str) -> list[str]:
    """The lines that no fence encloses."""
    left, fence = [], ""
    for line in body.splitlines():
        if fence:
            fence = "" if line == fence else fence
        elif line.startswith("```"):
            fence = "`" * (len(line) - len(line.lstrip("`")))
        else:
            left.append(line)
    assert not fence
    return left


def tables(lines: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def cells(row: str) -> int:
    return row.replace("\\\\", "").replace("\\|", "").count("|")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_of_the_source_stays_a_name(checkpoint, calibrated, tmp_path, name):
    folder = tmp_path / name.replace("/", "_").replace("\0", "_")[:100]
    shutil.copytree(checkpoint("olmoe"), folder)
    foreign = {"license": name, "license_name": [name], "language": [name, False, 3], "datasets": name, "evil": name}
    (folder / "README.md").write_text(f"---\n{yaml_dump(foreign)}---\n{name}")
    plan = conmoe.plan(folder, calibrated("olmoe"), None, conmoe.Request("reap", "0.5"))
    out = conmoe.apply(folder, plan, tmp_path / "out").folder
    text = (out / "README.md").read_text()
    body = text.removeprefix("---\n").split("\n---\n", 1)[1]
    data = ModelCard(text).data.to_dict()
    assert "evil" not in data
    assert data["license"] != "mit"
    outside = [line for line in fenced_out(body) if line not in (BEGIN, END)]
    assert not [line for line in outside if "<" in line], outside
    assert sum(line.startswith("# ") for line in outside) == 1
    assert all(len({cells(row) for row in table}) == 1 for table in tables(outside))


def test_escapes():
    assert escaped("a|b_c\n<d>") == r"a\|b\_c &lt;d&gt;"
    assert code("a`b|c") == r"`a'b\|c`"
    assert block("```\nx")[0] == "````"


def test_norwegian_is_a_language(checkpoint, calibrated, tmp_path):
    folder = Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "model"))
    (folder / "README.md").write_text("---\nlanguage:\n- no\n- en\nlicense: mit\n---\n")
    plan = conmoe.plan(folder, calibrated("olmoe"), None, conmoe.Request("reap", "0.5"))
    out = conmoe.apply(folder, plan, tmp_path / "out").folder
    assert ModelCard.load(out / "README.md").data.language == ["no", "en"]


def test_the_manifest_lists_every_file_by_its_bytes(made):
    manifest = read_result_manifest(made)
    listed = {record.path: record for record in manifest.files}
    assert set(listed) == set(tree(made)) - {".conmoe", RESULT_MANIFEST}
    for path, record in listed.items():
        assert record.size == (made / path).stat().st_size
        assert record.sha256 == sha256(made / path)
    assert not check_files(made).strangers


def test_every_flipped_byte_and_every_cut_is_found(result):
    rng = random.Random(0)
    for path in list_files(result):
        file = result / path
        whole = file.read_bytes()
        for place in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(3))}:
            broken = bytearray(whole)
            broken[place] ^= 1 << rng.randrange(8)
            file.write_bytes(broken)
            assert found(result, path)
        file.write_bytes(whole[:-1])
        assert found(result, path)
        file.unlink()
        with pytest.raises(conmoe.ConmoeError, match="missing"):
            check_files(result)
        file.write_bytes(whole)
    assert check_files(result).edited == ()


def found(folder: Path, path: str) -> bool:
    if path in EDITABLE:
        return check_files(folder).edited == (path,)
    with pytest.raises(conmoe.ConmoeError) as error:
        check_files(folder)
    return path in str(error.value)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "conmoe/../../secret", "a\\b", "./README.md", ""])
def test_a_manifest_cannot_name_what_is_outside(result, path):
    file = result / RESULT_MANIFEST
    record = json.loads(file.read_text())
    record["files"].append({"path": path, "size": 1, "sha256": "0"})
    file.write_text(json.dumps(record))
    with pytest.raises(conmoe.ConmoeError, match="not a file of that folder"):
        check_files(result)


def test_a_link_is_not_followed(result, tmp_path):
    secret = tmp_path / "secret"
    shutil.move(result / "config.json", secret)
    (result / "config.json").symlink_to(secret)
    with pytest.raises(conmoe.ConmoeError, match="missing or a link"):
        check_files(result)


def test_a_run_that_goes_on_has_the_same_manifest(checkpoint, calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("conmoe.apply"), "SHARD_BYTES", 60_000)
    plan = conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), None, conmoe.Request("reap", "0.5"))
    whole = conmoe.apply(checkpoint("olmoe"), plan, tmp_path / "whole").folder
    assert len(list(whole.glob("*.safetensors"))) > 2
    killed = tmp_path / "again.partial"
    shutil.copytree(whole, killed)
    sorted(killed.glob("*.safetensors"))[-1].unlink()
    again = conmoe.apply(checkpoint("olmoe"), plan, tmp_path / "again").folder
    assert (again / RESULT_MANIFEST).read_bytes() == (whole / RESULT_MANIFEST).read_bytes()
