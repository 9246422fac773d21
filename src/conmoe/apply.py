"""A plan and a checkpoint in, a smaller checkpoint out: tensor by tensor, in the memory of one scope at most.

A prototype that is a kept expert is copied as bytes. Only mixtures and new weights are computed, in float32, and cast
once. The names on disk, and their order, stay those of the source family.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.utils.hub import CHAT_TEMPLATE_DIR

from conmoe import runtime
from conmoe.artifacts import (
    LABEL,
    building,
    checkpoint_fingerprint,
    fingerprint,
    plan_fingerprint,
    read_plan,
    refuse_overlap,
    write_plan,
)
from conmoe.folding import fold
from conmoe.forms import check_form, departures, sliced_counts
from conmoe.lowprec import renumbered_modules
from conmoe.manifest import SourceRecord, seal
from conmoe.moe import count_field
from conmoe.mtp import NO_HEAD, Policy, Settled, head_experts, settle, stated, without_heads
from conmoe.outputs import expert_places, forget_prototypes, plan_outputs
from conmoe.registry import Form
from conmoe.report.card import model_card
from conmoe.report.numbers import size
from conmoe.report.origin import origin
from conmoe.shards import (
    write_shards,
)
from conmoe.source import Source, check_compressible, open_source
from conmoe.types import ConmoeError, Plan, UsageError

PLAN_FOLDER = "conmoe"
SHARD_BYTES = 4 * 2**30
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".tmp")
_OWN_FILES = (LABEL, "config.json", "README.md", "model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class Applied:
    """What was written."""

    folder: Path
    form: Form
    bytes: int
    source_bytes: int
    dropped: tuple[str, ...]  # tensors of the source that the result leaves out on purpose, beside experts
    heads: Settled = NO_HEAD  # what became of heads that predict further tokens


def apply(
    model: Path,
    plan: Plan | Path,
    out: Path,
    *,
    form: Form | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    mtp: Policy = "auto",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Applied:
    """Write the checkpoint that ``plan`` describes.

    Args:
        model: the source checkpoint; never written to.
        plan: a plan, or the folder that holds one.
        out: the folder to write, built as ``OUT.partial``; a killed run goes on at the first unfinished shard.
        form: ``shared``, ``sliced`` or ``expanded``; by default what suits the plan's method.
        force: replace ``out`` if it exists.
        trust_remote_code: run modelling code that comes with the source.
        mtp: what becomes of heads that predict further tokens: :mod:`conmoe.mtp`.
        advance: called with the bytes written since the last call, and the bytes to write in all.

    Raises:
        UsageError: the plan belongs to another checkpoint, or the form cannot hold it.
    """
    plan = read_plan(plan) if isinstance(plan, Path) else plan
    with applying(
        model, plan, out, form=form, force=force, trust_remote_code=trust_remote_code, mtp=mtp, advance=advance
    ) as applied:
        return replace(applied, folder=out)


@contextmanager
def applying(
    model: Path,
    plan: Plan,
    out: Path,
    *,
    form: Form | None,
    force: bool,
    trust_remote_code: bool,
    mtp: Policy = "auto",
    advance: Callable[[int, int], None],
) -> Iterator[Applied]:
    """Like :func:`apply`, but the folder gets its name when the context ends; until then it can be looked at."""
    source = open_source(model, trust_remote_code=trust_remote_code)
    form = form or plan.default_form  # type: ignore[assignment]
    assert form is not None
    check_plan(source, plan)
    check_form(source.layers, plan, form)
    outputs, dropped = plan_outputs(source, plan, form)
    config = result_config(source, plan, form)
    heads = settle_heads(source, config, form, mtp)
    if heads.dropped:
        config |= without_heads(source, config)
    if source.scheme:
        places, staying = expert_places(source, plan, form), head_experts(source, heads)
        config["quantization_config"] = renumbered_modules(config["quantization_config"], places, staying)
    outputs, dropped = [*outputs, *heads.outputs], (*dropped, *heads.dropped)
    total = sum(output.nbytes for output in outputs)
    key = fingerprint([plan_fingerprint(plan), form, heads.policy])
    refuse_overlap(out, model)
    with building(out, force=force, key=key) as partial_folder:
        check_space(partial_folder, total)
        hashes = write_shards(outputs, partial_folder, SHARD_BYTES, lambda nbytes: advance(nbytes, total))
        forget_prototypes()
        _write_rest(source, plan, form, config, partial_folder)
        whole = sum(entry.nbytes for entry in source.entries.values())
        yield Applied(partial_folder, form, total, whole, dropped, heads)
        come_from = origin(source.folder)
        made_from = SourceRecord(name=come_from.name, revision=come_from.revision, fingerprint=plan.source)
        seal(partial_folder, made_from, plan_fingerprint(plan), form, known=hashes)


def check_plan(source: Source, plan: Plan) -> None:
    """Raise unless ``plan`` was made for this very checkpoint and covers its MoE layers."""
    check_compressible(source)
    name = checkpoint_fingerprint(source.folder, source.files)
    if plan.source != name:
        raise UsageError(f"The plan was made for another checkpoint than {source.folder}; plan again for this one.")
    by_index = {layer.index: layer for layer in source.layers}
    for scope in plan.scopes:
        for index in scope.layers:
            if index not in by_index:
                raise UsageError(f"The plan names layer {index}, which has no experts in {source.folder}.")
        if scope.plan.assignment_E.numel() != sum(by_index[index].logical for index in scope.layers):
            raise UsageError(f"The plan for layer {scope.layers[0]} has another number of experts than the checkpoint.")


def check_space(folder: Path, needed: int) -> None:
    """Raise if the disk cannot hold ``needed`` bytes more (what a killed run already wrote there is counted)."""
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if free < needed - there:
        raise ConmoeError(
            f"The disk of {folder.parent} has {size(free)} free, the result needs {size(needed - there)} more."
        )


def settle_heads(source: Source, config: Mapping[str, Any], form: Form, mtp: Policy) -> Settled:
    """What becomes of heads that predict further tokens, in a result with this configuration."""
    count = int(config[stated(source, config, count_field(source.config))[0]]) if form != "expanded" else 0
    return settle(source, count, mtp, whole=form == "expanded")


def result_config(source: Source, plan: Plan, form: Form) -> dict[str, Any]:
    """The config.json of the result."""
    config: dict[str, Any] = json.loads((source.folder / "config.json").read_text())
    if form == "expanded":
        return config
    counts = stated(source, config, count_field(source.config))
    if form == "sliced":
        (left,) = sliced_counts(source.layers, plan)
        return {**config, **fold(source, plan).changes, **dict.fromkeys(counts, left)}
    logical = source.layers[0].logical
    pools = _pools(source, plan)
    sizes = [count for _, count in pools.values()] if pools else [plan.scopes[0].plan.mixing_KE.shape[0]]
    return runtime.shared_config(
        config | dict.fromkeys(counts, logical),
        source.config.model_type,
        type(source.model).__name__,
        prototypes=max(sizes),
        logical=logical,
        pools=pools,
        departures=_departures(source, plan),
    )


def _write_rest(source: Source, plan: Plan, form: Form, config: Mapping[str, Any], out: Path) -> None:
    """Configuration, tokenizer, licence and everything else beside the weights, the plan, and the model card."""
    copy_beside(source.folder, out)
    if form == "shared":
        for file in runtime.packaged_files(source.config.model_type):
            shutil.copy(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / PLAN_FOLDER).mkdir(exist_ok=True)
    write_plan(out / PLAN_FOLDER, plan, weights=False)
    (out / "README.md").write_text(model_card(source.folder, plan, form, config))


def copy_beside(folder: Path, out: Path) -> None:
    """Tokenizer, licence and everything else in ``folder`` beside weights, configuration and model card."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_FILES) and file.name not in _OWN_FILES:
            shutil.copy(file, out / file.name)
    if (folder / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(folder / CHAT_TEMPLATE_DIR, out / CHAT_TEMPLATE_DIR, dirs_exist_ok=True)


def _departures(source: Source, plan: Plan) -> dict[int, dict[str, Any]]:
    scope_of = {index: scope for scope in plan.scopes for index in scope.layers}
    found = {layer.index: departures(layer, scope_of.get(layer.index)) for layer in source.layers}
    return {index: departure for index, departure in found.items() if departure}


def _pools(source: Source, plan: Plan) -> dict[int, tuple[int, int]] | None:
    """Which layer owns the pool of each layer, and its size; None where each has its own and all are equal."""
    sizes = {scope.plan.mixing_KE.shape[0] for scope in plan.scopes}
    planned = {index for scope in plan.scopes for index in scope.layers}
    whole = planned == {layer.index for layer in source.layers}
    if whole and len(sizes) == 1 and all(len(scope.layers) == 1 for scope in plan.scopes):
        return None
    pools = {layer.index: (layer.index, layer.logical) for layer in source.layers}
    for scope in plan.scopes:
        for index in scope.layers:
            pools[index] = (scope.layers[0], scope.plan.mixing_KE.shape[0])
    return pools
