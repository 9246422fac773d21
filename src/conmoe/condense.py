"""Which layers to condense: greedy over what each choice does to the last hidden state (CD-MoE, arXiv 2412.00069).

The search is pure. What it asks for is measured by streaming the calibration text once for each step: all candidates
go through the model side by side, each leaving the common path at its own layer, so the weights of a layer are read
once for all of them, and what they have in common is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from conmoe.moe import MoeLayer
from conmoe.ops.divergence import jensen_shannon
from conmoe.runtime.modeling_conmoe import NoExperts, StaticRouter
from conmoe.source import Source
from conmoe.stream import BATCH_TOKENS, Stream, open_stream
from conmoe.types import LayerPlan, UsageError

#: Layers in the order in which they are condensed.
Order = tuple[int, ...]
#: ``(chosen, candidates) -> divergence`` from the source of the model with ``chosen`` and one candidate condensed.
Divergences = Callable[[Order, Sequence[int]], Mapping[int, float]]


def search(
    layers: Sequence[int],
    count: int,
    divergences: Divergences,
    *,
    beam: int = 1,
    allowed: Callable[[Order], bool] = lambda chosen: True,
) -> tuple[Order, list[float]]:
    """Choose ``count`` of ``layers``: at each step the one after which the divergence is least, given those before.

    Args:
        layers: the candidates.
        count: how many to choose.
        divergences: what is minimised.
        beam: how many choices are followed at a time; equal sets are one choice. Ties go to the lower layers.
        allowed: whether these layers may be condensed together.

    Returns:
        the layers in the order of their choice, and the divergence after each.

    Raises:
        UsageError: fewer layers can be condensed.
    """
    followed: list[tuple[Order, list[float]]] = [((), [])]
    for _ in range(count):
        reached: dict[frozenset[int], tuple[float, Order, list[float]]] = {}
        for chosen, path in followed:
            candidates = [layer for layer in layers if layer not in chosen and allowed((*chosen, layer))]
            for layer, value in divergences(chosen, candidates).items() if candidates else ():
                order, key = (*chosen, layer), frozenset((*chosen, layer))
                if key not in reached or (value, order) < reached[key][:2]:
                    reached[key] = value, order, [*path, value]
        if not reached:
            raise UsageError(f"Only {len(followed[0][0])} layers can be condensed, not {count}; keep more experts.")
        best = sorted(reached.values(), key=lambda found: found[:2])[:beam]
        followed = [(order, path) for _, order, path in best]
    return followed[0]


@dataclass
class LastHidden:
    """Divergences of the last hidden state, after the final norm, from that of the source: mean over tokens.

    ``plans`` has the condensed layers; ``ids_NS`` the text.
    """

    source: Source
    plans: Mapping[int, LayerPlan]
    ids_NS: Tensor
    device: str | torch.device = "cpu"
    _original_NSD: Tensor | None = None

    def __call__(self, chosen: Order, candidates: Sequence[int]) -> dict[int, float]:
        """What condensing each of ``candidates`` beside ``chosen`` does."""
        if self._original_NSD is None:
            (self._original_NSD,) = self.states((), ())
        found = {}
        for layer, hidden_NSD in zip((None, *candidates), self.states(chosen, candidates), strict=True):
            if layer is not None:
                per_row = [jensen_shannon(*pair).mean() for pair in zip(self._original_NSD, hidden_NSD, strict=True)]
                found[layer] = float(torch.stack(per_row).mean())
        return found

    def states(self, chosen: Order, candidates: Sequence[int]) -> Iterator[Tensor]:
        """The last hidden states ``[N, S, D]`` with ``chosen`` condensed, and then with each candidate in addition."""
        N, S = self.ids_NS.shape
        batch = max(size for size in range(1, N + 1) if N % size == 0 and (size == 1 or size * S <= BATCH_TOKENS))
        ids_MS = self.ids_NS.repeat(1 + len(candidates), 1)
        with open_stream(self.source, ids_MS, device=self.device, batch=batch) as stream:
            paths = _Paths(stream, self.plans, chosen, candidates, N)
            stream.run(paths.around, before_batch=paths.before_batch)
            with stream.norm() as norm:
                for start in range(0, len(ids_MS), N):
                    yield torch.cat([norm(stream.final(n, n + 1)) for n in range(start, start + N)])


class _Paths:
    """Copies of a text side by side: the first with ``chosen`` condensed, each other with one candidate more.

    Until it reaches its candidate's layer, a copy is the same as the first, and waits.
    """

    def __init__(
        self, stream: Stream, plans: Mapping[int, LayerPlan], chosen: Order, candidates: Sequence[int], copy: int
    ) -> None:
        self._stream, self._plans, self._chosen, self._candidates, self._copy = stream, plans, chosen, candidates, copy
        self._layers = {layer.index: layer for layer in stream.source.layers}
        self._rows = (0, 0)

    def before_batch(self, first: int, last: int) -> None:
        self._rows = first, last

    @contextmanager
    def around(self, index: int, module: nn.Module) -> Iterator[None]:
        module.forward = partial(self._forward, index, module.forward)
        try:
            yield
        finally:
            del module.forward

    def _forward(self, index: int, forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, last = self._rows
        copy, condensed = first // self._copy, index in self._chosen
        if copy:
            own = self._candidates[copy - 1]
            if index < own:
                return hidden
            if index == own:
                start = copy * self._copy
                hidden, condensed = self._stream.states.read(index, first - start, last - start).to(hidden), True
        with self._condensed(index) if condensed else nullcontext():
            return forward(hidden, *args, **kwargs)

    def _condensed(self, index: int) -> AbstractContextManager[None]:
        return statically_routed(self._stream.source.model, self._layers[index], self._plans[index])


@contextmanager
def statically_routed(model: nn.Module, layer: MoeLayer, plan: LayerPlan) -> Iterator[None]:
    """While the context lasts, a layer of the source computes what it will when ``plan`` has condensed it."""
    assert plan.static_K is not None
    block, router, experts = (model.get_submodule(path) for path in (layer.block, layer.router, layer.experts))
    names = [path.rpartition(".")[2] for path in (layer.router, layer.experts)]
    kept_K = plan.mixing_KE.argmax(dim=1) if len(plan.static_K) else torch.zeros(0, dtype=torch.int64)
    static = StaticRouter(len(plan.static_K))
    static.static_gate.copy_(plan.static_K)
    device = next(router.parameters()).device

    def name_experts(module: nn.Module, args: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return *out[:2], kept_K.to(device)[out[2]]

    static.register_forward_hook(name_experts)
    setattr(block, names[0], static.to(device))
    setattr(block, names[1], experts if len(kept_K) else NoExperts())
    try:
        yield
    finally:
        setattr(block, names[0], router)
        setattr(block, names[1], experts)
