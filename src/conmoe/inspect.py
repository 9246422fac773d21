"""What a checkpoint is and what compressing it would save, from its headers alone."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from conmoe.allocate import experts_kept, parse_keep
from conmoe.forms import check_groups
from conmoe.moe import MoeLayer, count_field, decoder_layers
from conmoe.mtp import find_heads, most_bytes
from conmoe.preflight import Serve, Serving, case_of_checkpoint, look
from conmoe.registry import Form
from conmoe.shards import Entry, Held
from conmoe.source import Source, check_compressible, open_source
from conmoe.stream import BATCH_TOKENS
from conmoe.types import UsageError

#: Shares of the experts that every inspection looks at.
USUAL_SHARES = (0.25, 0.5, 0.75)
_BASELINE_BYTES = 400 * 2**20  # Python with torch and Transformers loaded, measured
_PROBE = 512


@dataclass(frozen=True, slots=True)
class Saving:
    """What keeping a share of the routed experts would leave."""

    keep: float
    experts: int
    bytes: int
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """A head that predicts further tokens."""

    tensors: int
    bytes: int
    experts: int  # of its own, 0: none
    odd: str  # why they could not be pruned; empty where they can


@dataclass(frozen=True, slots=True)
class Inspection:
    """The facts of a checkpoint; sizes in bytes, times in seconds."""

    family: str
    layers: int
    moe_layers: int
    experts: int
    stored_experts: int
    experts_per_token: int
    shared_experts: int
    router: str
    router_groups: int
    parameters: int
    active_parameters: int
    routed_expert_bytes: int
    total_bytes: int
    routed_share: float
    dtype: str
    savings: tuple[Saving, ...]
    legal_sliced_counts: tuple[int, ...]
    estimated_peak_bytes: int
    estimated_seconds: float  # to calibrate on 16,384 tokens, on this machine's CPU
    quantisation: str | None = None  # how matrices are stored, where that is in low precision
    mtp: HeadFacts | None = None  # the head that predicts further tokens, if there is one
    serving: Serving | None = None  # what an engine would say, where one was named

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    model: Path,
    *,
    trust_remote_code: bool = False,
    entries: dict[str, Entry] | None = None,
    keep: str = "",
    form: Form = "sliced",
    serve: Serve | None = None,
) -> Inspection:
    """Look at a checkpoint without loading a weight.

    Args:
        model: a checkpoint folder.
        trust_remote_code: run modelling code that comes with it.
        entries: its headers, where they are not in the folder.
        keep: a share or count of experts to look at beside the usual ones; empty: none.
        form: in which ``keep`` would be stored.
        serve: an engine to ask about ``keep``, or about the checkpoint as it is; an answer of no is no error here.

    Raises:
        UsageError: no model, a dense model, an unsupported family, or a ``keep`` that cannot be.
    """
    source = open_source(model, trust_remote_code=trust_remote_code, entries=entries)
    first = source.layers[0]
    if keep:
        check_compressible(source)
    kept = experts_kept(parse_keep(keep), first.logical) if keep else None
    shares = sorted({*USUAL_SHARES, *((kept / first.logical,) if kept else ())})
    owner = source.layout.parameter_of()
    prefixes = tuple(f"{layer.experts}." for layer in source.layers)
    routed = [entry for entry in source.entries.values() if owner.get(entry.name, "").startswith(prefixes)]
    total = sum(entry.nbytes for entry in source.entries.values())
    routed_bytes = sum(entry.nbytes for entry in routed)
    parameters = sum(map(_count, source.tensors))
    routed_parameters = sum(
        _count(piece.entry)
        for target, pieces in source.layout.sources.items()
        if target.startswith(prefixes)
        for piece in pieces
    )
    active = parameters - routed_parameters + routed_parameters * first.top_k // first.stored
    return Inspection(
        family=source.config.model_type,
        layers=len(decoder_layers(source.model)[1]),
        moe_layers=len(source.layers),
        experts=first.logical,
        stored_experts=first.stored,
        experts_per_token=first.top_k,
        shared_experts=_shared_experts(source, first),
        router=type(source.model.get_submodule(first.router)).__name__,
        router_groups=first.groups,
        parameters=parameters,
        active_parameters=active,
        routed_expert_bytes=routed_bytes,
        total_bytes=total,
        routed_share=routed_bytes / total,
        dtype=str(source.model.dtype).removeprefix("torch."),
        savings=tuple(_saving(source, share, routed_bytes, total) for share in shares),
        legal_sliced_counts=tuple(count for count in range(1, first.stored + 1) if _legal(first, count)),
        estimated_peak_bytes=_peak(source),
        estimated_seconds=2.0 * active * 16384 / _flops(source.model.dtype),
        quantisation=source.scheme.name if source.scheme else None,
        mtp=_head(source),
        serving=look(case_of_checkpoint(source, serve, kept, form), serve.engine) if serve else None,
    )


def _head(source: Source) -> HeadFacts | None:
    heads = find_heads(source)
    size = sum(entry.nbytes for entry in heads.entries)
    experts = int(getattr(source.config, count_field(source.config))) if heads.has_experts else 0
    return HeadFacts(len(heads.entries), size, experts, heads.odd) if heads.entries else None


def _saving(source: Source, keep: float, routed: int, total: int) -> Saving:
    experts = source.layers[0].stored
    count = experts_kept(keep, experts)
    saved = routed - routed * count // experts
    saved += most_bytes(source, experts, "auto") - most_bytes(source, count, "auto")
    return Saving(keep, count, total - saved, saved)


def _legal(layer: MoeLayer, count: int) -> bool:
    if count < layer.top_k:
        return False
    try:
        if layer.groups > 1:
            check_groups(layer, count)
    except UsageError:
        return False
    return True


def _shared_experts(source: Source, layer: MoeLayer) -> int:
    """Always-on experts beside the routed ones; a wide shared MLP counts as the number of experts it is built from."""
    block = source.model.get_submodule(layer.block)
    if not any(getattr(block, name, None) is not None for name in ("shared_expert", "shared_experts", "shared_mlp")):
        return 0
    for field in ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"):
        value = getattr(source.config, field, None)
        if isinstance(value, int):
            return value
    return 1


def _peak(source: Source) -> int:
    """About one decoder layer computing and the next one being read, or embedding and head, beside a batch."""
    sizes: dict[str, int] = {}
    prefixes = tuple(f"{decoder_layers(source.model)[0]}.{index}." for index in range(source.config.num_hidden_layers))
    for target, pieces in source.layout.sources.items():
        part = next((prefix for prefix in prefixes if target.startswith(prefix)), target)
        sizes[part] = sizes.get(part, 0) + sum(piece.entry.nbytes for piece in pieces)
    batch = BATCH_TOKENS * int(source.model.get_decoder().config.hidden_size) * 4 * 6
    return _BASELINE_BYTES + 2 * max(sizes.values()) + batch


def _flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product here, in the model's dtype."""
    left, right = torch.ones(_PROBE, _PROBE, dtype=dtype), torch.ones(_PROBE, _PROBE, dtype=dtype)
    left @ right
    fastest = math.inf
    for _ in range(3):
        start = time.perf_counter()
        left @ right
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * _PROBE**3 / fastest


def _count(entry: Held) -> int:
    return math.prod(entry.shape)
