"""Pruning while tuning: the schedule and importance of MC-SMoE (arXiv 2310.01334) in loops of their own, and what of a
checkpoint may change, must shrink, and must still agree with its plan.
"""

from __future__ import annotations

import gc
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import conmoe
from conmoe.demo import demo_model
from conmoe.ops.experts import mix, tensors
from conmoe.ops.factors import concatenate, decompose, exact, take, to_weights
from conmoe.ops.lines import count_of, highest, line_importance, moving_average, share_at
from conmoe.source import open_source, read_experts
from conmoe.tune import Tuning, check, tune
from conmoe.tune.pruning import LinePruning, Lines, with_factors
from conmoe.types import Plan
from tests.commands import runner, tree, write_text
from tests.families import save_tiny
from tests.results import config_of, hand_made, load, logits, on_disk
from tests.test_compress import Quiet
from tests.test_tune import FAST, PAIRS, Mortal, fail, text

PRUNE = replace(FAST, mode="prune", epochs=2, ratio=0.25)
FACTORS = tuple(
    f"{matrix}_{part}" for matrix in ("gate", "up", "down") for part in ("left", "right", "values", "index")
)


def stored_plan(out: Path) -> Plan:
    """The plan that lies with a result, and the factors that the result holds."""
    return with_factors(open_source(out), conmoe.artifacts.read_plan(out / "conmoe", weights=False))


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """The Trainer collects garbage over and over, which costs seconds among all that a test run holds."""
    gc.freeze()
    yield
    gc.unfreeze()


def factored(source: Path, out: Path, *, ratio=1.0, structure="rows", rank=3, protected=()) -> Path:
    """Neighbours merged, each matrix a low rank and a share of what that leaves; the prototypes of the experts
    ``protected`` of layer 1 whole.
    """
    opened, layers = open_source(source), {}
    for layer in opened.layers:
        found = {name: mix(tensor, PAIRS.mixing_KE) for name, tensor in tensors(read_experts(opened, layer)).items()}
        matrices = {name: value for name, value in found.items() if "bias" not in name}
        factors = decompose(matrices, rank, ratio, structure)
        held = set(PAIRS.assignment_E[list(protected)].tolist()) if layer.index == 1 else set()
        for name, item in factors.items() if held else ():
            kept = exact(matrices[name], structure)
            parts = [take(kept if each in held else item, torch.tensor([each])) for each in range(len(matrices[name]))]
            factors[name] = concatenate(parts)
        biases = {name: value + 0.1 for name, value in found.items() if "bias" in name}  # its own, as merging brings
        layers[layer.index,] = replace(PAIRS, weights={**to_weights(factors), **biases})
    plan = replace(hand_made(source, layers), protected={1: tuple(protected)} if protected else {})
    conmoe.apply(source, plan, out, form="shared")
    return out


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """``whole(family, structure)``: a factored checkpoint that keeps every line; never written to."""
    made: dict[tuple[str, str], Path] = {}

    def get(family="olmoe", structure="rows") -> Path:
        if (family, structure) not in made:
            out = tmp_path_factory.mktemp("factored") / f"{family}-{structure}"
            made[family, structure] = factored(checkpoint(family), out, structure=structure)
        return made[family, structure]

    return get


def lines_of(folder: Path) -> int:
    return sum(value.numel() for name, value in on_disk(folder).items() if name.endswith("_index"))


# The schedule, importance, choice ------------------------------------------------------------------------------------


def test_the_schedule_is_the_papers():
    total, initial, final, ratio = 10_000, 400, 1600, 0.1  # the last two count from the two ends of the run
    options = Tuning()
    for step in range(0, total + 1, 50):
        if step <= initial:
            expected = 1.0
        elif step > total - final:
            expected = ratio
        else:
            left = 1 - (step - initial) / (total - final - initial)
            expected = ratio + (1 - ratio) * left * left * left
        found = share_at(step, options.prune_start * total, options.prune_end * total, 1.0, ratio)
        assert found == pytest.approx(expected, abs=1e-12)
    assert share_at(4400, 400, 8400, 1.0, 0.1) == pytest.approx(0.1 + 0.9 / 8)


