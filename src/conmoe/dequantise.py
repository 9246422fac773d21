"""A checkpoint in low precision in, the same in full precision out: for whoever wants new experts made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from conmoe.apply import SHARD_BYTES, check_space, copy_beside
from conmoe.artifacts import building, checkpoint_fingerprint, fingerprint, refuse_overlap
from conmoe.lowprec import is_low
from conmoe.shards import Output, copies, write_shards
from conmoe.source import open_source
from conmoe.types import UsageError


@dataclass(frozen=True, slots=True)
class Dequantised:
    """What was written."""

    folder: Path
    bytes: int
    source_bytes: int


def dequantise(
    model: Path,
    out: Path,
    *,
    force: bool = False,
    trust_remote_code: bool = False,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Dequantised:
    """Write the numbers that a checkpoint in FP8 or compressed-tensors stands for, in the dtype of its configuration.

    What was lost when it was quantised stays lost.

    Args:
        model: the checkpoint; never written to.
        out: the folder to write, built as ``OUT.partial``; a killed run goes on at the first unfinished shard.
        force: replace ``out`` if it exists.
        trust_remote_code: run modelling code that comes with the checkpoint.
        advance: called with the bytes written since the last call, and the bytes to write in all.

    Raises:
        UsageError: it is in full precision.
    """
    source = open_source(model, trust_remote_code=trust_remote_code)
    if source.scheme is None:
        raise UsageError(f"{model} is in full precision; there is nothing to dequantise.")
    refuse_overlap(out, model)
    outputs: list[Output] = []
    for entry in source.tensors:
        if isinstance(entry, Output) and is_low(entry):
            outputs.append(replace(entry, parts=()))
        else:
            outputs += copies(entry)
    total = sum(output.nbytes for output in outputs)
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    key = fingerprint(["dequantise", checkpoint_fingerprint(model, source.files)])
    with building(out, force=force, key=key) as folder:
        check_space(folder, total)
        write_shards(outputs, folder, SHARD_BYTES, lambda nbytes: advance(nbytes, total))
        copy_beside(model, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Dequantised(out, total, sum(entry.nbytes for entry in source.entries.values()))
