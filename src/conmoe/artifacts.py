"""Statistics and plans on disk: safetensors beside readable JSON, written whole or not at all, never pickled.

Every file names what it was made from. A fingerprint is a SHA-256: of a checkpoint's configuration, headers and
samples of its data (reading 60 GB to name them would cost more than calibrating), of token ids, of a manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from conmoe.types import (
    ConmoeError,
    LayerPlan,
    LayerStatistics,
    Plan,
    ScopePlan,
    TokenSample,
    UsageError,
    sample_tensors,
)

FORMAT = 1
MANIFEST = "manifest.json"
TOKENS = "tokens.safetensors"
PLAN_JSON, PLAN_TENSORS = "plan.json", "plan.safetensors"
_BLOCKS, _BLOCK = 16, 65536
#: Lies in every folder that conmoe writes, and names what the folder is made from; a folder without it is not ours.
LABEL = ".conmoe"


class Record(BaseModel):
    """A readable file's contents: checked, frozen, nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")


R = TypeVar("R", bound="Record")


class Manifest(Record):
    """What a folder of statistics was made from."""

    format: int = FORMAT
    version: str
    model: str  # fingerprint of the checkpoint
    family: str
    layers: tuple[int, ...]  # decoder layers with experts
    experts: int
    top_k: int
    tokens: int
    seq_len: int
    sample: int
    seed: int
    dtype: str
    data: tuple[str, ...]  # what was read, one line each
    data_fingerprint: str
    documents: tuple[str, ...] = ()  # short hashes, so that an evaluation on the same text can be noticed

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.model_dump())


class ScopeRecord(Record):
    """One scope of a plan, for people."""

    layers: tuple[int, ...]
    experts: int
    prototypes: int
    kept: tuple[int | None, ...]  # the source expert of each prototype; null for a mixture
    assignment: tuple[int, ...]
    predicted_error: float | None
    skip: float = 0.0
    new_weights: tuple[str, ...] = ()  # tensors that are neither copies nor mixtures of the source's


class PlanRecord(Record):
    """``plan.json``: everything about a plan but its tensors."""

    format: int = FORMAT
    version: str
    method: str
    options: dict[str, Any]
    keep: str
    default_form: str
    protected: dict[int, tuple[int, ...]]
    source: str
    statistics: str
    budget: str = "uniform"
    budget_options: dict[str, Any] = {}
    refine: str = "none"
    refine_options: dict[str, Any] = {}
    sequential: int = 0
    scopes: tuple[ScopeRecord, ...]


