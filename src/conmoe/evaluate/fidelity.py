"""Fidelity: how close a compressed model stays to its source, token by token.

Both models are streamed layer by layer over the same sequences; the logits of a few hundred tokens exist at a time.
KL(source || compressed) and top-1 agreement are taken at every position, the loss at every position with a next token.
Numbers are means over tokens; their standard errors are over sequences, the independent unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conmoe.data import TokenData
from conmoe.observe import IMPLEMENTATION
from conmoe.parallel import Ranks
from conmoe.source import Source, open_source
from conmoe.stream import LOGIT_TOKENS, Stream, open_stream
from conmoe.types import UsageError

#: Told of every sequence that is compared: its number, and of its ``S`` positions the KL, the most likely next token of
#: the source, and that of the model.
Watch = Callable[[int, Tensor, Tensor, Tensor], None]

#: Tensors of a consolidated checkpoint that say where things are, not what they weigh.
_TABLES = ("expert_map", "expert_gain", "expert_skip", "static_gate", "gate_index", "up_index", "down_index")


@dataclass(frozen=True, slots=True)
class Measured:
    """A mean over sequences and its standard error (NaN for a single sequence)."""

    value: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What an evaluation measured; the paired numbers are None where there was no source to compare with."""

    tokens: int
    sequences: int
    loss: Measured  # nats per token
    perplexity: Measured
    parameters: int
    bytes: int
    source_loss: Measured | None = None
    excess_loss: Measured | None = None
    kl: Measured | None = None  # KL(source || model), nats per token
    top1_agreement: Measured | None = None
    source_parameters: int | None = None
    source_bytes: int | None = None
    domains: Mapping[str, Fidelity] = field(default_factory=dict)  # the same of each named part of the text

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, without those of domains; a standard error that cannot be known is null."""

        def plain(value: Any) -> Any:
            if isinstance(value, Measured):
                return {"value": value.value, "stderr": None if math.isnan(value.stderr) else value.stderr}
            return value

        return {name: plain(getattr(self, name)) for name in self.__dataclass_fields__ if name != "domains"}


def evaluate(
    model: Path,
    data: TokenData,
    *,
    against: Path | None = None,
    domains: Sequence[str] = (),
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    advance: Callable[[int], None] = lambda tokens: None,
    watch: Watch | None = None,
) -> Fidelity:
    """Measure ``model`` on held-out text, and its distance from ``against``.

    Args:
        model: a checkpoint, compressed or not.
        data: token sequences that were not used for calibration.
        against: the source checkpoint to compare with.
        domains: a name for each source of ``data``, whose sequences must follow one another (not shuffled): numbers of
            each domain, beside those of all text.
        device: where to compute.
        dtype: in which to compute; by default each checkpoint's own.
        trust_remote_code: run modelling code that comes with a checkpoint.
        advance: called with the number of tokens that passed one more layer of either model.
        watch: told of every sequence of this process's share, where there is a source to compare with.
    """
    sources = [
        open_source(folder, dtype=dtype, experts_implementation=IMPLEMENTATION, trust_remote_code=trust_remote_code)
        for folder in (model, against)
        if folder is not None
    ]
    check_vocabularies(sources, data)
    with ExitStack() as stack:
        passed = stack.enter_context(run_through(sources[1], data, device, advance)) if against else None
        return measure(sources[0], data, passed, domains=domains, device=device, advance=advance, watch=watch)


@contextmanager
def run_through(
    source: Source, data: TokenData, device: str, advance: Callable[[int], None] = lambda tokens: None
) -> Iterator[Stream]:
    """This process's share of ``data``, run through all layers of ``source``: what several models are compared with."""
    mine = Ranks.join().share(data.ids_NS.shape[0])
    with open_stream(source, data.ids_NS[mine.start : mine.stop], device=device) as stream:
        stream.run(advance=advance)
        yield stream


def measure(
    model: Source,
    data: TokenData,
    against: Stream | None,
    *,
    domains: Sequence[str] = (),
    device: str = "cpu",
    advance: Callable[[int], None] = lambda tokens: None,
    watch: Watch | None = None,
) -> Fidelity:
    """Like :func:`evaluate`, of an opened model, and against a source that the text has already run through."""
    ranks = Ranks.join()
    with run_through(model, data, device, advance) as stream:
        streams = [stream] if against is None else [stream, against]
        rows = ranks.gather_rows(_score(streams, stream.ids_NS, watch))
    everything, sources = torch.cat(rows) if rows else torch.zeros(0, 4), [each.source for each in streams]
    found, start = _summary(everything, data.ids_NS.shape[1], sources), 0
    parts = {}
    for name, part in zip(domains, data.sources, strict=bool(domains)):
        parts[name] = _summary(everything[start : start + part.sequences], data.ids_NS.shape[1], sources)
        start += part.sequences
    return replace(found, domains=parts)


