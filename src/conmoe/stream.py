"""Run a model whose weights stay on disk: one decoder layer in memory at a time, the next one being read meanwhile.

The model's own code does everything: embedding, masks, rotary positions, layers, final norm and head are its modules,
called with the arguments that its own forward passes. Only the order of the loops is turned inside out: all batches go
through one layer before the next layer is loaded. The hidden states between two layers live in files, so that their
number is bounded by the disk and a killed run can go on at the last finished layer.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conmoe.checkpoint import read_module
from conmoe.moe import decoder_layers
from conmoe.shards import bytes_of
from conmoe.source import Source
from conmoe.types import ConmoeError

#: Tokens that go through a layer together.
BATCH_TOKENS = 2048
#: Tokens whose logits exist at the same time.
LOGIT_TOKENS = 256


class _Reached(Exception):
    """The forward came to the last decoder layer; what follows is not wanted now."""


class HiddenStates:
    """The hidden states of all sequences before one layer and after it, in two files that change places."""

    def __init__(self, folder: Path, sequences: int, seq_len: int, width: int, dtype: torch.dtype) -> None:
        self._shape, self._dtype = (sequences, seq_len, width), dtype
        self._row = seq_len * width * dtype.itemsize
        self._files = (folder / "hidden-0.bin", folder / "hidden-1.bin")

    def read(self, side: int, start: int, stop: int) -> Tensor:
        """Sequences ``start .. stop`` of ``side`` (the parity of the layer that reads them)."""
        out = torch.empty((stop - start, *self._shape[1:]), dtype=self._dtype)
        with self._files[side % 2].open("rb") as stream:
            stream.seek(start * self._row)
            if stream.readinto(bytes_of(out)) != out.nbytes:
                raise ConmoeError(f"{self._files[side % 2]} ended early; delete its folder and start again.")
        return out

    def write(self, side: int, start: int, value: Tensor) -> None:
        """Store the sequences from ``start`` on."""
        file = self._files[side % 2]
        with file.open("r+b" if file.exists() else "w+b") as stream:
            stream.seek(start * self._row)
            stream.write(bytes_of(value.detach().to("cpu", self._dtype).contiguous()))


@dataclass
class Stream:
    """A source and the token sequences that go through it; ``run`` moves them, ``logits`` reads the end."""

    source: Source
    ids_NS: Tensor
    states: HiddenStates
    device: torch.device
    batch: int
    _calls: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)

    def batches(self) -> Iterator[tuple[int, int]]:
        N = self.ids_NS.shape[0]
        return ((start, min(start + self.batch, N)) for start in range(0, N, self.batch))

    @torch.no_grad()
    def run(
        self,
        around: Callable[[int, nn.Module], AbstractContextManager[Any]] = lambda index, layer: nullcontext(),
        *,
        start: int = 0,
        stop: int | None = None,
        store: bool = True,
        before_batch: Callable[[int, int], None] = lambda first, last: None,
        after_layer: Callable[[int], None] = lambda index: None,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Take all sequences through the decoder layers from ``start`` on.

        Args:
            around: gives the context in which a layer runs, from its index and its module.
            start: the first layer to run; its inputs must be there from an earlier run.
            stop: the layer before which to end; by default all are run.
            store: keep what leaves the layers; without, one layer can be watched and run again.
            before_batch: is told which sequences go through the layer next.
            after_layer: is told when all sequences have left a layer.
            advance: is told how many tokens have passed one more layer.
        """
        path, layers = decoder_layers(self.source.model)
        stop = len(layers) if stop is None else stop
        self._embed(start == 0)
        with ThreadPoolExecutor(1) as reader:
            pending = reader.submit(self._read, f"{path}.{start}.", layers[start]) if start < stop else None
            for index in range(start, stop):
                layer = layers[index]
                assert pending is not None
                weights, pending = pending.result(), None
                layer.load_state_dict({name: value.to(self.device) for name, value in weights.items()}, assign=True)
                del weights
                if index + 1 < stop:
                    pending = reader.submit(self._read, f"{path}.{index + 1}.", layers[index + 1])
                with around(index, layer):
                    for first, last in self.batches():
                        before_batch(first, last)
                        args, kwargs = self._calls[last - first, self.ids_NS.shape[1]][index]
                        hidden = self.states.read(index, first, last).to(self.device)
                        leaving = layer(hidden, *args, **kwargs)
                        if store:
                            self.states.write(index + 1, first, leaving)
                        advance((last - first) * self.ids_NS.shape[1])
                _unload(layer)
                _give_back()
                after_layer(index)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Gives ``logits(hidden_BSD) -> logits_BSV``: the model's own final norm, head and scaling."""
        with self._after_layers(self.source.model) as run:
            yield lambda hidden_BSD: run(hidden_BSD).logits

    @contextmanager
    def norm(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Gives ``last(hidden_BSD) -> hidden_BSD``: the last hidden state, which the head gets."""
        with self._after_layers(self.source.model.get_decoder()) as run:
            yield lambda hidden_BSD: run(hidden_BSD).last_hidden_state

    @contextmanager
    def _after_layers(self, model: nn.Module) -> Iterator[Callable[[Tensor], Any]]:
        """Gives ``model`` from what leaves its decoder layers on."""
        _, layers = decoder_layers(self.source.model)
        current: list[Tensor] = []

        def passes(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return current[0]

        def run(hidden_BSD: Tensor) -> Any:
            current[:] = [hidden_BSD.to(self.device)]
            return model(inputs_embeds=current[0], use_cache=False)

        with torch.no_grad(), self._outside(), _replaced(layers, [passes] * len(layers)):
            yield run

    def final(self, start: int, stop: int) -> Tensor:
        """What left the last decoder layer, for sequences ``start .. stop``."""
        return self.states.read(len(decoder_layers(self.source.model)[1]), start, stop)

    def _embed(self, store: bool) -> None:
        """Embed the tokens, and learn with which arguments the model calls each of its layers."""
        _, layers = decoder_layers(self.source.model)

        def note(index: int, calls: list[Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append((args, kwargs))
            if index == 0:
                calls.insert(0, hidden)
            if index + 1 == len(layers):
                raise _Reached
            return hidden

        shapes: set[int] = set()
        with self._outside():
            for first, last in self.batches():
                if not store and last - first in shapes:
                    continue
                shapes.add(last - first)
                calls: list[Any] = []
                notes = [partial(note, index, calls) for index in range(len(layers))]
                with _replaced(layers, notes), suppress(_Reached):
                    self.source.model(input_ids=self.ids_NS[first:last].to(self.device), use_cache=False)
                hidden = calls.pop(0)
                self._calls.setdefault((last - first, self.ids_NS.shape[1]), calls)
                if store:
                    self.states.write(0, first, hidden)

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Modules outside the decoder layers get their weights when they are first called, and lose them at the end."""
        model = self.source.model
        path, _ = decoder_layers(model)
        loaded: list[nn.Module] = []

        def load(name: str, module: nn.Module, args: Any) -> None:
            if any(value.is_meta for value in module.state_dict().values()):
                weights = self._read(f"{name}.", module)
                module.load_state_dict({key: value.to(self.device) for key, value in weights.items()}, assign=True)
                loaded.append(module)

        leaves = [
            (name, module)
            for name, module in model.named_modules()
            if not f"{name}.".startswith(f"{path}.") and list(module.parameters(recurse=False))
        ]
        hooks = [module.register_forward_pre_hook(partial(load, name)) for name, module in leaves]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in loaded:
                _unload(module)

    def _read(self, prefix: str, module: nn.Module) -> dict[str, Tensor]:
        return read_module(self.source.layout, self.source.model, prefix, module)


@contextmanager
def open_stream(
    source: Source,
    ids_NS: Tensor,
    *,
    device: str | torch.device = "cpu",
    batch: int | None = None,
    work: Path | None = None,
) -> Iterator[Stream]:
    """Prepare to run ``N`` sequences of ``S`` tokens through ``source``.

    Args:
        source: an opened checkpoint.
        ids_NS: token ids, all sequences of one length, without padding.
        device: where to compute.
        batch: sequences per batch; by default as many as make about 2,048 tokens.
        work: keep the hidden states in this folder, for a run that goes on later; by default a temporary one.
    """
    N, S = ids_NS.shape
    device = torch.device(device)
    for module in source.model.modules():
        for name, value in module.named_buffers(recurse=False):
            if not value.is_meta:
                module._buffers[name] = value.to(device)
    with (
        tempfile.TemporaryDirectory(prefix="conmoe-", ignore_cleanup_errors=True)
        if work is None
        else nullcontext(work) as folder
    ):
        width = source.model.get_decoder().config.hidden_size
        states = HiddenStates(Path(folder), N, S, width, source.model.dtype)
        yield Stream(source, ids_NS, states, device, batch or max(1, BATCH_TOKENS // S))


@contextmanager
def _replaced(layers: nn.ModuleList, forwards: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """Give each layer another forward for a while."""
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps what lies between live blocks, some 80 MB over a dozen layers."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _unload(module: nn.Module) -> None:
    module.load_state_dict(
        {name: torch.empty_like(value, device="meta") for name, value in module.state_dict().items()}, assign=True
    )