def test_a_schedule_may_be_one_blow_or_the_whole_run():
    assert [share_at(step, 5, 5, 1.0, 0.3) for step in (4, 5, 6)] == [1.0, 0.3, 0.3]
    assert [share_at(step, 10, 10, 1.0, 0.3) for step in (9, 10)] == [1.0, 0.3]
    shares = [share_at(step, 0, 10, 0.8, 0.3) for step in range(11)]
    assert shares[0] == 0.8
    assert shares[-1] == 0.3
    assert shares == sorted(shares, reverse=True)


def test_importance_is_a_mean_of_moving_averages():
    generator = torch.Generator().manual_seed(0)
    S, A, steps = 5, 7, 6
    average = [[0.0] * A for _ in range(S)]
    found = torch.zeros(S, dtype=torch.float64)
    for _ in range(steps):
        values, gradient = torch.randn(2, S, A, generator=generator)
        for s in range(S):
            for a in range(A):
                average[s][a] = 0.85 * average[s][a] + 0.15 * abs(float(values[s, a]) * float(gradient[s, a]))
        found = moving_average(found, line_importance(values, gradient))
    expected = torch.tensor([sum(line) / A for line in average], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_highest_of_all_matrices_with_ties_to_the_first():
    parts = [torch.tensor([1.0, 5.0, 0.0]), torch.tensor([]), torch.tensor([5.0, 1.0]), torch.tensor([2.0])]
    order = [(1, 0), (0, 2), (0, 3), (0, 0), (1, 2)]  # 5, 5, 2, 1, 1 as (place, part)
    for count in range(6):
        masks = highest(parts, count)
        chosen = {(int(place), part) for part, mask in enumerate(masks) for place in mask.nonzero().flatten()}
        assert chosen == set(order[:count])


def test_shares_are_rounded_as_the_train_free_method_rounds_them():
    matrices = {"gate_EID": torch.randn(3, 5, 8), "down_EDI": torch.randn(3, 8, 5)}
    for ratio in (0.0, 0.1, 0.5, 0.6, 1.0):
        stored = sum(item.index_S.numel() for item in decompose(matrices, 2, ratio).values())
        assert stored == count_of(ratio, 39)


def test_the_schedule_starts_from_what_is_stored():
    lines = {"a": Lines(torch.arange(6), torch.ones(6, dtype=torch.bool), 12)}
    pruning = LinePruning(lines, Tuning(mode="prune", ratio=0.1, prune_start=0.0, prune_end=1.0), 10)
    left = [int(pruning.kept(step)["a"].sum()) for step in range(11)]
    assert left == [int(12 * (0.1 + 0.4 * (1 - step / 10) ** 3) + 0.5) for step in range(11)]
    assert (left[0], left[-1]) == (6, 1)


def test_a_pruned_line_may_come_back():
    lines = {"a": Lines(torch.arange(3), torch.ones(3, dtype=torch.bool), 3)}
    pruning = LinePruning(lines, Tuning(mode="prune", ratio=1 / 3, prune_start=0.0, prune_end=0.0), 9)
    weight = nn.Parameter(torch.ones(3, 2))
    for step, strong in ((1, 0), (2, 0), (3, 2), (4, 2), (5, 2), (6, 2), (7, 2)):
        weight.data += 0.1  # what an optimizer may do to a line of zeros
        weight.grad = torch.zeros(3, 2)
        weight.grad[strong] = 100.0 if step > 2 else 1.0
        pruning.update({"a": weight}, step)
        alive = weight.data.any(dim=1).nonzero().flatten().tolist()
        assert alive == pruning.kept(step)["a"].nonzero().flatten().tolist()
        assert alive == [strong]


# What is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "structure"),
    [
        ("olmoe", "rows"),
        ("mixtral", "columns"),
        ("gpt_oss", "rows"),  # biases, interleaved and transposed
        pytest.param("deepseek_v3", "rows", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "columns", marks=pytest.mark.slow),
        pytest.param("granitemoe", "rows", marks=pytest.mark.slow),
    ],
)
def test_lines_go_and_nothing_else_changes(family, structure, whole, checkpoint, tmp_path):
    model, out = whole(family, structure), tmp_path / "out"
    tuned = tune(model, out, text(), PRUNE, Quiet(), against=checkpoint(family))
    before, after = on_disk(model), on_disk(out)
    assert before.keys() == after.keys()
    others = [name for name in before if not name.endswith(FACTORS)]
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith(FACTORS[:2]))

    every = lines_of(model)
    assert tuned.lines == (int(0.25 * every + 0.5), every)
    assert lines_of(out) == tuned.lines[0]
    saved = 0
    for name in before:
        if name.endswith("_index"):
            values = name.replace("_index", "_values")
            kept = torch.isin(before[name], after[name])
            assert torch.equal(before[name][kept], after[name])
            assert after[values].shape == (len(after[name]), before[values].shape[1])
            assert bool(after[values].any(dim=1).all())
            saved += int((~kept).sum()) * (before[values].shape[1] * before[values].element_size() + 8)
    sizes = [sum(value.nbytes for value in each.values()) for each in (before, after)]
    assert sizes[0] - sizes[1] == saved > 0
    files = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (model, out)]
    assert files[0] - files[1] == pytest.approx(saved, abs=512)  # headers
    assert tuned.parameters == sum(
        after[name].numel() for name in after if name.endswith(FACTORS) and "_index" not in name
    )

    conmoe.verify(out, checkpoint(family), stored_plan(out), "shared")
    load(out)
    record = json.loads((out / "conmoe" / "tuning.json").read_text())
    assert record["plan_holds"] is True
    assert record["lines"] == list(tuned.lines)
    assert "_index" not in "".join(record["tuned"])
    assert f"{tuned.lines[0]:,} of {tuned.lines[1]:,}" in (out / "README.md").read_text()
    old, new = config_of(model), config_of(out)
    for layer, departure in new["consolidated_layers"].items():
        for matrix, found in departure["factors"].items():
            (index,) = [n for n in after if f".{layer}." in n and n.endswith(f".{matrix}_index")]
            assert found["kept"] == len(after[index])
            old["consolidated_layers"][layer]["factors"][matrix]["kept"] = found["kept"]
    assert old == new
    assert {entry.name for entry in tmp_path.iterdir()} == {"out"}


