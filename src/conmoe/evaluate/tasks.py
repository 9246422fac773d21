"""Benchmark tasks through lm-evaluation-harness: a model beside its source, over the same documents.

Each task is asked and scored by lm-evaluation-harness; values and standard errors are its own. What it does not have is
the comparison: the score of every document is kept for both models, and the difference is taken document by document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError

from conmoe.artifacts import Record, checkpoint_fingerprint, fingerprint, write_atomic
from conmoe.data import load_tokenizer
from conmoe.documents import first_line
from conmoe.evaluate.fidelity import Measured
from conmoe.evaluate.paired import as_json, difference, discordant, mean, weighted
from conmoe.evaluate.task_files import TaskOptions, Tasks, documents, quiet, seeded
from conmoe.parallel import refuse_several
from conmoe.progress import SILENT, Progress
from conmoe.types import ConmoeError
from conmoe.whole import check_whole, load_whole

#: Draws for the standard error of a metric that is no mean (F1, BLEU).
_BOOTSTRAP = 1000
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class Answers(Record):
    """One model's answers to one task: what lm-evaluation-harness makes of them, and the score of every document."""

    scores: dict[str, tuple[float, float | None]]  # metric -> value, standard error
    higher_is_better: dict[str, bool]
    row: dict[str, Any]  # lm-evaluation-harness's own numbers, which groups are made from
    prompts: tuple[str, ...]  # a hash of each document's prompt
    documents: dict[str, tuple[float, ...]]  # metric -> the score of each document, where these are numbers


@dataclass(frozen=True, slots=True)
class _Side:
    """A model that is to answer, and how it is loaded."""

    folder: Path
    name: str  # model or source
    device: str
    dtype: torch.dtype | None
    trust_remote_code: bool


