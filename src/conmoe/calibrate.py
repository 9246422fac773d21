"""Checkpoint and text in, statistics out: the streamed model under observation, resumable layer by layer.

Started by ``torchrun``, every rank takes its share of the sequences and the sums are added after each layer. A killed
run goes on at the first unfinished layer: the statistics of a layer are on disk before the next layer begins, and the
hidden states that enter a layer stay untouched until it has ended everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conmoe import __version__
from conmoe.artifacts import (
    Manifest,
    building,
    check_free,
    checkpoint_fingerprint,
    fingerprint,
    layer_file,
    partial_of,
    read_layer,
    read_manifest,
    read_tokens,
    refuse_overlap,
    write_atomic,
    write_layer,
    write_manifest,
    write_tokens,
)
from conmoe.data import TokenData
from conmoe.moe import MoeLayer
from conmoe.observe import IMPLEMENTATION, Observer, observed
from conmoe.ops.subsets import thinned
from conmoe.parallel import Ranks
from conmoe.registry import statistics as registered_statistics
from conmoe.source import Source, check_compressible, open_source
from conmoe.stream import open_stream
from conmoe.types import LayerStatistics, TokenSample, UsageError, sample_tensors

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The options of a calibration run."""

    sample: int = 4096  # tokens of the sample
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | None = None
    batch: int | None = None
    trust_remote_code: bool = False


def calibrate(
    model: Path,
    out: Path,
    data: TokenData,
    options: Calibration = Calibration(),
    *,
    force: bool = False,
    advance: Advance = lambda tokens: None,
) -> Manifest:
    """Run the calibration text through ``model`` once and store what every method needs in the folder ``out``.

    Args:
        model: a local checkpoint.
        out: the folder to write; a killed run leaves ``OUT.partial`` and is taken up from there.
        data: the token sequences, from :func:`conmoe.data.load_tokens`.
        options: how much to sample, where and in which dtype to compute.
        force: replace ``out`` if it exists.
        advance: called with the number of tokens that passed one more layer.

    Returns:
        the manifest of the finished statistics.
    """
    refuse_overlap(out, model)
    ranks = Ranks.join()
    source = open_source(
        model,
        dtype=options.dtype,
        experts_implementation=IMPLEMENTATION,
        trust_remote_code=options.trust_remote_code,
    )
    check_compressible(source)
    manifest = describe(source, data, options)
    run = fingerprint({**manifest.model_dump(), "ranks": ranks.size, "batch": options.batch, "device": options.device})
    check_free(out, force=force)
    folder = building(out, force=force, key=run) if ranks.rank == 0 else nullcontext(partial_of(out))
    with folder as partial:
        ranks.barrier()
        work = partial / f"work-{ranks.rank}"
        work.mkdir(parents=True, exist_ok=True)
        _run(source, data, options, partial, work, ranks, advance)
        ranks.barrier()
        if ranks.rank == 0:
            for leftover in sorted(partial.glob("work-*/*")):
                leftover.unlink()
            for leftover in sorted(partial.glob("work-*")):
                leftover.rmdir()
            write_tokens(partial, data.ids_NS)
            write_manifest(partial, manifest)
    ranks.barrier()
    return manifest


def merge_statistics(parts: list[Path], out: Path, *, force: bool = False) -> Manifest:
    """Add up statistics of the same model over different texts, as if it had been calibrated on all of them.

    Raises:
        UsageError: the parts do not belong together.
    """
    manifests = [read_manifest(part) for part in parts]
    first = manifests[0]
    for part, manifest in zip(parts, manifests, strict=True):
        if (manifest.model, manifest.dtype, manifest.layers) != (first.model, first.dtype, first.layers):
            raise UsageError(f"{part} and {parts[0]} are statistics of different models.")
    merged = first.model_copy(
        update={
            "tokens": sum(manifest.tokens for manifest in manifests),
            "sample": min(manifest.sample for manifest in manifests),
            "data": tuple(line for manifest in manifests for line in manifest.data),
            "data_fingerprint": fingerprint([manifest.data_fingerprint for manifest in manifests]),
            "documents": tuple(sorted({name for manifest in manifests for name in manifest.documents})),
        }
    )
    with building(out, force=force) as partial:
        for layer in first.layers:
            write_layer(partial, layer, add([read_layer(part, layer) for part in parts], merged.sample))
        if len({manifest.seq_len for manifest in manifests}) == 1:
            write_tokens(partial, torch.cat([read_tokens(part) for part in parts]))
        write_manifest(partial, merged)
    return merged