def reference(model, teacher, ids, options, steps):
    """The method in a loop of its own: every line stays in its tensor, and every number has its own moving average."""
    model.requires_grad_(False)
    named = dict(model.named_parameters())
    names = [name for name in named if name.endswith(("_left", "_right", "_values"))]
    parameters = [named[name].requires_grad_(True) for name in names]
    values = {name: named[name] for name in names if name.endswith("_values")}
    average = {name: torch.zeros_like(value).double() for name, value in values.items()}
    every = sum(len(value) for value in values.values())
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    target = (logits(teacher, ids) / 2).log_softmax(-1).flatten(0, 1)
    start, end, pruned = options.prune_start * steps, options.prune_end * steps, set()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = options.learning_rate * (steps - step + 1) / steps
        optimizer.zero_grad()
        out = model(ids).logits
        loss = nn.functional.cross_entropy(out[:, :-1].reshape(-1, out.shape[-1]), ids[:, 1:].reshape(-1))
        score = (out / 2).log_softmax(-1).flatten(0, 1)
        loss = loss + 0.2 * 4 * nn.functional.kl_div(score, target, log_target=True, reduction="batchmean")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        share = 1.0 if step <= start else options.ratio
        if start < step < end:
            share += (1 - options.ratio) * (1 - (step - start) / (end - start)) ** 3
        ranking = []
        for name, value in values.items():
            average[name] = 0.85 * average[name] + 0.15 * (value.detach() * value.grad).abs()
            ranking += [(float(line), name, place) for place, line in enumerate(average[name].mean(1))]
        gone = every - int(share * every + 0.5)
        pruned = set(sorted(ranking)[:gone])
        for _, name, place in pruned:
            values[name].data[place] = 0
    left = {name: [True] * len(value) for name, value in values.items()}
    for _, name, place in pruned:
        left[name][place] = False
    return named, names, {name: torch.tensor(mask) for name, mask in left.items()}