def evaluate_tasks(
    model: Path,
    tasks: Tasks,
    *,
    against: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    work: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Ask tasks of a model, and of its source, and compare them document by document.

    Args:
        model: a checkpoint, compressed or not; it is loaded whole.
        tasks: from :func:`conmoe.load_tasks`.
        against: the source checkpoint to compare with; loaded before the model, not beside it.
        device: where to compute.
        dtype: in which to compute; by default each checkpoint's own.
        trust_remote_code: run modelling code that comes with a checkpoint.
        work: a folder that keeps the answers of each model to each task, by what they depend on; what is there is not
            asked again.
        progress: where the stages report to.

    Returns:
        ``tasks``: name -> metric -> value, standard error, documents, and the source's and the difference;
        ``subtasks``: the same of what a group consists of; ``task_options``: how they were asked.
    """
    refuse_several("evaluate --tasks")
    sides = [_Side(model, "model", device, dtype, trust_remote_code)]
    if against is not None:
        sides.insert(0, _Side(against, "source", device, dtype, trust_remote_code))
    answers = {side.name: _answers(side, tasks, work, progress) for side in sides}
    source = answers.get("source")
    asked: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for name in tasks.names:
        members = tasks.members[name]
        if name in tasks.tasks:
            asked[name] = _compare(name, answers["model"], source)
            continue
        inner = {each: _compare(each, answers["model"], source) for each in members}
        if name in tasks.groups:
            asked[name] = _compare_group(tasks.groups[name], members, answers["model"], source)
            inner |= {
                each: _compare_group(group, tasks.members[each], answers["model"], source)
                for each, group in tasks.groups.items()
                if each != name and set(tasks.members[each]) < set(members)
            }
            parts[name] = inner
        if not asked.get(name):  # a tag, and some groups, are lists of tasks without a score of their own
            asked = {each: found for each, found in asked.items() if found} | inner
    options = tasks.options
    how = {"limit": options.limit, "num_fewshot": options.num_fewshot, "seed": options.seed, "lm_eval": tasks.version}
    return {"tasks": asked, **({"subtasks": parts} if parts else {}), "task_options": how}


def _answers(side: _Side, tasks: Tasks, work: Path | None, progress: Progress) -> dict[str, Answers]:
    source = check_whole(side.folder, trust_remote_code=side.trust_remote_code)
    tokenizer = [path for name in _TOKENIZER if (path := side.folder / name).is_file()]
    name = checkpoint_fingerprint(side.folder, [*source.files, *tokenizer])
    how = [name, str(side.dtype), side.device.partition(":")[0], tasks.version, transformers.__version__]
    files = {each: _file(work, [*how, key]) for each, key in tasks.keys.items()}
    found = {each: answers for each, file in files.items() if file and (answers := _read(file))}
    missing = [each for each in tasks.tasks if each not in found]
    if not missing:
        progress.note(f"The answers of {side.folder.name} to all tasks are in {work}; not asked again.")
        return found
    total = sum(documents(tasks.tasks[each], tasks.options) for each in missing)
    with progress.stage(f"tasks, {side.name}", total, "documents") as advance, quiet():
        lm = _language_model(side, tasks.options)
        for each in missing:
            advance(0, doing=f"{side.name}: {each}")
            found[each] = _ask(lm, tasks, each)
            if file := files[each]:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, found[each].model_dump_json())
            advance(documents(tasks.tasks[each], tasks.options))
    return found


def _file(work: Path | None, key: list[str]) -> Path | None:
    return work / "tasks" / f"{fingerprint(key)[:32]}.json" if work else None


def _read(file: Path) -> Answers | None:
    """The answers kept in a file, if there are any of the present form."""
    try:
        return Answers.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _language_model(side: _Side, options: TaskOptions) -> Any:
    from lm_eval.models.huggingface import HFLM

    loaded = load_whole(side.folder, device=side.device, dtype=side.dtype, trust_remote_code=side.trust_remote_code)
    tokenizer = load_tokenizer(side.folder, trust_remote_code=side.trust_remote_code)
    return HFLM(pretrained=loaded, tokenizer=tokenizer, backend="causal", batch_size=options.batch_size)


def _ask(lm: Any, tasks: Tasks, name: str) -> Answers:
    from lm_eval.evaluator import evaluate

    task, options = tasks.tasks[name], tasks.options
    task.set_fewshot_seed(options.seed)  # the same examples for the next model
    try:
        with seeded(options.seed):
            found = evaluate(
                lm=lm,
                task_dict={"tasks": {name: task}},
                limit=options.limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=True,
            )
    except Exception as error:  # a task may run any code
        raise ConmoeError(
            f"Task {name} failed in lm-evaluation-harness: {type(error).__name__}: {first_line(error)}."
        ) from error
    return _collect(found["results"][name], found["samples"][name], found["higher_is_better"][name])


def _collect(row: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], better: Mapping[str, Any]) -> Answers:
    """The numbers of one task; lm-evaluation-harness names them ``metric,filter`` and ``metric_stderr,filter``."""
    scores: dict[str, tuple[float, float | None]] = {}
    scored: dict[str, tuple[float, ...]] = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = row.get(f"{metric}_stderr,{kind}")
        scores[key] = float(value), float(stderr) if isinstance(stderr, int | float) else None
        each = [sample.get(metric) for sample in samples if sample["filter"] == kind]
        if all(isinstance(score, bool | int | float) for score in each):
            scored[key] = tuple(float(score) for score in each if score is not None)
    plain = {key: float(value) if isinstance(value, float) else value for key, value in row.items()}
    plain = {key: value for key, value in plain.items() if isinstance(value, str | int | float)}
    prompts = {sample["doc_id"]: str(sample["prompt_hash"]) for sample in samples}
    higher = {key: bool(better.get(key.partition(",")[0], True)) for key in scores}
    return Answers(scores=scores, higher_is_better=higher, row=plain, prompts=tuple(prompts.values()), documents=scored)


def _compare(name: str, model: Mapping[str, Answers], source: Mapping[str, Answers] | None) -> dict[str, Any]:
    ours, theirs = model[name], source[name] if source else None
    if theirs and ours.prompts != theirs.prompts:
        raise ConmoeError(f"The two models were asked different prompts in task {name}; they cannot be compared.")
    found = {}
    for metric, (value, stderr) in ours.scores.items():
        scored = ours.documents.get(metric, ())
        entry = _entry(value, stderr, len(ours.prompts), ours.higher_is_better[metric])
        if theirs:
            entry["source"] = _number(*theirs.scores[metric])
            paired = _is_mean(ours, metric) and _is_mean(theirs, metric)
            other = theirs.documents[metric] if paired else ()
            away = as_json(difference(scored, other)) if paired else _number(value - theirs.scores[metric][0], None)
            entry |= {"difference": away, **(_mcnemar([(scored, other)]) if paired else {})}
        found[_plain(metric)] = entry
    return found


def _compare_group(
    group: Any, members: Sequence[str], model: Mapping[str, Answers], source: Mapping[str, Answers] | None
) -> dict[str, Any]:
    """A group's score is a mean of its tasks' scores; its difference is the same mean of their differences."""
    row = group.aggregate({name: model[name].row for name in members})
    other = group.aggregate({name: source[name].row for name in members}) if source else {}
    found = {}
    for rule in group.aggregate_metric_list or []:
        for metric in (key for key in row if key.startswith(f"{rule.metric},")):
            having = [name for name in members if metric in model[name].scores]
            stderr = f"{rule.metric}_stderr,{metric.partition(',')[2]}"
            n = sum(len(model[name].prompts) for name in having)
            entry = _entry(row[metric], row.get(stderr), n, model[having[0]].higher_is_better[metric])
            if source:
                entry["source"] = _number(other[metric], other.get(stderr))
                entry |= _group_difference(having, metric, rule.weight_by_size, model, source)
            found[_plain(metric)] = entry
    return found


def _group_difference(
    names: Sequence[str], metric: str, by_size: bool, model: Mapping[str, Answers], source: Mapping[str, Answers]
) -> dict[str, Any]:
    if not all(_is_mean(side[name], metric) for name in names for side in (model, source)):
        return {"difference": None}
    pairs = [(model[name].documents[metric], source[name].documents[metric]) for name in names]
    parts: list[Measured] = [difference(*pair) for pair in pairs]
    weights = [float(len(ours)) if by_size else 1.0 for ours, _ in pairs]
    return {"difference": as_json(weighted(parts, weights)), **_mcnemar(pairs)}


def _mcnemar(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[str, Any]:
    """Documents that one of the two models got right, over all pairs; nothing unless all scores are 0 or 1."""
    found = discordant([a for ours, _ in pairs for a in ours], [b for _, theirs in pairs for b in theirs])
    if found is None:
        return {}
    return {"mcnemar": {"only_model": found.only_model, "only_source": found.only_source, "p": found.p}}


def _is_mean(answers: Answers, metric: str) -> bool:
    """Whether the task's score is the mean of its documents' scores, so that a difference has a standard error."""
    scored = answers.documents.get(metric, ())
    if len(scored) != len(answers.prompts) or not scored:
        return False
    return abs(mean(scored).value - answers.scores[metric][0]) < 1e-9


def _entry(value: float, stderr: Any, n: int, higher_is_better: bool) -> dict[str, Any]:
    return {
        **_number(value, stderr),
        "n": n,
        "higher_is_better": higher_is_better,
        "source": None,
        "difference": None,
    }


def _number(value: float, stderr: Any) -> dict[str, Any]:
    return as_json(Measured(float(value), float(stderr) if isinstance(stderr, int | float) else float("nan")))


def _plain(metric: str) -> str:
    """``acc,none`` -> ``acc``; another filter stays in the name."""
    return metric.removesuffix(",none")
