"""Watch what a router really chose and what each expert really put out, while the layer computes as it always does.

Observation sits at the seam that Transformers gives: the experts function. Ours computes the routed experts one after
the other, like the library's eager one, and shows each expert's tokens, gates and outputs to the statistics on the way.
Nothing is computed twice and routing is never computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from conmoe.registry import Statistic
from conmoe.types import Routed, Routing, TokenSample

IMPLEMENTATION = "conmoe_observed"
_ROWS = 64


@dataclass
class Observer:
    """Adds up the statistics of one MoE layer, and collects its share of the token sample."""

    statistics: Mapping[str, Statistic]
    experts: int
    width: int
    device: torch.device
    sums: dict[str, Tensor] = field(init=False)
    rows: Tensor = field(init=False)  # which tokens of the coming batch belong to the sample
    priority_T: Tensor = field(init=False)
    _parts: list[tuple[Tensor, ...]] = field(default_factory=list)
    _rest: list[Tensor] = field(default_factory=list)
    _logits_TE: Tensor | None = None
    _routed_nD: Tensor | None = None  # the routed experts' output for the sampled tokens of this batch

    def __post_init__(self) -> None:
        sizes = {"E": self.experts, "D": self.width}
        self.sums = {
            name: torch.zeros([sizes[axis] for axis in item.shape], dtype=torch.float64, device=self.device)
            for name, item in self.statistics.items()
        }

    def expect(self, priority_T: Tensor, chosen_T: Tensor) -> None:
        """Announce the coming batch: the priority of each of its tokens, and which of them are sampled."""
        self.priority_T, self.rows = priority_T, chosen_T.nonzero().squeeze(1)

    def router(self, module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        """Forward hook of the router; returns nothing, so that it changes nothing."""
        # Routers give (logits, weights, indices), but GraniteMoE's before Transformers 5.20 the reverse.
        logits = output[0] if output[0].is_floating_point() else output[-1]
        self._logits_TE = logits.detach().reshape(-1, logits.shape[-1])

    def batch(self, hidden_TD: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> None:
        """All tokens of a batch, as the experts module receives them."""
        assert self._logits_TE is not None
        routing = Routing(index_Tk, weight_Tk, self._logits_TE, self.experts)
        for name, item in self.statistics.items():
            if item.per == "batch":
                self._add(name, item, slice(None), item.function(routing))
        rows = self.rows.to(hidden_TD.device)
        kept = (hidden_TD[rows], index_Tk[rows].int(), weight_Tk[rows].float(), self._logits_TE[rows].float())
        self._parts.append((*(part.cpu() for part in kept), self.priority_T[self.rows]))

    def expert(self, routed: Routed) -> None:
        """One expert's tokens of a batch."""
        for name, item in self.statistics.items():
            if item.per == "expert":
                self._add(name, item, routed.expert, item.function(routed))

    def routed(self, output_TD: Tensor) -> None:
        """The weighted sum of the routed experts for all tokens of a batch."""
        self._routed_nD = output_TD[self.rows.to(output_TD.device)]

    def block(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of a block that holds more than routed experts: what it adds to them."""
        assert self._routed_nD is not None
        whole_nD = output.reshape(-1, output.shape[-1])[self.rows.to(output.device)]
        rest_nD = whole_nD.float() - self._routed_nD.float()
        self._rest.append(rest_nD.to(output.dtype).cpu())

    def sample(self) -> TokenSample:
        hidden, index, weight, logits, priority = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        rest = torch.cat(self._rest) if self._rest else None
        return TokenSample(hidden, index, weight, logits, priority, rest)

    def _add(self, name: str, item: Statistic, where: Any, value: Tensor) -> None:
        total = self.sums[name]
        if item.reduce == "sum":
            total[where] += value
        else:
            total[where] = torch.maximum(total[where], value.to(total.dtype))


@contextmanager
def observed(block: nn.Module, experts: nn.Module, router: nn.Module, observer: Observer) -> Iterator[None]:
    """While the context lasts, ``observer`` sees what this layer's router, experts and the block around them do."""
    experts._conmoe_observer = observer  # type: ignore[assignment]
    hooks = [router.register_forward_hook(observer.router)]
    if any(child is not experts and child is not router for child in block.children()):
        hooks.append(block.register_forward_hook(observer.block))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        del experts._conmoe_observer


def observed_experts(self: Any, hidden_TD: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
    """The routed experts' weighted sum, in the order and with the roundings of the eager implementation."""
    observer: Observer | None = getattr(self, "_conmoe_observer", None)
    if observer is not None:
        observer.batch(hidden_TD, index_Tk, weight_Tk)
    k = index_Tk.shape[1]
    flat = index_Tk.reshape(-1)
    order = torch.argsort(flat, stable=True)
    stored = self.down_proj.shape[0]
    counts = torch.bincount(flat, minlength=stored)[:stored].tolist()  # higher indices are slots that run no expert
    gate = weight_Tk.reshape(-1)
    out_TD = torch.zeros_like(hidden_TD)
    start = 0
    for expert, count in enumerate(counts):
        slots = order[start : start + count]
        start += count
        if count == 0:
            continue
        token_n, gate_n = slots // k, gate[slots]
        output_nD = _expert(self, expert, hidden_TD[token_n])
        if observer is not None:
            norm_n = torch.linalg.vector_norm(output_nD, dim=1, dtype=torch.float32)
            observer.expert(Routed(expert, gate_n.float(), output_nD, norm_n))
        out_TD.index_add_(0, token_n, (output_nD * gate_n[:, None]).to(out_TD.dtype))
    if observer is not None:
        observer.routed(out_TD)
    return out_TD


def _expert(self: Any, expert: int, x_nD: Tensor) -> Tensor:
    n = len(x_nD)
    if x_nD.device.type == "cpu":
        # oneDNN compiles, and keeps, a kernel for every number of rows it meets; so let it meet few.
        x_nD = nn.functional.pad(x_nD, (0, 0, 0, -n % _ROWS))
    weights = self.gate_up_proj[expert], self.down_proj[expert]
    first, second = (weight.T for weight in weights) if self.is_transposed else weights
    biases = (self.gate_up_proj_bias[expert], self.down_proj_bias[expert]) if self.has_bias else (None, None)
    hidden_nI = self._apply_gate(nn.functional.linear(x_nD, first, biases[0]))
    return nn.functional.linear(hidden_nI, second, biases[1])[:n]


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, observed_experts)