def test_it_is_adamw_and_the_least_important_lines_of_all(whole, checkpoint, tmp_path):
    model, ids = whole(), text().ids_NS
    options = replace(PRUNE, batch=12, epochs=8, learning_rate=3e-3, ratio=0.3)
    tune(model, tmp_path / "out", text(), options, Quiet(), against=checkpoint("olmoe"))
    named, names, left = reference(load(model), load(checkpoint("olmoe")), ids, options, 8)
    found = on_disk(tmp_path / "out")
    for name in names:
        if name in left:
            index = on_disk(model)[name.replace("_values", "_index")]
            assert torch.equal(found[name.replace("_values", "_index")], index[left[name]])
            expected = named[name].detach()[left[name]]
        else:
            expected = named[name].detach()
        torch.testing.assert_close(found[name], expected, atol=2e-5, rtol=0)


def test_zeroed_lines_and_lines_that_are_gone_are_the_same_model(whole, checkpoint, tmp_path):
    tune(whole(), tmp_path / "out", text(), PRUNE, Quiet(), against=checkpoint("olmoe"))
    small, large = on_disk(tmp_path / "out"), load(whole())
    with torch.no_grad():
        for name, value in large.named_parameters():
            if name.endswith("_values"):
                index = large.get_buffer(name.replace("_values", "_index"))
                kept = torch.isin(index, small[name.replace("_values", "_index")])
                value.zero_()
                value[kept] = small[name]
            elif name.endswith(FACTORS):
                value.copy_(small[name])
    made = load(tmp_path / "out")
    torch.testing.assert_close(logits(made), logits(large), rtol=1e-5, atol=1e-5)
    answer = made.generate(torch.tensor([[1, 2, 3]]), min_new_tokens=5, max_new_tokens=5, do_sample=False)
    assert answer.shape == (1, 8)


