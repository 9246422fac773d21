"""Plans and statistics come back from disk as they were, under names that change with anything in them."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import conmoe
from conmoe import artifacts
from conmoe.artifacts import LABEL, building, checkpoint_fingerprint, fingerprint, plan_fingerprint
from conmoe.types import LayerPlan, LayerStatistics, Plan, ScopePlan, TokenSample, sample_tensors


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_a_json_file_holds_no_number_that_is_not_finite(tmp_path):
    value = {"a": [math.nan, (math.inf, -math.inf, 1.5)], "b": {1: math.nan, "c": True}, "d": 1e308, "e": None}
    artifacts.write_json(tmp_path / "value.json", value)
    found = json.loads((tmp_path / "value.json").read_text(), parse_constant=refuse_constant)
    assert found == {"a": [None, [None, None, 1.5]], "b": {"1": None, "c": True}, "d": 1e308, "e": None}


def layer_plan(E: int = 6, K: int = 3, **fields) -> LayerPlan:
    mixing = torch.zeros(K, E, dtype=torch.float64)
    mixing[:, :K] = torch.eye(K)
    mixing[0, K:] = torch.tensor([0.5, 0.25, 0.25])
    gain = torch.linspace(0.5, 1.5, E, dtype=torch.float64)
    return LayerPlan(torch.tensor([0, 1, 2, 0, -1, 0]), mixing, gain, **fields)


def whole_plan(**fields) -> Plan:
    new = {"down_EDI": torch.randn(3, 4, 5).bfloat16(), "gate_EID": torch.randn(3, 5, 4)[:, :, :3]}
    first = layer_plan(weights=new, predicted_error=0.25, scores={"score": torch.rand(6)})
    same = layer_plan()  # its tensors are those of two layers
    scopes = (ScopePlan((1,), first), ScopePlan((2, 4), layer_plan()), ScopePlan((5,), same), ScopePlan((6,), same))
    values = {
        "scopes": scopes,
        "method": "conmoe",
        "options": {"distance": "weight", "alpha": 0.5, "fusion": True},
        "keep": "50%",
        "default_form": "shared",
        "protected": {1: (0, 2)},
        "source": "a",
        "statistics": "b",
        "version": "1",
    }
    return Plan(**{**values, **fields})


def assert_same(left: Plan, right: Plan) -> None:
    for name in Plan.__dataclass_fields__:
        if name != "scopes":
            assert getattr(left, name) == getattr(right, name), name
    for one, other in zip(left.scopes, right.scopes, strict=True):
        assert one.layers == other.layers
        for name in ("assignment_E", "mixing_KE", "gain_E"):
            assert getattr(one.plan, name).dtype == getattr(other.plan, name).dtype
            assert torch.equal(getattr(one.plan, name), getattr(other.plan, name)), name
        for name in ("weights", "scores"):
            mine, its = getattr(one.plan, name), getattr(other.plan, name)
            assert mine.keys() == its.keys()
            assert all(mine[key].dtype == its[key].dtype and torch.equal(mine[key], its[key]) for key in mine)
        errors = one.plan.predicted_error, other.plan.predicted_error
        assert errors[0] == errors[1] or all(map(math.isnan, errors))


def test_a_plan_comes_back_as_it_was(tmp_path):
    plan = whole_plan()
    artifacts.write_plan(tmp_path, plan)
    assert_same(conmoe.read_plan(tmp_path), plan)
    assert plan_fingerprint(conmoe.read_plan(tmp_path)) == plan_fingerprint(plan)
    weights = [f"weights-{scope.layers[0]:05}.safetensors" for scope in plan.scopes if scope.plan.weights]
    assert weights
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.json", "plan.safetensors", *weights]


def test_the_copy_of_a_plan_that_lies_with_its_result_does_without_new_weights(tmp_path):
    plan = whole_plan()
    artifacts.write_plan(tmp_path, plan, weights=False)
    bare = replace(plan, scopes=tuple(replace(scope, plan=replace(scope.plan, weights={})) for scope in plan.scopes))
    assert_same(artifacts.read_plan(tmp_path, weights=False), bare)
    with pytest.raises(conmoe.UsageError, match="the copy of a plan that lies with its result"):
        conmoe.read_plan(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["scopes"][0]["kept"] == [None] * 3


def test_the_readable_half_of_a_plan_says_what_is_kept(tmp_path):
    artifacts.write_plan(tmp_path, whole_plan())
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["scopes"][1]["kept"] == [None, 1, 2]
    assert record["scopes"][1]["assignment"] == [0, 1, 2, 0, -1, 0]
    assert record["scopes"][0]["kept"] == [None] * 3  # its weights are new
    assert [scope["predicted_error"] for scope in record["scopes"]] == [0.25, None, None, None]
    assert [scope["experts"] for scope in record["scopes"]] == [6, 3, 6, 6]


def test_equal_plans_are_the_same_bytes(tmp_path):
    plan = whole_plan()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        artifacts.write_plan(tmp_path / name, plan)
    for file in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_fingerprint_of_a_plan_changes_with_everything_in_it():
    torch.manual_seed(0)
    plan = whole_plan()
    first = plan.scopes[0].plan

    def with_first(**fields) -> Plan:
        return replace(plan, scopes=(ScopePlan((1,), replace(first, **fields)), *plan.scopes[1:]))

    mixing, gain, assignment = first.mixing_KE.clone(), first.gain_E.clone(), first.assignment_E.clone()
    mixing[0, 4] += 1e-9
    gain[3] += 1e-9
    assignment[4] = 1
    names = [
        plan_fingerprint(each)
        for each in (
            plan,
            with_first(mixing_KE=mixing),
            with_first(gain_E=gain),
            with_first(assignment_E=assignment),
            with_first(weights={**first.weights, "down_EDI": first.weights["down_EDI"] + 1}),
            with_first(weights={}),
            replace(plan, method="reap"),
            replace(plan, options={**plan.options, "alpha": 0.6}),
            replace(plan, source="c"),
            replace(plan, scopes=plan.scopes[:3]),
        )
    ]
    assert len(set(names)) == len(names)


def test_statistics_come_back_as_they_were(tmp_path):
    base = torch.rand(20, 4)  # the sample is a part of something larger
    sample = TokenSample(
        base[:5], torch.randint(0, 6, (5, 2)).int(), torch.rand(5, 2), torch.rand(5, 6).bfloat16(), torch.rand(5)
    )
    sums = {"count": torch.rand(6, dtype=torch.float64), "pair": torch.rand(6, 6).T, "same": base[:5]}
    artifacts.write_layer(tmp_path, 3, LayerStatistics(17, sums, sample, torch.zeros(6, dtype=torch.int64)))
    read = artifacts.read_layer(tmp_path, 3)
    assert read.tokens == 17
    assert read.owner_E.tolist() == [0] * 6
    assert read.sums.keys() == sums.keys()
    assert all(torch.equal(read.sums[name], value) for name, value in sums.items())
    assert sample_tensors(read.sample).keys() == sample_tensors(sample).keys()
    for name in sample_tensors(sample):
        assert getattr(read.sample, name).dtype == getattr(sample, name).dtype
        assert torch.equal(getattr(read.sample, name), getattr(sample, name))


def test_a_manifest_comes_back_and_has_a_name(calibrated, tmp_path):
    manifest = conmoe.read_manifest(calibrated("olmoe"))
    artifacts.write_manifest(tmp_path, manifest)
    again = conmoe.read_manifest(tmp_path)
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint
    for change in ({"seed": 5}, {"model": "x"}, {"data_fingerprint": "y"}, {"tokens": 1}, {"sample": 2}):
        assert manifest.model_copy(update=change).fingerprint != manifest.fingerprint


def test_json_has_one_name_whatever_the_order_of_its_keys():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [2, 1]}) != fingerprint({"a": 1, "b": [1, 2]})
    assert fingerprint({"a": 1}) == hashlib.sha256(b'{"a": 1}').hexdigest()  # the same in every process and release


def test_a_checkpoint_has_the_same_name_wherever_it_lies(checkpoint, tmp_path):
    folder = checkpoint("olmoe")
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / "README.md").write_text("a card does not change the model")

    def name(at: Path) -> str:
        return checkpoint_fingerprint(at, at.glob("*.safetensors"))

    assert name(moved) == name(folder)
    assert checkpoint_fingerprint(moved, [moved / "model.safetensors"] * 3) == name(folder)
    file = moved / "model.safetensors"
    raw = file.read_bytes()
    for place in (9, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert name(moved) != name(folder), place
    file.write_bytes(raw + b"\0")
    assert name(moved) != name(folder)
    file.write_bytes(raw)
    assert name(moved) == name(folder)
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    assert name(moved) != name(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "plan.json").write_text("{"), "plan.json is damaged or of another version"),
        (
            lambda folder: edit(folder, lambda record: record.pop("method")),
            "plan.json is damaged or of another version",
        ),
        (lambda folder: edit(folder, lambda record: record.update(more=1)), "plan.json is damaged"),
        (lambda folder: edit(folder, lambda record: record.update(format=2)), "has format 2; this version reads 1"),
        (lambda folder: (folder / "plan.safetensors").write_bytes(b"\x08"), "plan.safetensors cannot be read"),
        (lambda folder: (folder / "plan.safetensors").unlink(), "plan.safetensors cannot be read"),
        (lambda folder: edit_scopes(folder), "lacks the tensor"),
        (lambda folder: (folder / "plan.json").unlink(), "holds no plan; make one"),
    ],
)
def test_a_damaged_plan_is_one_sentence(damage, sentence, tmp_path):
    artifacts.write_plan(tmp_path, whole_plan())
    damage(tmp_path)
    with pytest.raises(conmoe.ConmoeError, match=sentence) as caught:
        conmoe.read_plan(tmp_path)
    assert "\n" not in str(caught.value)


def edit(folder: Path, change) -> None:
    record = json.loads((folder / "plan.json").read_text())
    change(record)
    (folder / "plan.json").write_text(json.dumps(record))


def edit_scopes(folder: Path) -> None:
    artifacts.write_plan(folder, whole_plan(scopes=()))
    scope = artifacts.plan_record(whole_plan()).scopes[0].model_dump(mode="json")
    edit(folder, lambda record: record.update(scopes=[scope]))


def test_a_plan_that_points_outside_its_prototypes_is_not_a_plan():
    layer = layer_plan()
    with pytest.raises(conmoe.ConmoeError, match="points outside the 3 prototypes"):
        replace(layer, assignment_E=layer.assignment_E + 1)


# Folders in the making ----------------------------------------------------------------------------------------------


def killed_while_building(out: Path, **options) -> None:
    with pytest.raises(RuntimeError, match="killed"), building(out, **options) as folder:  # noqa: PT012
        (folder / "plan.json").write_text("half")
        raise RuntimeError("killed")


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    out = tmp_path / "out"
    killed_while_building(out, key="k")
    assert not out.exists()
    with building(out, key="k") as folder:
        assert (folder / "plan.json").read_text() == "half"
        assert not out.exists()
    assert sorted(file.name for file in out.iterdir()) == [LABEL, "plan.json"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_begun_for_something_else_is_begun_again(tmp_path):
    out = tmp_path / "out"
    killed_while_building(out, key="k")
    with building(out, key="other") as folder:
        assert not (folder / "plan.json").exists()


def test_a_folder_is_replaced_only_when_its_successor_is_whole(tmp_path):
    out = tmp_path / "out"
    with building(out) as folder:
        (folder / "plan.json").write_text("old")
    with pytest.raises(conmoe.UsageError, match="exists"), building(out):
        pass
    killed_while_building(out, force=True)
    assert (out / "plan.json").read_text() == "old"
    with building(out, force=True) as folder:
        (folder / "plan.json").write_text("new")
    assert (out / "plan.json").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


# No pickle ----------------------------------------------------------------------------------------------------------


def test_nothing_is_pickled():
    """Neither by name nor through torch, whose own format is one."""
    banned_modules, banned_calls = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}, {"load", "save"}
    for file in sorted(Path(conmoe.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.partition(".")[0] for alias in node.names} | {getattr(node, "module", "") or ""}
                assert not names & banned_modules, file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in banned_calls, file


def test_artifacts_are_json_and_safetensors(calibrated, checkpoint, tmp_path):
    conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), tmp_path / "plan")
    both = [*calibrated("olmoe").iterdir(), *(tmp_path / "plan").iterdir()]
    files = [file for file in both if file.name != LABEL]
    assert {file.suffix for file in files} == {".json", ".safetensors"}


@pytest.mark.parametrize("place", ["out", "out.partial", "out.replaced"])
def test_a_strangers_folder_is_never_deleted(place, tmp_path):
    theirs = tmp_path / place
    theirs.mkdir()
    (theirs / "results.json").write_text("{}")  # a name that others use too
    with pytest.raises(conmoe.UsageError, match="was not written by conmoe"), building(tmp_path / "out", force=True):
        pass
    assert (theirs / "results.json").read_text() == "{}"
