"""The data that travels between the rooms: frozen, checked on construction, without behaviour.

Shape letters, everywhere in the project: ``T`` tokens, ``n`` tokens routed to one expert (or kept in a sample),
``E`` routed (logical) experts, ``K`` prototypes kept, ``k`` top-k slots, ``D`` hidden size, ``I`` expert
intermediate size, ``L`` layers, ``W`` layers in a scope, ``M = W * E`` logical experts in a scope.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

#: Canonical expert tensors, in the order in which they are compared, mixed and stored. The leading axis is the expert.
EXPERT_TENSORS = ("gate_EID", "up_EID", "down_EDI", "gate_bias_EI", "up_bias_EI", "down_bias_ED")


class ConmoeError(Exception):
    """What is wrong, where, and what to do, in one sentence; the command line exits with code 1."""

    exit_code = 1


class UsageError(ConmoeError):
    """The request cannot be met as asked; found before any long work; the command line exits with code 2."""

    exit_code = 2


class Reroute(Protocol):
    """What a layer's own router chooses when only some of its experts are left to it."""

    def __call__(self, hidden_nD: Tensor, kept_K: Tensor, router_KD: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
        """``index_nk, weight_nk`` among the experts ``kept_K``.

        Indices count all experts; -1 is a slot that went to an expert outside them. ``router_KD`` takes the place of
        the router's rows of these experts, and then gates can be differentiated by it.
        """


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one MoE layer, whatever the family's own layout.

    Expert ``e`` computes ``down_e @ activate(gate_e @ x, up_e @ x)``, each product plus its bias where there is one.
    The tensors may be views of the family's storage and are never written to.
    """

    gate_EID: Tensor
    up_EID: Tensor
    down_EDI: Tensor
    activate: Callable[[Tensor, Tensor], Tensor]  # (gate_nI, up_nI) -> hidden_nI
    gate_bias_EI: Tensor | None = None
    up_bias_EI: Tensor | None = None
    down_bias_ED: Tensor | None = None
    reroute: Reroute | None = None  # None where there is no one router to ask
    router_ED: Tensor | None = None  # the rows by which the router scores them, None where there is no one router

    def __post_init__(self) -> None:
        E, intermediate, D = self.gate_EID.shape
        _require(self.up_EID.shape == (E, intermediate, D), "up_EID does not have the shape of gate_EID")
        _require(self.down_EDI.shape == (E, D, intermediate), "down_EDI does not fit gate_EID")


@dataclass(frozen=True, slots=True)
class Routing:
    """What the router chose for ``T`` tokens, as observed; ``logits_TE`` are its raw scores before any softmax."""

    index_Tk: Tensor
    weight_Tk: Tensor
    logits_TE: Tensor
    experts: int

    def __post_init__(self) -> None:
        _require(self.index_Tk.shape == self.weight_Tk.shape, "one gate belongs to every selected slot")


@dataclass(frozen=True, slots=True)
class Routed:
    """What one expert saw in one batch: its ``n`` tokens, their gates, and its own output before the gate."""

    expert: int
    gate_n: Tensor  # float32
    output_nD: Tensor  # the model's own dtype
    norm_n: Tensor  # float32, Euclidean norm of each row of output_nD


@dataclass(frozen=True, slots=True)
class TokenSample:
    """A seeded sample of the inputs of one MoE layer, with their routing.

    ``priority_n`` is the random number by which each token was drawn: the sample is the tokens of lowest priority, so
    samples are merged by keeping the lowest again. A slot of ``index_nk`` may be -1: routed to an expert that is
    outside the set a method was asked about.
    """

    hidden_nD: Tensor
    index_nk: Tensor
    weight_nk: Tensor
    logits_nE: Tensor
    priority_n: Tensor
    rest_nD: Tensor | None = None  # what the layer adds beside its routed experts (shared experts), if anything
    #: by how much the source's hidden states after this layer differ from what its own layer makes of these inputs,
    #: which passed compressed layers: what was lost on the way; None where nothing was
    drift_nD: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.hidden_nD.shape[0]
        for tensor in (self.index_nk, self.weight_nk, self.logits_nE, self.priority_n, self.rest_nD, self.drift_nD):
            _require(tensor is None or tensor.shape[0] == n, "the tensors of a token sample differ in length")


def sample_tensors(sample: TokenSample) -> dict[str, Tensor]:
    """The tensors that a token sample has, by name."""
    named = {name: getattr(sample, name) for name in TokenSample.__dataclass_fields__}
    return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Sums (or maxima) over ``tokens`` calibration tokens of one MoE layer, and its token sample.

    ``sums`` maps the name of a statistic to its tensor; :mod:`conmoe.statistics` lists the names. ``owner_E`` tells
    which layer of a scope each expert belongs to (all zero for a single layer).
    """

    tokens: int
    sums: Mapping[str, Tensor]
    sample: TokenSample
    owner_E: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "sums", MappingProxyType(dict(self.sums)))


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Which prototype answers for each logical expert, and what each prototype is made of.

    ``assignment_E[e]`` is the prototype of logical expert ``e``, or -1: dropped, the router may not choose it. Numbers
    from ``K`` on are rows of ``constant_CD``: the logical expert is answered for by a constant vector (MoNE).
    ``mixing_KE`` holds each prototype's recipe: a one-hot row is a kept expert, copied bit for bit; any other row is a
    weighted sum of source experts. ``weights`` replaces prototype tensors by new ones, under their canonical names
    (``"down_EDI"`` with ``K`` in place of ``E``). ``gain_E`` multiplies the gates of logical experts.
    ``predicted_error`` is the method's own estimate of the layer's relative squared output error, NaN if it has none.
    ``static_K`` condenses the layer (CD-MoE): it has no router any more, its prototypes answer every token with these
    gates; every logical expert is dropped, and there may be no prototype at all.
    ``router_KD`` replaces the router's rows of the logical experts that are not dropped, in their order; only a plan
    that drops some may have it, since otherwise the router stays untouched.
    ``skip`` is dynamic skipping (NAEE): a chosen expert is skipped where its gate is below ``skip`` times the highest.
    In a scope of ``W`` layers, ``E`` is ``W * E``: all logical experts of the scope, layer by layer.
    """

    assignment_E: Tensor
    mixing_KE: Tensor
    gain_E: Tensor
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    predicted_error: float = float("nan")
    scores: Mapping[str, Tensor] = field(default_factory=dict)  # per-expert numbers worth reporting, by name
    constant_CD: Tensor | None = None
    static_K: Tensor | None = None
    skip: float = 0.0
    router_KD: Tensor | None = None

    def __post_init__(self) -> None:
        K, E = self.mixing_KE.shape
        C = 0 if self.constant_CD is None else self.constant_CD.shape[0]
        _require(self.assignment_E.shape == (E,), f"the assignment has {tuple(self.assignment_E.shape)}, not ({E},)")
        _require(self.gain_E.shape == (E,), "one gain belongs to every logical expert")
        _require(self.assignment_E.dtype == torch.int64, "the assignment must be int64")
        _require(K >= 1 or self.static_K is not None, "at least one prototype must be kept")
        lowest, highest = int(self.assignment_E.min()), int(self.assignment_E.max())
        _require(lowest >= -1 and highest < K + C, f"the assignment points outside the {K} prototypes")
        if self.static_K is not None:
            _require(self.static_K.shape == (K,), "one static gate belongs to every prototype")
            _require(bool(torch.isfinite(self.static_K).all()), "a static gate is not finite")
            _require(highest == -1, "a condensed layer has no router that could choose an expert")
        if self.constant_CD is not None:
            _require(bool(torch.isfinite(self.constant_CD).all()), "a constant is not finite")
        if self.router_KD is not None:
            left = int((self.assignment_E >= 0).sum())
            _require(left < E, "a plan that drops no expert leaves the router untouched")
            _require(
                self.router_KD.shape[0] == left, "one row of the router belongs to every expert that is not dropped"
            )
            _require(bool(torch.isfinite(self.router_KD).all()), "a row of the router is not finite")
        _require(0.0 <= self.skip < 1.0, "a layer skips experts below a share of the highest gate, from 0 up to 1")
        _require(bool(torch.isfinite(self.mixing_KE).all()), "a prototype's recipe is not finite")
        _require(bool(torch.isfinite(self.gain_E).all()), "a gain is not finite")
        _require(bool((self.mixing_KE != 0).any(dim=1).all()), "a prototype is made of nothing")
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))
        object.__setattr__(self, "scores", MappingProxyType(dict(self.scores)))


@dataclass(frozen=True, slots=True)
class ScopePlan:
    """A :class:`LayerPlan` and the decoder layers, in depth order, that share its pool of prototypes."""

    layers: tuple[int, ...]
    plan: LayerPlan

    def __post_init__(self) -> None:
        _require(len(self.layers) >= 1, "a scope has at least one layer")
        _require(self.plan.assignment_E.numel() % len(self.layers) == 0, "the layers of a scope differ in experts")


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done to a checkpoint, and where the decision came from."""

    scopes: tuple[ScopePlan, ...]
    method: str
    options: Mapping[str, Any]
    keep: str
    default_form: str
    protected: Mapping[int, tuple[int, ...]]  # decoder layer -> experts that had to stay
    source: str  # fingerprint of the checkpoint
    statistics: str  # fingerprint of the statistics
    version: str
    budget: str = "uniform"  # how the prototypes were shared out over the scopes; each scope's plan has its own
    budget_options: Mapping[str, Any] = field(default_factory=dict)
    refine: str = "none"  # what was fitted to the layers' own outputs afterwards
    refine_options: Mapping[str, Any] = field(default_factory=dict)
    sequential: int = (
        0  # tokens of each layer's sample behind the compressed layers before it; 0: the source's own inputs
    )

    def __post_init__(self) -> None:
        layers = [layer for scope in self.scopes for layer in scope.layers]
        _require(len(set(layers)) == len(layers), "a layer is planned twice")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConmoeError(message)