def test_in_bfloat16_the_result_is_still_its_plan(tmp_path):
    source = save_tiny("olmoe", tmp_path / "source", dtype=torch.bfloat16)
    model = factored(source, tmp_path / "model")
    options = replace(PRUNE, dtype=torch.bfloat16)
    tune(model, tmp_path / "out", text(), options, Quiet(), against=source)
    conmoe.verify(tmp_path / "out", source, stored_plan(tmp_path / "out"), "shared")
    made = conmoe.apply(source, stored_plan(tmp_path / "out"), tmp_path / "again")
    assert made.bytes == sum(value.nbytes for value in on_disk(tmp_path / "out").values())
    for name, value in on_disk(tmp_path / "again").items():
        assert torch.equal(value, on_disk(tmp_path / "out")[name]), name


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_all_may_go_or_stay(ratio, whole, checkpoint, tmp_path):
    options = replace(PRUNE, ratio=ratio, epochs=1)
    tuned = tune(whole(), tmp_path / "out", text(), options, Quiet(), against=checkpoint("olmoe"))
    assert tuned.lines == (lines_of(whole()) if ratio else 0, lines_of(whole()))
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_lines_of_protected_experts_stay_and_do_not_count(checkpoint, tmp_path):
    model = factored(checkpoint("olmoe"), tmp_path / "model", protected=(2, 3))
    options = replace(PRUNE, ratio=0.1)
    tuned = tune(model, tmp_path / "out", text(), options, Quiet(), against=checkpoint("olmoe"))
    every, held = 2 * 4 * (16 + 16 + 32), 16 + 16 + 32
    assert tuned.lines == (round(0.1 * (every - held)) + held, every)
    after = on_disk(tmp_path / "out")
    for matrix, rows in (("gate", 16), ("up", 16), ("down", 32)):
        index = after[f"model.layers.1.mlp.experts.{matrix}_index"]
        assert sum(index // rows == 1) == rows
    conmoe.verify(tmp_path / "out", checkpoint("olmoe"), stored_plan(tmp_path / "out"), "shared")


def test_a_checkpoint_with_a_part_of_the_lines_starts_from_there(checkpoint, tmp_path):
    model, source = factored(checkpoint("olmoe"), tmp_path / "model", ratio=0.5), checkpoint("olmoe")
    every = lines_of(model) * 2
    options = replace(PRUNE, ratio=0.125)
    tuned = tune(model, tmp_path / "out", text(), options, Quiet(), against=source)
    assert tuned.lines == (every // 8, every)
    with pytest.raises(conmoe.UsageError, match=f"only {every // 2} of {every} are stored"):
        tune(model, tmp_path / "no", text(), replace(PRUNE, ratio=0.51), Quiet(), against=source)
    twice = tune(tmp_path / "out", tmp_path / "twice", text(), replace(PRUNE, ratio=0.0625), Quiet(), against=source)
    assert twice.lines == (every // 16, every)
    assert json.loads((tmp_path / "twice" / "conmoe" / "tuning.json").read_text())["plan_holds"] is True


def test_the_experts_of_such_a_checkpoint_can_be_tuned_without_pruning(whole, tmp_path):
    tune(whole(), tmp_path / "out", text(), FAST, Quiet())
    before, after = on_disk(whole()), on_disk(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(FACTORS) and not name.endswith("_index")}


# Seeds, and runs that are killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 6])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(steps, whole, checkpoint, tmp_path):
    """After a checkpoint that the moving averages still remember, and after the last."""
    options = replace(PRUNE, prune_start=0.0, prune_end=1.0)
    once, again = {"against": checkpoint("olmoe")}, Quiet()
    with pytest.raises(KeyboardInterrupt):
        tune(whole(), tmp_path / "out", text(), options, Mortal(steps, fail), **once)
    assert not (tmp_path / "out").exists()
    tune(whole(), tmp_path / "out", text(), options, again, **once)
    assert again.done["tune"] == [6, 6]
    tune(whole(), tmp_path / "once", text(), options, Quiet(), **once)
    assert tree(tmp_path / "out") == tree(tmp_path / "once")
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "once"}


def test_the_seed_decides_and_no_global_generator_moves(whole, checkpoint, tmp_path):
    states = random.getstate(), torch.get_rng_state().tolist()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tune(whole(), tmp_path / name, text(), replace(PRUNE, seed=seed), Quiet(), against=checkpoint("olmoe"))
    assert (random.getstate(), torch.get_rng_state().tolist()) == states
    a, b, c = (tree(tmp_path / name) for name in "abc")
    assert a["model.safetensors"] == b["model.safetensors"] != c["model.safetensors"]


# The record, and what is refused -------------------------------------------------------------------------------------


def test_without_a_teacher_it_is_language_modelling_and_the_plan_is_not_checked(whole, tmp_path):
    options = replace(PRUNE, distillation=0.0)
    with pytest.raises(conmoe.UsageError, match="--distillation 0"):
        tune(whole(), tmp_path / "out", text(), PRUNE, Quiet())
    tune(whole(), tmp_path / "out", text(), options, Quiet())
    record = json.loads((tmp_path / "out" / "conmoe" / "tuning.json").read_text())
    assert record["plan_holds"] is None
    assert record["options"]["temperature"] == 2.0
    assert record["options"]["ratio"] == 0.25


def test_a_plan_that_an_earlier_tuning_had_left_behind_is_said_not_to_hold(whole, checkpoint, tmp_path):
    source, progress = checkpoint("olmoe"), Quiet()
    model = shutil.copytree(whole(), tmp_path / "model")
    results = {"output": str(model), "fidelity": {"kl": 1.0}, "bytes": 1}
    conmoe.write_json(model / "conmoe" / "results.json", results)
    tune(model, tmp_path / "routers", text(), replace(FAST, mode="router"), Quiet(), against=source)
    tune(tmp_path / "routers", tmp_path / "out", text(), PRUNE, progress, against=source)
    record = json.loads((tmp_path / "out" / "conmoe" / "tuning.json").read_text())
    assert record["plan_holds"] is False
    assert "An earlier tuning" in progress.notes[0]
    told = json.loads((tmp_path / "out" / "conmoe" / "results.json").read_text())
    written = sum(value.nbytes for value in on_disk(tmp_path / "out").values())
    assert told == {"output": str(tmp_path / "out"), "fidelity": None, "bytes": written}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ratio": 1.5}, "between 0 and 1"),
        ({"ratio": float("nan")}, "between 0 and 1"),
        ({"distillation": -0.1}, "weight of distillation"),
        ({"prune_start": 0.5, "prune_end": 0.4}, "the start first"),
        ({"prune_end": 1.1}, "the start first"),
    ],
)
def test_a_request_that_cannot_be_met(change, words, whole, checkpoint, tmp_path):
    with pytest.raises(conmoe.UsageError, match=words):
        check(whole(), tmp_path / "out", replace(PRUNE, **change), against=checkpoint("olmoe"))


