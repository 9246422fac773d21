"""Sequential planning: each layer is calibrated on inputs that have passed through the compressed layers before it.

The same statistics, methods and plans in another loop. The calibration text stands before a layer; the source's own
layer is watched on it, planned, and then the compressed layer lets the text through to the next. One layer is in memory
at a time, and a killed run goes on at the layer that it had reached.

For refinements a second passage, of the source's own hidden states, keeps pace: where the two have drifted apart, a
layer is fitted to bring them together again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from conmoe.artifacts import Manifest, read_text, write_atomic
from conmoe.calibrate import draw, new_observer, smallest, watch
from conmoe.moe import MoeLayer, decoder_layers
from conmoe.observe import IMPLEMENTATION
from conmoe.preview import preview
from conmoe.source import Source, open_source
from conmoe.stream import Stream, open_stream
from conmoe.types import LayerStatistics, Plan, ScopePlan

#: Where a folder that is being planned keeps the text on its way.
PASSAGE = "passage"


class Passage:
    """The calibration text on its way through the compressed model: it stands before ``position``."""

    def __init__(
        self,
        source: Source,
        ids_NS: Tensor,
        seed: int,
        sample: int,
        device: str,
        work: Path,
        *,
        drift: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self._source, self._ids_NS, self._device, self._work = source, ids_NS, device, work
        self._limit, self._trust = sample, trust_remote_code
        N, S = ids_NS.shape
        self._priority_NS, self._bound = draw(N, S, sample, seed)
        self._place = work / "next"
        self.position = int(read_text(self._place) or 0)
        self._own: Passage | None = None  # the source's own states
        if drift:
            (work / "own").mkdir(exist_ok=True)
            self._own = Passage(source, ids_NS, seed, sample, device, work / "own")

    @property
    def length(self) -> int:
        return len(decoder_layers(self._source.model)[1])

    def statistics(self, layer: MoeLayer) -> LayerStatistics:
        """What the source's own ``layer`` does with the text as it arrives there; the text stays before it."""
        self._walk(layer.index)
        observer = new_observer(self._source, layer, self._device)

        def before_batch(first: int, last: int) -> None:
            priority = self._priority_NS[first:last].reshape(-1)
            observer.expect(priority, priority <= self._bound)

        with self._stream(self._source) as stream:
            stream.run(
                lambda index, module: watch(self._source, layer, observer),
                start=layer.index,
                stop=layer.index + 1,
                before_batch=before_batch,
            )
            left = self._sampled(stream, layer.index + 1) if self._own else None
        sums = {name: value.cpu() for name, value in observer.sums.items()}
        sample = observer.sample()
        if self._own and left is not None:
            self._own._walk(layer.index + 1)
            with self._own._stream(self._source) as stream:
                drift_nD = self._sampled(stream, layer.index + 1).float() - left.float()
            sample = replace(sample, drift_nD=drift_nD if drift_nD.any() else None)
        sample = smallest([sample], self._limit)
        return LayerStatistics(self._ids_NS.numel(), sums, sample, torch.zeros(layer.stored, dtype=torch.int64))

    def follow(self, scope: ScopePlan, describe: Callable[[list[ScopePlan]], Plan]) -> None:
        """Let the text through the layer as ``scope`` makes it; nothing to do where it has passed already."""
        (index,) = scope.layers
        if self.position > index:
            return
        self._walk(index)
        made = preview(
            self._source,
            describe([scope]),
            "shared",
            dtype=self._source.model.dtype,
            experts_implementation=IMPLEMENTATION,
            trust_remote_code=self._trust,
        )
        self._run(made, index, index + 1)

    def _sampled(self, stream: Stream, index: int) -> Tensor:
        """The hidden states before a layer, of the tokens that belong to the sample."""
        parts = []
        for first, last in stream.batches():
            states = stream.states.read(index, first, last)
            parts.append(states.reshape(-1, states.shape[-1])[(self._priority_NS[first:last] <= self._bound).flatten()])
        return torch.cat(parts)

    def _walk(self, index: int) -> None:
        """Let the text through the layers before ``index`` that nobody changes."""
        if self.position < index:
            self._run(self._source, self.position, index)

    def _run(self, source: Source, start: int, stop: int) -> None:
        with self._stream(source) as stream:
            stream.run(start=start, stop=stop, after_layer=self._passed)

    def _passed(self, index: int) -> None:
        """Noted layer by layer: the next but one overwrites what stood before this one."""
        self.position = index + 1
        write_atomic(self._place, str(self.position))

    @contextmanager
    def _stream(self, source: Source) -> Iterator[Stream]:
        with open_stream(source, self._ids_NS, device=self._device, work=self._work) as stream:
            yield stream


def clear_layers(folder: Path) -> None:
    """Remove what a plan was made in layer by layer, once it is written.

    Each part goes at once, and the text's passage before the layers that it has passed: a killed run that is taken up
    finds a layer whole or makes it again, on text that starts anew.
    """
    for gone in folder.glob("gone-*"):
        shutil.rmtree(gone)
    for part in [*folder.glob(PASSAGE), *sorted(folder.glob("layer-*"))]:
        gone = folder / f"gone-{part.name}"
        os.replace(part, gone)
        shutil.rmtree(gone)


def open_passage(
    source: Source,
    ids_NS: Tensor,
    manifest: Manifest,
    work: Path,
    *,
    device: str,
    sample: int = 0,
    drift: bool = False,
    trust_remote_code: bool = False,
) -> Passage:
    """Prepare to plan ``source`` layer by layer on the text it was calibrated on, in the dtype of that run.

    Each layer's sample has ``sample`` tokens, by default as many as the statistics'. With ``drift`` the samples tell
    how far the compressed layers have led away from the source, for which each layer runs once more.
    """
    streamed = open_source(
        source.folder,
        dtype=getattr(torch, manifest.dtype),
        experts_implementation=IMPLEMENTATION,
        trust_remote_code=trust_remote_code,
        entries=source.entries,
    )
    work.mkdir(parents=True, exist_ok=True)
    limit = sample or manifest.sample
    return Passage(
        streamed, ids_NS, manifest.seed, limit, device, work, drift=drift, trust_remote_code=trust_remote_code
    )
