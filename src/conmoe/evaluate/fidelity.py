"""Fidelity: how close a compressed model stays to its source, token by token.

Both models are streamed layer by layer over the same sequences; the logits of a few hundred tokens exist at a time.
KL(source || compressed) and top-1 agreement are taken at every position, the loss at every position with a next token.
Numbers are means over tokens; their standard errors are over sequences, the independent unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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

    def as_json(self) -> dict[str, Any]:
        """Plain numbers; a standard error that cannot be known is null."""

        def plain(value: Any) -> Any:
            if isinstance(value, Measured):
                return {"value": value.value, "stderr": None if math.isnan(value.stderr) else value.stderr}
            return value

        return {name: plain(getattr(self, name)) for name in self.__dataclass_fields__}


def evaluate(
    model: Path,
    data: TokenData,
    *,
    against: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Fidelity:
    """Measure ``model`` on held-out text, and its distance from ``against``.

    Args:
        model: a checkpoint, compressed or not.
        data: token sequences that were not used for calibration.
        against: the source checkpoint to compare with.
        device: where to compute.
        dtype: in which to compute; by default each checkpoint's own.
        trust_remote_code: run modelling code that comes with a checkpoint.
        advance: called with the number of tokens that passed one more layer of either model.
    """
    sources = [
        open_source(folder, dtype=dtype, experts_implementation=IMPLEMENTATION, trust_remote_code=trust_remote_code)
        for folder in (model, against)
        if folder is not None
    ]
    check_vocabularies(sources, data)
    with ExitStack() as stack:
        passed = stack.enter_context(run_through(sources[1], data, device, advance)) if against else None
        return measure(sources[0], data, passed, device=device, advance=advance)


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
    device: str = "cpu",
    advance: Callable[[int], None] = lambda tokens: None,
) -> Fidelity:
    """Like :func:`evaluate`, of an opened model, and against a source that the text has already run through."""
    ranks = Ranks.join()
    with run_through(model, data, device, advance) as stream:
        streams = [stream] if against is None else [stream, against]
        rows = ranks.gather_rows(_score(streams, stream.ids_NS))
    return _summary(torch.cat(rows) if rows else torch.zeros(0, 4), data, [each.source for each in streams])


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


def _score(streams: list[Stream], ids_NS: Tensor) -> Tensor:
    """Per sequence: loss, source loss, KL, agreement (the last three NaN without a source)."""
    rows = []
    with ExitStack() as stack:
        heads = [stack.enter_context(stream.head()) for stream in streams]
        for n, ids_S in enumerate(ids_NS):
            finals = [stream.final(n, n + 1) for stream in streams]
            totals = torch.zeros(4, dtype=torch.float64)
            for start in range(0, len(ids_S), LOGIT_TOKENS):
                chunk = slice(start, start + LOGIT_TOKENS)
                logp = [
                    head(final[:, chunk])[0].float().log_softmax(-1) for head, final in zip(heads, finals, strict=True)
                ]
                totals += _chunk_totals(logp, ids_S[start + 1 : start + LOGIT_TOKENS + 1])
            S = len(ids_S)
            rows.append(totals / torch.tensor([S - 1, S - 1, S, S]))
    return torch.stack(rows)


def _chunk_totals(logp: list[Tensor], next_ids: Tensor) -> Tensor:
    """Sums over a chunk of negative log likelihood (model, source), KL and agreement."""
    next_ids = next_ids.to(logp[0].device)
    losses = [-part[: len(next_ids)].gather(1, next_ids[:, None]).sum(dtype=torch.float64) for part in logp]
    if len(logp) == 1:
        return torch.stack([losses[0].cpu(), *[torch.tensor(math.nan, dtype=torch.float64)] * 3])
    model, source = logp
    agree = (model.argmax(-1) == source.argmax(-1)).sum().double()
    # A token that the source rules out contributes nothing, whatever the model says; anything else not finite shows.
    terms = (source.exp() * (source - model)).masked_fill(source == -math.inf, 0.0)
    kl = terms.sum(dtype=torch.float64)
    return torch.stack([losses[0], losses[1], kl, agree]).cpu()


def _summary(rows: Tensor, data: TokenData, sources: list[Source]) -> Fidelity:
    loss, source_loss, kl, agreement = (rows[:, column] for column in range(4))
    mean = _measured(loss)
    sizes = [_size(source) for source in sources]
    fidelity: dict[str, Any] = {
        "tokens": data.tokens,
        "sequences": data.ids_NS.shape[0],
        "loss": mean,
        "perplexity": Measured(math.exp(mean.value), math.exp(mean.value) * mean.stderr),
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


def _size(source: Source) -> tuple[int, int]:
    """Parameters and bytes on disk; maps, gains and the like count as bytes, not as parameters."""
    counted = (entry for entry in source.tensors if not entry.name.endswith(_TABLES))
    bytes_ = sum(entry.nbytes for entry in source.entries.values())
    return sum(math.prod(entry.shape) for entry in counted), bytes_