def fingerprint(value: Any) -> str:
    """The SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def checkpoint_fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """Name a checkpoint by its configuration and, of each file, size, header and sixteen blocks across the data."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(files)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            header = stream.read(8)
            digest.update(header + stream.read(min(int.from_bytes(header, "little"), size)))
            for block in range(_BLOCKS):
                stream.seek(size * block // _BLOCKS)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a small file so that it is either the old one or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a value with :func:`write_atomic`; numbers that are not finite become null."""
    write_atomic(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A JSON value with null in place of numbers that are not finite, for which JSON has no words."""
    if isinstance(value, dict):
        return {str(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def read_measured(file: Path | None) -> dict[str, Any]:
    """What :func:`write_json` kept by name, NaN for the numbers that became null; nothing where there is no file."""
    kept = json.loads(file.read_text()) if file and file.is_file() else {}
    return {name: math.nan if value is None else value for name, value in kept.items()}


@contextmanager
def building(out: Path, *, force: bool = False, key: str = "") -> Iterator[Path]:
    """Build a folder as ``OUT.partial`` and give it its name at the end.

    A partial folder left by a killed run is taken up again if it was begun for the same ``key``, else cleared.

    Raises:
        UsageError: ``out`` exists and ``force`` is not given.
    """
    check_free(out, force=force)
    partial, retired = partial_of(out), out.with_name(out.name + ".replaced")
    for ours in (partial, retired):
        check_ours(ours)
    if partial.exists() and read_text(partial / LABEL) != key:
        remove(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_atomic(partial / LABEL, key)
    yield partial
    remove(retired)
    if out.exists():
        os.replace(out, retired)
    os.replace(partial, out)
    remove(retired)


def remove(folder: Path) -> None:
    """Delete a folder of ours, its label last, so that a kill on the way does not leave a stranger behind."""
    if folder.exists():
        for child in folder.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            elif child.name != LABEL:
                child.unlink()
        shutil.rmtree(folder)


def spoil(partial: Path) -> None:
    """Make sure that the next run does not go on from ``partial`` but begins anew."""
    write_atomic(partial / LABEL, "spoiled")


def check_free(out: Path, *, force: bool) -> None:
    """Raise a UsageError if something is in the way of ``out``; with ``force``, if it is not conmoe's to delete."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise UsageError(f"{out} exists; choose another name, or --force to replace it.")
    if out.is_symlink() or not out.is_dir():
        kind = "link" if out.is_symlink() else "file"
        raise UsageError(f"{out} is a {kind}; conmoe writes a folder there and replaces nothing else.")
    check_ours(out)


def check_ours(folder: Path) -> None:
    """Raise a UsageError if ``folder`` holds anything and was not written by conmoe: it is not ours to delete."""
    if not folder.exists() or (folder / LABEL).is_file():
        return
    if any(not child.name.startswith(LABEL) for child in folder.iterdir()):
        raise UsageError(f"{folder} was not written by conmoe, which does not replace it; choose another name.")


def refuse_overlap(out: Path, model: Path) -> None:
    """Raise if writing ``out`` would touch the source."""
    new, old = out.resolve(), model.resolve()
    if new == old or new in old.parents or old in new.parents:
        raise UsageError(f"{out} is, holds or lies in the source {model}; choose another place.")


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05}.safetensors"


def write_layer(folder: Path, layer: int, statistics: LayerStatistics) -> None:
    """Store one layer's statistics, atomically."""
    tensors = {f"sum.{name}": value for name, value in statistics.sums.items()}
    tensors |= {f"sample.{name}": value for name, value in sample_tensors(statistics.sample).items()}
    write_atomic(layer_file(folder, layer), _serialize(tensors, {"tokens": str(statistics.tokens)}))


def read_layer(folder: Path, layer: int) -> LayerStatistics:
    """Load one layer's statistics."""
    tensors, metadata = _read_tensors(layer_file(folder, layer))
    sums = {name.removeprefix("sum."): value for name, value in tensors.items() if name.startswith("sum.")}
    sample = {
        name: tensors[f"sample.{name}"] for name in TokenSample.__dataclass_fields__ if f"sample.{name}" in tensors
    }
    owner = torch.zeros(len(sums["count"]), dtype=torch.int64)
    return LayerStatistics(int(metadata["tokens"]), sums, TokenSample(**sample), owner)


def write_tokens(folder: Path, ids_NS: Tensor) -> None:
    """Store the calibration tokens, for those who have to run the model again."""
    write_atomic(folder / TOKENS, _serialize({"ids_NS": ids_NS.to(torch.int32)}))


def read_tokens(folder: Path) -> Tensor:
    """The token sequences that a folder of statistics was calibrated on, ``ids_NS`` in int64.

    Raises:
        UsageError: they are not there (statistics of sequences of different lengths were merged).
    """
    if not (folder / TOKENS).is_file():
        raise UsageError(f"{folder} does not hold its calibration tokens; calibrate on all the text at once.")
    return _read_tensors(folder / TOKENS)[0]["ids_NS"].long()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of statistics.

    Raises:
        UsageError: the folder holds no finished statistics.
    """
    return _read_record(Manifest, folder / MANIFEST, "statistics; make them with conmoe calibrate")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def write_plan(folder: Path, plan: Plan, *, weights: bool = True) -> None:
    """Store a plan in an existing folder: ``plan.json``, ``plan.safetensors``, and the new weights of each scope.

    ``weights=False`` leaves the new weights out, for the copy of a plan that travels with its result: they may be as
    large as the result itself, which holds them.
    """
    if weights:
        for scope in plan.scopes:
            if scope.plan.weights:
                _write_tensors(_weights_file(folder, scope.layers[0]), scope.plan.weights)
    write_atomic(folder / PLAN_TENSORS, _serialize(_plan_tensors(plan)))
    write_atomic(folder / PLAN_JSON, plan_record(plan).model_dump_json(indent=2) + "\n")


def plan_fingerprint(plan: Plan) -> str:
    """Name a plan by everything in it: the readable half alone does not tell two mixtures apart."""
    digest = hashlib.sha256()
    weights = ((f"{scope.layers}.{name}", value) for scope in plan.scopes for name, value in scope.plan.weights.items())
    for name, value in sorted([*_plan_tensors(plan).items(), *weights], key=lambda item: item[0]):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return fingerprint([plan_record(plan).model_dump(), digest.hexdigest()])


def _weights_file(folder: Path, layer: int) -> Path:
    return folder / f"weights-{layer:05}.safetensors"


def _plan_tensors(plan: Plan) -> dict[str, Tensor]:
    """Everything but new weights."""
    tensors: dict[str, Tensor] = {}
    for i, scope in enumerate(plan.scopes):
        layer = scope.plan
        tensors |= {f"{i}.assignment": layer.assignment_E, f"{i}.mixing": layer.mixing_KE, f"{i}.gain": layer.gain_E}
        tensors |= {f"{i}.{name}": value for name, value in _optional(layer).items()}
        tensors |= {f"{i}.scores.{name}": value for name, value in layer.scores.items()}
    return tensors


def _optional(plan: LayerPlan) -> dict[str, Tensor]:
    """What only some plans have."""
    found = {"constant": plan.constant_CD, "static": plan.static_K, "router": plan.router_KD}
    return {name: value for name, value in found.items() if value is not None}


def plan_record(plan: Plan) -> PlanRecord:
    """The readable half of a plan."""
    scopes = tuple(
        ScopeRecord(
            layers=scope.layers,
            experts=scope.plan.assignment_E.numel() // len(scope.layers),
            prototypes=scope.plan.mixing_KE.shape[0],
            kept=tuple(kept_experts(scope.plan)),
            assignment=tuple(scope.plan.assignment_E.tolist()),
            predicted_error=None
            if scope.plan.predicted_error != scope.plan.predicted_error
            else scope.plan.predicted_error,
            skip=scope.plan.skip,
            new_weights=tuple(sorted(scope.plan.weights)),
        )
        for scope in plan.scopes
    )
    fields = {name: getattr(plan, name) for name in PlanRecord.model_fields if name not in ("format", "scopes")}
    copied = {name: dict(fields[name]) for name in ("options", "budget_options", "refine_options", "protected")}
    return PlanRecord(**{**fields, **copied}, scopes=scopes)


def kept_experts(plan: LayerPlan) -> list[int | None]:
    """For each prototype the source expert it is a copy of, or None if it is a mixture or has new weights."""
    if not len(plan.mixing_KE):
        return []
    one_hot = ((plan.mixing_KE != 0).sum(1) == 1) & (plan.mixing_KE.max(1).values == 1)
    expert = plan.mixing_KE.argmax(1)
    return [int(e) if single and not plan.weights else None for e, single in zip(expert, one_hot, strict=True)]


def read_plan(folder: Path, *, weights: bool = True) -> Plan:
    """Load a plan; its consistency is checked by the types themselves.

    Args:
        folder: where :func:`write_plan` put it. New weights stay on disk until they are looked at.
        weights: ``False`` leaves new weights out, for those who ask what a plan did, not how.

    Raises:
        UsageError: the folder holds no plan, or only the copy that travels with a result, without its new weights.
    """
    record = _read_record(PlanRecord, folder / PLAN_JSON, "plan; make one with conmoe plan")
    tensors, _ = _read_tensors(folder / PLAN_TENSORS)

    def scores(i: int) -> Mapping[str, Tensor]:
        prefix = f"{i}.scores."
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    def new_weights(scope: ScopeRecord) -> Mapping[str, Tensor]:
        file = _weights_file(folder, scope.layers[0])
        if not weights or not scope.new_weights:
            return {}
        if not file.is_file():
            raise UsageError(
                f"{folder} is the copy of a plan that lies with its result, which holds the new weights; plan again."
            )
        return _read_tensors(file)[0]

    try:
        scopes = tuple(
            ScopePlan(
                scope.layers,
                LayerPlan(
                    tensors[f"{i}.assignment"],
                    tensors[f"{i}.mixing"],
                    tensors[f"{i}.gain"],
                    new_weights(scope),
                    float("nan") if scope.predicted_error is None else scope.predicted_error,
                    scores(i),
                    tensors.get(f"{i}.constant"),
                    tensors.get(f"{i}.static"),
                    scope.skip,
                    tensors.get(f"{i}.router"),
                ),
            )
            for i, scope in enumerate(record.scopes)
        )
    except KeyError as error:
        raise ConmoeError(f"{folder / PLAN_TENSORS} lacks the tensor {error}.") from None
    fields = {name: getattr(record, name) for name in PlanRecord.model_fields if name not in ("format", "scopes")}
    return Plan(scopes=scopes, **fields)


def _read_record(kind: type[R], file: Path, what: str) -> R:
    if not file.is_file():
        raise UsageError(f"{file.parent} holds no {what}.")
    return parse_record(kind, file, FORMAT)


def parse_record(kind: type[R], file: Path, version: int) -> R:
    """A record of ours, as it was written.

    Raises:
        ConmoeError: it is damaged, or not of the format ``version`` (records without one are of any).
    """
    try:
        record = kind.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise ConmoeError(f"{file} is damaged or of another version: {error.errors()[0]['msg']}.") from error
    if (found := getattr(record, "format", version)) != version:
        raise ConmoeError(f"{file} has format {found}; this version reads {version}.")
    return record


def _serialize(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file; the format wants tensors that neither share memory nor leave the CPU."""
    own = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    return save(own, metadata)


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Store tensors that may be large, atomically and without their bytes in memory a second time."""
    temporary = file.with_name(file.name + ".tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
    os.replace(temporary, file)


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}, stream.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConmoeError(f"{file} cannot be read: {error}.") from error


def read_text(file: Path) -> str | None:
    return file.read_text() if file.is_file() else None
