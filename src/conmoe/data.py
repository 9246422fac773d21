"""Calibration text -> token sequences: seeded, weighted, packed without padding.

Shape letters here: ``N`` sequences, ``S`` tokens per sequence.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from conmoe.builtin_text import BUILTIN_NAME, Part, builtin_documents
from conmoe.documents import HUB_PREFIX, Piece, check_source, cut, first_line, read_pieces
from conmoe.encode import encode
from conmoe.types import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BUILTIN_NAME",
    "DataSpec",
    "SourceCount",
    "TokenData",
    "TooLittleText",
    "builtin_documents",
    "check_tokenizer",
    "fingerprint",
    "load_tokenizer",
    "load_tokens",
    "overlap",
    "parse_spec",
]

# Text is held in memory for the tokens wanted, not for the whole source: a first guess, enlarged when it falls short.
_CHARACTERS_PER_TOKEN = 8
# Pieces are drawn from this much text at the head of a source; a hub data set is shuffled before, and downloaded.
_SCANNED_CHARACTERS = 2**28
_SCANNED_HUB_CHARACTERS = 2**24
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


class TooLittleText(UsageError):
    """The sources do not hold as many tokens as were asked for."""


@dataclass(frozen=True, slots=True)
class DataSpec:
    """One ``--data SPEC``: a file or ``hub:name[:config][:split]``, and its share of the tokens against the others."""

    source: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class SourceCount:
    """How much of the tokens one source gave, and from how many documents (or pieces of long ones)."""

    source: str
    weight: float
    sequences: int
    documents: int


@dataclass(frozen=True, slots=True)
class TokenData:
    """Token sequences without padding, and where they come from.

    ``fingerprint`` is the SHA-256 of the ids and their shape. ``documents`` are short hashes of the texts used, by
    which :func:`overlap` tells whether two sets of tokens share text.
    """

    ids_NS: Tensor
    sources: tuple[SourceCount, ...]
    fingerprint: str
    documents: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.ids_NS.ndim != 2 or self.ids_NS.dtype != torch.int64 or self.ids_NS.numel() == 0:
            raise UsageError("Token data must be an int64 tensor [sequences, length] that is not empty.")

    @property
    def tokens(self) -> int:
        return self.ids_NS.numel()


def parse_spec(text: str, option: str = "--data") -> DataSpec:
    """``PATH_OR_HUB[@WEIGHT]`` -> :class:`DataSpec`, checked to exist where that takes no download."""
    source, weight = text, 1.0
    if "@" in text and not Path(text).is_file():
        source, _, share = text.rpartition("@")
        try:
            weight = float(share)
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"{option} {text}: the weight after @ must be a number above 0, not {share!r}.")
    check_source(source, option)
    return DataSpec(source, weight)


def load_tokenizer(model_folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a checkpoint."""
    folder = Path(model_folder)
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}.")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(f"{folder} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}).")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers lets errors of every kind of tokenizer file through
        raise UsageError(f"The tokenizer in {folder} cannot be loaded: {first_line(error)}.") from error
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse a tokenizer whose ordinary vocabulary is larger than the model's embedding.

    Added tokens may lie beyond it (published models have such, never used in text): what really occurs is checked by
    :func:`load_tokens`.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UsageError(
            f"The tokenizer does not fit the model: it has {tokenizer.vocab_size:,} tokens, "
            f"the model's embedding {vocab_size:,}."
        )