def check_vocabularies(sources: list[Source], data: TokenData) -> None:
    """Raise a UsageError unless all models can read the tokens and be compared."""
    sizes = [source.vocabulary for source in sources]
    if len(set(sizes)) > 1:
        raise UsageError(
            f"The two models have vocabularies of {sizes[0]} and {sizes[1]} tokens; they cannot be compared."
        )
    if int(data.ids_NS.max()) >= sizes[0]:
        raise UsageError(
            f"The text has token ids beyond the model's vocabulary of {sizes[0]}; the tokenizer does not fit."
        )


def _score(streams: list[Stream], ids_NS: Tensor, watch: Watch | None = None) -> Tensor:
    """Per sequence: loss, source loss, KL, agreement (the last three NaN without a source)."""
    rows = []
    with ExitStack() as stack:
        heads = [stack.enter_context(stream.head()) for stream in streams]
        for n, ids_S in enumerate(ids_NS):
            finals = [stream.final(n, n + 1) for stream in streams]
            totals, seen = torch.zeros(4, dtype=torch.float64), []
            for start in range(0, len(ids_S), LOGIT_TOKENS):
                chunk = slice(start, start + LOGIT_TOKENS)
                logp = [
                    head(final[:, chunk])[0].float().log_softmax(-1) for head, final in zip(heads, finals, strict=True)
                ]
                next_ids = ids_S[start + 1 : start + LOGIT_TOKENS + 1].to(logp[0].device)
                losses = [-part[: len(next_ids)].gather(1, next_ids[:, None]).sum(dtype=torch.float64) for part in logp]
                if len(logp) == 1:
                    totals += torch.stack([losses[0].cpu(), *[torch.tensor(math.nan, dtype=torch.float64)] * 3])
                    continue
                kl_S, source_S, model_S = compare(*logp)
                agree = (model_S == source_S).sum().double()
                totals += torch.stack([*losses, kl_S.sum(dtype=torch.float64), agree]).cpu()
                seen.append((kl_S.cpu(), source_S.cpu(), model_S.cpu()))
            if watch and seen:
                watch(n, *(torch.cat(parts) for parts in zip(*seen, strict=True)))
            S = len(ids_S)
            rows.append(totals / torch.tensor([S - 1, S - 1, S, S]))
    return torch.stack(rows)


def compare(model_SV: Tensor, source_SV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(source || model) at each position, and the most likely tokens of source and model, from log-probabilities."""
    # A token that the source rules out contributes nothing, whatever the model says; anything else not finite shows.
    terms_SV = (source_SV.exp() * (source_SV - model_SV)).masked_fill(source_SV == -math.inf, 0.0)
    return terms_SV.sum(dim=-1, dtype=torch.float64), source_SV.argmax(-1), model_SV.argmax(-1)


def _summary(rows: Tensor, seq_len: int, sources: list[Source]) -> Fidelity:
    loss, source_loss, kl, agreement = (rows[:, column] for column in range(4))
    mean = _measured(loss)
    sizes = [_size(source) for source in sources]
    fidelity: dict[str, Any] = {
        "tokens": len(rows) * seq_len,
        "sequences": len(rows),
        "loss": mean,
        "perplexity": _perplexity(mean),
        "parameters": sizes[0][0],
        "bytes": sizes[0][1],
    }
    if len(sources) == 2:
        fidelity |= {
            "source_loss": _measured(source_loss),
            "excess_loss": _measured(loss - source_loss),
            "kl": _measured(kl),
            "top1_agreement": _measured(agreement),
            "source_parameters": sizes[1][0],
            "source_bytes": sizes[1][1],
        }
    return Fidelity(**fidelity)


def _measured(values: Tensor) -> Measured:
    n = len(values)
    stderr = float(values.std(unbiased=True) / math.sqrt(n)) if n > 1 else math.nan
    return Measured(float(values.mean()), stderr)


def _perplexity(loss: Measured) -> Measured:
    """``exp`` of a loss and the error that follows; infinite above 709 nats, where a float ends."""
    try:
        value = math.exp(loss.value)
    except OverflowError:
        return Measured(math.inf, math.nan)
    return Measured(value, value * loss.stderr)


def _size(source: Source) -> tuple[int, int]:
    """Parameters and bytes on disk; maps, gains and the like count as bytes, not as parameters."""
    counted = (entry for entry in source.tensors if not entry.name.endswith(_TABLES))
    bytes_ = sum(entry.nbytes for entry in source.entries.values())
    return sum(math.prod(entry.shape) for entry in counted), bytes_