def test_a_checkpoint_without_factors_has_nothing_to_prune(checkpoint, tmp_path):
    conmoe.apply(checkpoint("olmoe"), hand_made(checkpoint("olmoe"), {(0,): PAIRS}), tmp_path / "pairs")
    with pytest.raises(conmoe.UsageError, match="stores no experts as factors"):
        tune(tmp_path / "pairs", tmp_path / "out", text(), PRUNE, Quiet(), against=checkpoint("olmoe"))


def test_from_the_method_to_the_result_by_the_command_line(checkpoint, calibrated, tmp_path, capsys):
    run, source, data = runner(capsys), checkpoint("olmoe"), write_text(tmp_path)
    statistics, plan, model = calibrated("olmoe"), tmp_path / "plan", tmp_path / "model"
    options = [word for option in ("rank=4", "ratio=1.0", "structure=rows") for word in ("--option", option)]
    assert run("plan", source, statistics, plan, "--method", "mc-smoe", "--keep", "0.5", *options).code == 0
    assert run("apply", source, plan, model).code == 0
    arguments = (
        *("--mode", "prune", "--against", source, "--data", data, "--tokens", 1024, "--seq-len", 32),
        *("--eval-tokens", 0, "--ratio", 0.2, "--distillation", 0.5, "--prune-start", 0.1, "--prune-end", 0.9),
    )
    found = run("tune", model, tmp_path / "out", *arguments, "--json")
    assert found.code == 0, found.err
    every = lines_of(model)
    assert found.json["lines"] == [int(0.2 * every + 0.5), every]
    asked = json.loads((tmp_path / "out" / "conmoe" / "tuning.json").read_text())["options"]
    wanted = {"ratio": 0.2, "distillation": 0.5, "prune_start": 0.1, "prune_end": 0.9, "temperature": 2.0}
    assert {name: asked[name] for name in wanted} == wanted
    said = run("tune", model, tmp_path / "said", *arguments)
    assert "rows or columns are left" in said.out + said.err


# A trained model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trained_model_keeps_more_than_without_tuning(tmp_path):
    model = demo_model()
    tokenizer = conmoe.load_tokenizer(model)
    data = conmoe.load_tokens(tokenizer, [], tokens=32768, seq_len=256)
    held_out = conmoe.load_tokens(tokenizer, [], tokens=8192, seq_len=256, part="evaluation")
    conmoe.calibrate(model, tmp_path / "statistics", data)
    for name, ratio in (("free", 0.1), ("whole", 1.0)):
        request = conmoe.Request(method="mc-smoe", keep="0.5", options={"ratio": ratio, "rank": 8, "structure": "rows"})
        conmoe.apply(model, conmoe.plan(model, tmp_path / "statistics", None, request), tmp_path / name)
    options = Tuning("prune", learning_rate=1e-3, epochs=3)
    tuned = tune(tmp_path / "whole", tmp_path / "out", data, options, Quiet(), against=model, held_out=held_out)
    free = conmoe.evaluate(tmp_path / "free", held_out, against=model)
    assert lines_of(tmp_path / "free") == lines_of(tmp_path / "out")
    assert tuned.after.kl.value < free.kl.value


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16(whole, checkpoint, tmp_path):
    options = replace(PRUNE, epochs=4, device="cuda", gradient_checkpointing=True)
    tuned = tune(whole(), tmp_path / "out", text(), options, Quiet(), against=checkpoint("olmoe"))
    assert tuned.lines is not None
    assert lines_of(tmp_path / "out") == tuned.lines[0]
    assert tuned.losses[-1] < tuned.losses[0]
    assert json.loads((tmp_path / "out" / "conmoe" / "tuning.json").read_text())["plan_holds"] is True