def load_tokens(
    tokenizer: PreTrainedTokenizerBase,
    specs: Sequence[DataSpec],
    *,
    tokens: int,
    seq_len: int,
    seed: int = 0,
    part: Part = "calibration",
    shuffle: bool = True,
    vocab_size: int | None = None,
    without: Collection[str] = (),
) -> TokenData:
    """At most ``tokens`` tokens (but one sequence) of ``specs``, or of the built-in text where there are none.

    With ``shuffle`` the documents are drawn at random, without replacement; without it the text is taken as it comes,
    the convention of WikiText perplexity. Every sequence holds tokens of one source; sources give sequences in
    proportion to their weights, to within one. ``without`` are hashes of documents that are passed over: those of other
    ``TokenData``, of which this is to be the held-out part.
    """
    if tokens < 1 or seq_len < 2:
        raise UsageError(f"At least 1 token in sequences of at least 2 is needed, not {tokens} in {seq_len}.")
    specs = list(specs) or [DataSpec(BUILTIN_NAME)]
    shares = _shares(specs, max(1, tokens // seq_len))
    rows: list[list[int]] = []
    sources, documents = [], set()
    for index, (spec, count) in enumerate(zip(specs, shares, strict=True)):
        draw = _Draw(spec.source, part, f"{seed}:{index}", shuffle, frozenset(without))
        ids, digests = _fill(tokenizer, draw, count * seq_len)
        _require_enough(spec, len(ids), count, seq_len)
        rows += [ids[start : start + seq_len] for start in range(0, count * seq_len, seq_len)]
        sources.append(SourceCount(draw.name, spec.weight, count, len(digests)))
        documents.update(digests)
    if shuffle and len(specs) > 1:  # so that a prefix of the sequences is the same mix
        random.Random(f"{seed}:order").shuffle(rows)
    ids_NS = torch.tensor(rows, dtype=torch.int64)
    _check_ids(ids_NS, vocab_size)
    return TokenData(ids_NS, tuple(sources), fingerprint(ids_NS), tuple(sorted(documents)))


def fingerprint(ids_NS: Tensor) -> str:
    """SHA-256 over the shape and the ids."""
    digest = hashlib.sha256(repr(tuple(ids_NS.shape)).encode())
    digest.update(ids_NS.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def overlap(evaluation: Iterable[str], calibration: Iterable[str]) -> float:
    """The share of evaluation documents that were also calibrated on, from two ``TokenData.documents``."""
    wanted = set(evaluation)
    return len(wanted & set(calibration)) / max(1, len(wanted))


@dataclass(frozen=True, slots=True)
class _Draw:
    source: str
    part: Part
    seed: str
    shuffle: bool
    without: frozenset[str]

    @property
    def name(self) -> str:
        return f"{self.source}, {self.part} part" if self.source == BUILTIN_NAME or self.without else self.source

    @property
    def scanned(self) -> int:
        return _SCANNED_HUB_CHARACTERS if self.source.startswith(HUB_PREFIX) else _SCANNED_CHARACTERS

    def pieces(self) -> Iterator[Piece]:
        return (piece for piece in self._all() if not self.without or piece.digest not in self.without)

    def _all(self) -> Iterator[Piece]:
        if self.source == BUILTIN_NAME:
            return (piece for document in builtin_documents(self.part) for piece in cut(document))
        return read_pieces(self.source, random.Random(self.seed).randrange(2**31) if self.shuffle else None)


def _shares(specs: Sequence[DataSpec], sequences: int) -> list[int]:
    """Sequences per source by largest remainder; a tie goes to the first."""
    total = math.fsum(spec.weight for spec in specs)
    exact = [sequences * spec.weight / total for spec in specs]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(specs)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: sequences - sum(counts)]:
        counts[index] += 1
    for spec, count in zip(specs, counts, strict=True):
        if count == 0:
            raise TooLittleText(
                f"--data {spec.source}@{spec.weight:g} would give none of the {sequences} sequences; "
                "raise --tokens or its weight, lower --seq-len, or leave it out."
            )
    return counts


def _fill(tokenizer: PreTrainedTokenizerBase, draw: _Draw, wanted: int) -> tuple[list[int], list[str]]:
    """``wanted`` tokens, or fewer if the source has no more, and the hashes of the pieces they came from."""
    if not draw.shuffle:
        return encode(tokenizer, draw.pieces(), wanted, apart=False)
    budget = wanted * _CHARACTERS_PER_TOKEN
    while True:
        # What a small budget keeps comes first in what a large one keeps: the result does not depend on it.
        pieces, everything = _sample(draw, budget)
        ids, digests = encode(tokenizer, pieces, wanted, apart=True)
        if len(ids) >= wanted or everything:
            return ids, digests
        budget *= 4


def _sample(draw: _Draw, budget: int) -> tuple[list[Piece], bool]:
    """The pieces of lowest random number that together reach ``budget`` characters, and whether those are all.

    One pass with a heap: every document of the file has the same chance, and memory holds only what is kept.
    """
    number = random.Random(draw.seed)
    heap: list[tuple[float, int, Piece]] = []
    held = scanned = dropped = 0
    for index, piece in enumerate(draw.pieces()):
        heapq.heappush(heap, (-number.random(), index, piece))
        held, scanned = held + piece.characters, scanned + piece.characters
        while held - heap[0][2].characters >= budget:
            held -= heapq.heappop(heap)[2].characters
            dropped += 1
        if scanned >= max(draw.scanned, 4 * budget):
            dropped += 1
            break
    return [piece for _, _, piece in sorted(heap, key=lambda entry: (-entry[0], entry[1]))], dropped == 0


def _require_enough(spec: DataSpec, found: int, count: int, seq_len: int) -> None:
    if found < count * seq_len:
        raise TooLittleText(
            f"{spec.source} holds {found:,} tokens, but {count * seq_len:,} are needed of it ({count:,} sequences of "
            f"{seq_len:,}); lower --tokens or --seq-len, or add --data."
        )


def _check_ids(ids_NS: Tensor, vocab_size: int | None) -> None:
    highest = int(ids_NS.max())
    if vocab_size is not None and highest >= vocab_size:
        raise UsageError(
            f"The tokenizer does not fit the model: the text holds token {highest:,}, "
            f"the model's embedding ends at {vocab_size - 1:,}."
        )
