"""Tasks: lm-evaluation-harness asks real models, and a plain loop over Transformers knows the answers."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from transformers import AutoModelForCausalLM

import conmoe
from tests.commands import runner
from tests.families import tiny_tokenizer
from tests.task_files import SIZES, questions, write_tasks


@pytest.fixture(autouse=True)
def _data_sets_stay_here(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def half(checkpoint, calibrated, tmp_path_factory):
    """A shared result with half of the experts."""
    folder = tmp_path_factory.mktemp("results") / "half"
    made = conmoe.plan(checkpoint("olmoe"), calibrated("olmoe"), None, conmoe.Request("conmoe", "0.5"))
    conmoe.apply(checkpoint("olmoe"), made, folder, form="shared")
    return folder


@pytest.fixture
def task_dir(tmp_path):
    return write_tasks(tmp_path)


def load(task_dir, *names, **options):
    return conmoe.load_tasks(names, task_dir, conmoe.TaskOptions(**options))


def right_answers(folder, name):
    """1 for each question whose likeliest choice is the right one, by logits of Transformers: plain, and by bytes."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tiny_tokenizer()
    plain, by_bytes = [], []
    for row in questions(name):
        context = tokenizer(f"{row['question']}\nAnswer:")["input_ids"]
        scores = []
        for choice in row["choices"]:
            ids = [*context, *tokenizer(f" {choice}")["input_ids"]]
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logp[at - 1, ids[at]]) for at in range(len(context), len(ids))))
        lengths = [len(choice) for choice in row["choices"]]
        plain.append(float(scores.index(max(scores)) == row["answer"]))
        normed = [score / length for score, length in zip(scores, lengths, strict=True)]
        by_bytes.append(float(normed.index(max(normed)) == row["answer"]))
    return {"acc": plain, "acc_norm": by_bytes}


def summary(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    return pytest.approx({"value": float(tensor.mean()), "stderr": float(tensor.std() / math.sqrt(len(values)))})


def exact_p(gained, lost):
    """Twice the tail of a fair coin, by counting."""
    n, least = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def test_scores_errors_and_differences_are_those_of_a_plain_loop(half, checkpoint, task_dir):
    found = conmoe.evaluate_tasks(half, load(task_dir, "letters"), against=checkpoint("olmoe"))
    ours, theirs = (right_answers(folder, "letters") for folder in (half, checkpoint("olmoe")))
    assert set(found["tasks"]) == {"letters"}
    for metric, entry in found["tasks"]["letters"].items():
        assert {name: entry[name] for name in ("value", "stderr")} == summary(ours[metric])
        assert entry["source"] == summary(theirs[metric])
        away = [a - b for a, b in zip(ours[metric], theirs[metric], strict=True)]
        assert entry["difference"] == summary(away)
        gained, lost = away.count(1.0), away.count(-1.0)
        p = pytest.approx(exact_p(gained, lost))
        assert entry["mcnemar"] == {"only_model": gained, "only_source": lost, "p": p}
        assert (entry["n"], entry["higher_is_better"]) == (SIZES["letters"], True)
    assert set(found["tasks"]["letters"]) == {"acc", "acc_norm"}
    assert any(entry["mcnemar"]["only_model"] for entry in found["tasks"]["letters"].values())
    json.dumps(found, allow_nan=False)


def test_a_group_is_the_mean_of_its_tasks_and_so_is_its_difference(half, checkpoint, task_dir):
    found = conmoe.evaluate_tasks(half, load(task_dir, "all_signs"), against=checkpoint("olmoe"))
    entry, parts = found["tasks"]["all_signs"]["acc"], found["subtasks"]["all_signs"]
    assert set(parts) == set(SIZES)
    ours, theirs = (
        [score for name in SIZES for score in right_answers(folder, name)["acc"]]
        for folder in (half, checkpoint("olmoe"))
    )
    assert entry["value"] == pytest.approx(sum(ours) / len(ours))
    assert entry["source"]["value"] == pytest.approx(sum(theirs) / len(theirs))
    assert entry["difference"]["value"] == pytest.approx(entry["value"] - entry["source"]["value"])
    errors = [SIZES[name] * parts[name]["acc"]["difference"]["stderr"] for name in SIZES]
    assert entry["difference"]["stderr"] == pytest.approx(math.hypot(*errors) / len(ours))
    assert entry["n"] == len(ours)
    away = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert (entry["mcnemar"]["only_model"], entry["mcnemar"]["only_source"]) == (away.count(1.0), away.count(-1.0))


def test_a_tag_is_a_list_of_its_tasks(checkpoint, task_dir):
    found = conmoe.evaluate_tasks(checkpoint("olmoe"), load(task_dir, "signs", limit=3))
    assert set(found["tasks"]) == set(SIZES)
    assert "subtasks" not in found
    entry = found["tasks"]["digits"]["acc"]
    assert (entry["n"], entry["source"], entry["difference"]) == (3, None, None)


def test_a_model_against_itself_differs_in_nothing_also_where_it_writes(checkpoint, task_dir):
    tasks = load(task_dir, "letters", "echo", limit=5, num_fewshot=2, seed=3)
    found = conmoe.evaluate_tasks(checkpoint("olmoe"), tasks, against=checkpoint("olmoe"))
    for metric in ("acc", "acc_norm"):
        assert found["tasks"]["letters"][metric]["difference"] == {"value": 0.0, "stderr": 0.0}
        assert found["tasks"]["letters"][metric]["mcnemar"] == {"only_model": 0, "only_source": 0, "p": 1.0}
    assert found["tasks"]["echo"]["exact_match"]["difference"] == {"value": 0.0, "stderr": 0.0}
    assert found["task_options"]["num_fewshot"] == 2


def test_answers_are_kept_by_what_they_depend_on(half, checkpoint, task_dir, tmp_path, monkeypatch):
    how = {"against": checkpoint("olmoe"), "work": tmp_path / "work"}
    first = conmoe.evaluate_tasks(half, load(task_dir, "letters", "digits", limit=4), **how)
    assert len(list((tmp_path / "work" / "tasks").iterdir())) == 4
    module = import_module("conmoe.evaluate.tasks")
    loaded = []
    real = module.load_whole

    def watched(folder, **options):
        loaded.append(folder)
        return real(folder, **options)

    monkeypatch.setattr(module, "load_whole", watched)
    assert conmoe.evaluate_tasks(half, load(task_dir, "letters", "digits", limit=4), **how) == first
    assert loaded == []
    other = tmp_path / "other"
    shutil.copytree(half, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "note": "another model"}))
    conmoe.evaluate_tasks(other, load(task_dir, "letters", "digits", limit=4), **how)
    assert loaded == [other]  # the source was not asked again
    conmoe.evaluate_tasks(half, load(task_dir, "letters", limit=5), **how)
    assert loaded == [other, checkpoint("olmoe"), half]
    rows = (task_dir.parent / "questions" / "letters.jsonl").read_text().replace("letters 0", "letters zero")
    (task_dir.parent / "questions" / "letters.jsonl").write_text(rows)
    assert load(task_dir, "letters", limit=5).keys != load(write_tasks(tmp_path / "as before"), "letters", limit=5).keys


