"""What is written: the tensors that were tuned, all others as bytes, and what lies beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from conmoe.apply import PLAN_FOLDER, SHARD_BYTES
from conmoe.artifacts import LABEL, plan_fingerprint, write_json, write_plan
from conmoe.checkpoint import split_parameter
from conmoe.compress import RESULTS
from conmoe.manifest import RESULT_MANIFEST, SourceRecord, read_result_manifest, seal
from conmoe.progress import Progress
from conmoe.report.escape import one_line
from conmoe.report.sections import EVALUATIONS, write_card
from conmoe.shards import DTYPES, INDEX, Held, Output, raw_chunks, tensor_output, write_shards
from conmoe.source import Source
from conmoe.tune.pruning import cut_config
from conmoe.types import ConmoeError, Plan

MANIFEST_NAME, EVALUATIONS_NAME = Path(RESULT_MANIFEST).name, Path(EVALUATIONS).name


def write(source: Source, weights: Mapping[str, Tensor], folder: Path, progress: Progress) -> int:
    """The shards of the result; their bytes."""
    outputs = list(_outputs(source, weights))
    total = sum(output.nbytes for output in outputs)
    with progress.stage("write", total, "bytes") as advance:
        write_shards(outputs, folder, SHARD_BYTES, advance)
    return total


def _outputs(source: Source, weights: Mapping[str, Tensor]) -> Iterator[Output]:
    """Every tensor of the checkpoint in its order: tuned, or as it was."""
    shares = {
        entry.name: share
        for target, weight in weights.items()
        for entry, share in split_parameter(source.layout, target, weight)
    }
    for name, entry in source.entries.items():
        if name in shares:
            share = shares[name]
            yield tensor_output(name, entry.dtype, share.shape, partial(_rounded, entry, share))
        else:
            yield Output(name, entry.dtype, entry.shape, entry.nbytes, partial(raw_chunks, entry))


def _rounded(entry: Held, share: Tensor) -> Tensor:
    value = share.to(DTYPES[entry.dtype])
    if not bool(torch.isfinite(value).all()):
        raise ConmoeError(f"{entry.name} came out of tuning with numbers that are not finite; lower the learning rate.")
    return value


def copy_rest(model: Path, folder: Path, out: Path) -> None:
    """Configuration, tokenizer, modelling files, plan: all but weights, card and what is said of the old weights."""
    for file in sorted(model.iterdir()):
        if file.is_file() and file.suffix != ".safetensors" and file.name not in (LABEL, INDEX, "README.md"):
            shutil.copy(file, folder / file.name)
    for name in (PLAN_FOLDER, CHAT_TEMPLATE_DIR):
        if (model / name).is_dir():
            shutil.copytree(model / name, folder / name, dirs_exist_ok=True, ignore=_of_old_weights)
    if (model / PLAN_FOLDER / RESULTS).is_file():
        results = json.loads((model / PLAN_FOLDER / RESULTS).read_text())
        write_json(folder / PLAN_FOLDER / RESULTS, {**results, "output": str(out), "fidelity": None})


def _of_old_weights(folder: str, names: list[str]) -> list[str]:
    """What was measured of the checkpoint before it was tuned, and the list of its files."""
    if Path(folder).name != PLAN_FOLDER:
        return []
    return [name for name in names if name in (MANIFEST_NAME, EVALUATIONS_NAME) or name.startswith("report.")]


def finish(model: Path, folder: Path, plan: Plan) -> None:
    """The card with what was measured after the tuning, and the manifest."""
    write_card(folder, f"{one_line(model.name)}-tuned")
    source = SourceRecord(name=one_line(model.name), fingerprint=plan.source)
    form = str(plan.default_form)
    with suppress(ConmoeError):  # a checkpoint that another version wrote has no manifest
        before = read_result_manifest(model)
        source, form = before.source, before.form
    seal(folder, source, plan_fingerprint(plan), form)


def write_cut(source: Source, plan: Plan, folder: Path, written: int) -> None:
    """What says of a pruned checkpoint how large it is: its configuration, its plan, its record."""
    config = json.loads((folder / "config.json").read_text())
    changed = json.dumps(cut_config(config, source, plan), indent=2, sort_keys=True)
    (folder / "config.json").write_text(changed + "\n")
    write_plan(folder / PLAN_FOLDER, plan, weights=False)
    if (folder / PLAN_FOLDER / RESULTS).is_file():
        results = json.loads((folder / PLAN_FOLDER / RESULTS).read_text())
        write_json(folder / PLAN_FOLDER / RESULTS, {**results, "bytes": written})
