"""Tasks of lm-evaluation-harness by name: its own, and those of a folder, whose data lies beside them.

Everything here happens before a model is loaded: names are known, data files are there, questions are read.
"""

from __future__ import annotations

import difflib
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conmoe.artifacts import fingerprint
from conmoe.documents import first_line
from conmoe.types import ConmoeError, UsageError

#: Near matches that an error names.
_NEAR = 5


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """How tasks are asked: the first ``limit`` documents of each (None: all), examples before each question (None: the
    task's own number), questions at a time, and the seed of what a task draws at random."""

    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks that were asked for, read and ready: what each name stands for, as lm-evaluation-harness's objects."""

    names: tuple[str, ...]
    tasks: Mapping[str, Any]  # every single task, by name
    groups: Mapping[str, Any]  # every group, those within groups too
    members: Mapping[str, tuple[str, ...]]  # the single tasks of each name asked for, and of each group
    options: TaskOptions
    keys: Mapping[str, str]  # a fingerprint of each single task: settings, questions, examples
    version: str  # of lm-evaluation-harness


def load_tasks(names: Sequence[str], task_dir: Path | None = None, options: TaskOptions = TaskOptions()) -> Tasks:
    """Find tasks, groups and tags by name, and read their questions.

    Args:
        names: as lm-evaluation-harness knows them, or as a file of ``task_dir`` names itself.
        task_dir: a folder of task files; they go before built-in ones of the same name. Their ``data_files`` are
            relative to the folder or to its parent, whichever holds them.
        options: how the tasks are asked.

    Raises:
        UsageError: an unknown task (near matches are named), a data file that is not there, or lm-evaluation-harness
            is not installed.
        ConmoeError: a task that cannot be read.
    """
    _require()
    if not names:
        raise UsageError("No task is named; give some: --tasks arc_easy,piqa.")
    if task_dir is not None and not task_dir.is_dir():
        raise UsageError(f"--task-dir {task_dir} is no folder.")
    import lm_eval
    from lm_eval.api.group import Group

    wanted = tuple(dict.fromkeys(names))
    with quiet(), seeded(options.seed):
        manager = _index(wanted, task_dir)
        found = {name: _load(manager, name, task_dir) for name in wanted}
        tasks: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        members: dict[str, tuple[str, ...]] = {}
        for name, loaded in found.items():
            tasks |= loaded["tasks"]
            groups |= loaded.get("groups", {})
            members[name] = tuple(loaded["tasks"])
        for group in groups.values():
            assert isinstance(group, Group)
            members[group.name] = tuple(task.task_name for task in group.get_all_tasks())
        for task in tasks.values():
            _set_examples(task, options.num_fewshot)
        keys = {name: _key(task, options) for name, task in tasks.items()}
    return Tasks(wanted, tasks, groups, members, options, keys, str(lm_eval.__version__))


def documents(task: Any, options: TaskOptions) -> int:
    """How many documents of a task are asked."""
    return min(options.limit or len(task.eval_docs), len(task.eval_docs))


@contextmanager
def quiet() -> Iterator[None]:
    """Without bars, log lines and prints of lm-evaluation-harness and what it stands on: they would bury a table."""
    tqdm: Any = import_module("tqdm.std").tqdm  # published without types
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "accelerate")]
    levels = [logger.level for logger in loggers]
    original = tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = silent  # some callers say disable=False, which no setting of tqdm overrules
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = original
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Tasks may draw from the global generators; they get a seed, and the generators their state back."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _require() -> None:
    try:
        import lm_eval  # noqa: F401  only whether it is there
    except ImportError as error:
        raise UsageError('Tasks need lm-evaluation-harness: pip install "conmoe[eval]".') from error


def _index(names: Sequence[str], task_dir: Path | None) -> Any:
    """A task manager that knows all names; the built-in tasks take ten seconds to list and are left out if they can."""
    from lm_eval.tasks import TaskManager

    if task_dir is not None:
        manager = TaskManager(include_path=str(task_dir), include_defaults=False)
        if all(_complete(manager, name) for name in names):
            return manager
    manager = TaskManager(include_path=str(task_dir) if task_dir else None)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, _NEAR, 0.5)
            hint = f"near matches: {', '.join(near)}" if near else "give --task-dir for tasks of your own"
            raise UsageError(f"There is no task {name!r}; {hint}.")
    return manager


def _complete(manager: Any, name: Any) -> bool:
    """Whether a name and everything that it stands for is in the index."""
    entry = manager.task_index.get(name) if isinstance(name, str) else None
    if entry is None:
        return False
    inner = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else sorted(entry.tags)
    if entry.kind.name not in ("GROUP", "TAG"):
        return True
    return isinstance(inner, list) and all(_complete(manager, each) for each in inner)


def _load(manager: Any, name: str, task_dir: Path | None) -> Any:
    if task_dir is not None:
        _resolve(manager, name, task_dir)
    try:
        return manager.load([name])
    except ConmoeError:
        raise
    except Exception as error:  # the hub, data sets and the task's own functions: anything may come
        hint = "" if task_dir else "; offline, --task-dir takes task files whose data lies beside them"
        raise ConmoeError(f"Task {name} cannot be read ({type(error).__name__}: {first_line(error)}){hint}.") from error


def _resolve(manager: Any, name: str, task_dir: Path) -> None:
    """Give the tasks of ``task_dir`` that ``name`` stands for the full paths of their data."""
    from lm_eval.tasks._yaml_loader import load_yaml

    index = manager.task_index
    entry = index.get(name)
    if entry is None:
        return
    if entry.kind.name in ("GROUP", "TAG"):
        inner = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else sorted(entry.tags)
        for each in inner or []:
            child = each if isinstance(each, str) else each.get("task") or each.get("group")
            if isinstance(child, str):
                _resolve(manager, child, task_dir)
    elif entry.yaml_path is not None and entry.yaml_path.is_relative_to(task_dir):
        config = load_yaml(entry.yaml_path, resolve_func=True)
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        if files:
            found = _full_paths(files, task_dir, entry.yaml_path)
            config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": found}
            index[name] = replace(entry, yaml_path=None, cfg=config)


def _full_paths(files: Any, task_dir: Path, task_file: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _full_paths(each, task_dir, task_file) for split, each in files.items()}
    if isinstance(files, list):
        return [_full_paths(each, task_dir, task_file) for each in files]
    if "://" in str(files) or Path(files).is_absolute():
        return files
    for folder in (task_dir, task_dir.parent):
        if (folder / files).is_file() or any(folder.glob(str(files))):
            return str((folder / files).resolve())
    raise UsageError(
        f"{task_file} reads {files}, which is neither in {task_dir} nor in {task_dir.resolve().parent}; put it there."
    )


def _set_examples(task: Any, wanted: int | None) -> None:
    """The number of examples before a question, by lm-evaluation-harness's own rules."""
    own = task.get_config("num_fewshot")
    if wanted is not None and own != 0:  # a task that says 0 itself cannot have any
        task.set_config(key="num_fewshot", value=wanted)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _key(task: Any, options: TaskOptions) -> str:
    asked = [doc for _, doc in zip(range(documents(task, options)), task.eval_docs, strict=False)]
    examples = list(task.fewshot_docs() or []) if task.get_config("num_fewshot") else []
    return fingerprint([task.dump_config(), asked, examples, options.limit, options.num_fewshot, options.seed])