def test_data_lies_in_the_folder_or_beside_it(checkpoint, tmp_path):
    keys = []
    for beside in (True, False):
        folder = write_tasks(tmp_path / str(beside), beside=beside)
        found = conmoe.evaluate_tasks(checkpoint("olmoe"), load(folder, "letters", limit=2))
        keys.append(found["tasks"]["letters"]["acc"]["n"])
    assert keys == [2, 2]


def test_what_cannot_be_asked_is_refused_in_a_sentence(task_dir, monkeypatch):
    (task_dir.parent / "questions" / "letters.jsonl").unlink()
    with pytest.raises(conmoe.UsageError, match=r"letters\.yaml reads questions/letters\.jsonl, which is neither in"):
        load(task_dir, "letters")
    with pytest.raises(conmoe.UsageError, match="no folder"):
        load(task_dir / "nowhere", "letters")
    with pytest.raises(conmoe.UsageError, match="No task is named"):
        load(task_dir)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(conmoe.UsageError, match=r'pip install "conmoe\[eval\]"'):
        load(task_dir, "digits")


def test_generators_and_bars_of_others_are_as_before(checkpoint, task_dir):
    tqdm = import_module("tqdm.std").tqdm

    bar, state, torch_state = tqdm.__init__, random.getstate(), torch.get_rng_state()
    conmoe.evaluate_tasks(checkpoint("olmoe"), load(task_dir, "letters", limit=2, num_fewshot=1))
    assert tqdm.__init__ is bar
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_the_command_line_prints_a_tidy_table_and_one_object(half, checkpoint, task_dir, tmp_path, capsys):
    run = runner(capsys)
    asked = ["evaluate", half, "--against", checkpoint("olmoe"), "--no-fidelity", "--tasks", "letters, all_signs"]
    asked += ["--task-dir", task_dir, "--limit", 8, "--output", tmp_path / "results" / "tasks.json"]
    done = run(*asked, "--json")
    assert done.code == 0
    assert set(done.json["tasks"]) == {"letters", "all_signs"}
    assert done.json == json.loads((tmp_path / "results" / "tasks.json").read_text())
    shown = run(*asked)
    assert "the first 8 documents of each" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    assert all(line.startswith(("read tasks ", "tasks, ")) for line in shown.err.splitlines())
    nothing = run("evaluate", half, "--no-fidelity")
    assert (nothing.code, "leaves nothing" in nothing.err) == (2, True)


@pytest.mark.slow
def test_an_unknown_task_is_named_with_its_neighbours_before_a_model_is_loaded(task_dir, checkpoint, capsys):
    done = runner(capsys)("evaluate", checkpoint("olmoe"), "--tasks", "leters", "--task-dir", task_dir)
    assert done.code == 2
    error = done.err.splitlines()[-1]
    assert error.startswith("Error: There is no task 'leters'; near matches: letters")
    assert "evaluate  " not in done.err


LM_EVAL = """
import sys
from lm_eval.__main__ import cli_evaluate
sys.argv = ["lm_eval", *sys.argv[1:]]
cli_evaluate()
assert "conmoe" not in sys.modules
"""


def lm_eval(folder, task_dir, tmp_path, *words):
    """What ``lm_eval run`` prints, in a process that never sees conmoe, and the score it found."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    command = [sys.executable, "-c", LM_EVAL, "run", "--model", "hf", "--device", "cpu", "--include_path", task_dir]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True", *words]
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=task_dir.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = next(line.split("|") for line in done.stdout.splitlines() if line.startswith("|letters"))
    return float(row[7])


def test_a_shared_result_answers_lm_eval_itself(half, task_dir, tmp_path):
    score = lm_eval(half, task_dir, tmp_path, "--tasks", "letters", "--limit", 8)
    ours = conmoe.evaluate_tasks(half, load(task_dir, "letters", limit=8))
    assert score == pytest.approx(ours["tasks"]["letters"]["acc"]["value"], abs=1e-4)
