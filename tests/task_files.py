"""Tiny tasks of lm-evaluation-harness on disk: questions about letters whose answers no one can know."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

CHOICES = 4
SIZES = {"letters": 14, "digits": 9}

_CHOICE = """task: {name}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    test: {root}{name}.jsonl
    train: {root}{name}.jsonl
test_split: test
fewshot_split: train
tag: [signs]
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

_ECHO = """task: echo
dataset_path: json
dataset_kwargs:
  data_files:
    test: {root}letters.jsonl
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 3
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

_GROUP = """group: all_signs
task:
  - letters
  - digits
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 1.0
"""


def questions(name: str) -> list[dict[str, Any]]:
    draw = random.Random(name)

    def word() -> str:
        return "".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 6)))

    return [
        {
            "question": f"{name} {number}: {word()} {word()}?",
            "choices": [word() for _ in range(CHOICES)],
            "answer": draw.randrange(CHOICES),
        }
        for number in range(SIZES[name])
    ]


def write_tasks(folder: Path, *, beside: bool = True) -> Path:
    """A folder of task files; their data lies in a folder beside it, or in one within it."""
    tasks = folder / "tasks"
    data = (folder if beside else tasks) / "questions"
    for each in (tasks, data):
        each.mkdir(parents=True)
    for name in SIZES:
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(name)))
        (tasks / f"{name}.yaml").write_text(_CHOICE.format(name=name, root="questions/"))
    (tasks / "echo.yaml").write_text(_ECHO.format(root="questions/"))
    (tasks / "all_signs.yaml").write_text(_GROUP)
    return tasks