def add(parts: list[LayerStatistics], limit: int) -> LayerStatistics:
    """Statistics over all tokens of ``parts``: sums are added, maxima compared, the sample kept at ``limit`` tokens."""
    known = registered_statistics()

    def combine(name: str) -> Tensor:
        values = torch.stack([part.sums[name] for part in parts])
        return values.amax(0) if known[name].reduce == "max" else values.sum(0)

    sums = {name: combine(name) for name in parts[0].sums}
    sample = smallest([part.sample for part in parts], limit)
    return replace(parts[0], tokens=sum(part.tokens for part in parts), sums=sums, sample=sample)


def smallest(parts: list[TokenSample], limit: int) -> TokenSample:
    """The ``limit`` tokens of lowest priority of several samples, which is a sample of their union."""
    columns = [sample_tensors(part) for part in parts]
    return thinned(TokenSample(**{name: torch.cat([column[name] for column in columns]) for name in columns[0]}), limit)


def _run(
    source: Source, data: TokenData, options: Calibration, out: Path, work: Path, ranks: Ranks, advance: Advance
) -> None:
    N, S = data.ids_NS.shape
    mine = ranks.share(N)
    priority_NS, bound = draw(N, S, options.sample, options.seed)
    priority_NS = priority_NS[mine.start : mine.stop]
    by_index = {layer.index: layer for layer in source.layers}
    observers: dict[int, Observer] = {}
    known = registered_statistics()

    def around(index: int, module: nn.Module) -> AbstractContextManager[Any]:
        if index not in by_index:
            return nullcontext()
        observers[index] = new_observer(source, by_index[index], options.device)
        return watch(source, by_index[index], observers[index])

    def before_batch(first: int, last: int) -> None:
        for observer in observers.values():
            priority = priority_NS[first:last].reshape(-1)
            observer.expect(priority, priority <= bound)

    def after_layer(index: int) -> None:
        observer = observers.pop(index, None)
        if observer is not None:
            sums = {name: ranks.reduce(value, known[name].reduce).cpu() for name, value in observer.sums.items()}
            samples = ranks.gather(observer.sample())
            if ranks.rank == 0:
                owner = torch.zeros(observer.experts, dtype=torch.int64)
                sample = smallest(samples, options.sample)
                write_layer(out, index, LayerStatistics(N * S, sums, sample, owner))
        ranks.barrier()
        write_atomic(work / "next", str(index + 1))
        ranks.barrier()

    with open_stream(
        source, data.ids_NS[mine.start : mine.stop], device=options.device, batch=options.batch, work=work
    ) as stream:
        start = _first_unfinished(source, out, work, ranks)
        advance(start * len(mine) * S)
        stream.run(around, start=start, before_batch=before_batch, after_layer=after_layer, advance=advance)


def draw(N: int, S: int, sample: int, seed: int) -> tuple[Tensor, float]:
    """A random priority for each of ``N`` sequences of ``S`` tokens, and the highest in a sample of this size."""
    priority_n = torch.rand(N * S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bound = float(torch.kthvalue(priority_n, min(sample, N * S)).values) if sample else -1.0
    return priority_n.view(N, S), bound


def new_observer(source: Source, layer: MoeLayer, device: str) -> Observer:
    """An observer of one layer that has seen nothing yet."""
    experts = source.model.get_submodule(layer.experts)
    width = experts.get_parameter("down_proj").shape
    hidden = width[2] if experts.is_transposed else width[1]
    return Observer(registered_statistics(), layer.stored, hidden, torch.device(device))


def _first_unfinished(source: Source, out: Path, work: Path, ranks: Ranks) -> int:
    """The layer to go on with: the earliest that any rank has not finished."""
    progress = work / "next"
    reached = int(progress.read_text()) if progress.is_file() else 0
    reached = ranks.minimum(reached)
    lost = [
        layer.index for layer in source.layers if layer.index < reached and not layer_file(out, layer.index).exists()
    ]
    return 0 if lost else reached


@contextmanager
def watch(source: Source, layer: MoeLayer, observer: Observer) -> Iterator[None]:
    """While the context lasts, ``observer`` sees this layer of ``source``."""
    model = source.model
    block, experts, router = (model.get_submodule(path) for path in (layer.block, layer.experts, layer.router))
    with observed(block, experts, router, observer):
        yield


def describe(source: Source, data: TokenData, options: Calibration) -> Manifest:
    """The manifest that a calibration with these inputs will have."""
    first = source.layers[0]
    return Manifest(
        version=__version__,
        model=checkpoint_fingerprint(source.folder, source.files),
        family=source.config.model_type,
        layers=tuple(layer.index for layer in source.layers),
        experts=first.logical,
        top_k=first.top_k,
        tokens=data.ids_NS.numel(),
        seq_len=data.ids_NS.shape[1],
        sample=options.sample,
        seed=options.seed,
        dtype=str(source.model.dtype).removeprefix("torch."),
        data=tuple(f"{part.source}: {part.sequences} sequences, weight {part.weight:g}" for part in data.sources),
        data_fingerprint=data.fingerprint,
        documents=data.documents,
    )
