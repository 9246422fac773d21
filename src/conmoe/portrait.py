"""What a report draws of a result and no other file has: use of experts, the map, similarities, what was lost where.

Taken while the statistics are still there, and kept beside the result as ``conmoe/report.json``.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from conmoe.artifacts import Record, parse_record, read_layer
from conmoe.data import TokenData, load_tokenizer
from conmoe.diagnosis import Planned, Use
from conmoe.doctor import glance, layer_use
from conmoe.ops.experts import select
from conmoe.ops.halves import first_drawn
from conmoe.ops.similarity import TINY, output_cosine
from conmoe.source import Source, read_experts
from conmoe.types import LayerPlan, Plan, ScopePlan, UsageError

REPORT_JSON = "report.json"
FORMAT = 1
#: Tokens of a layer's sample that errors are measured on, and similarities: enough for a picture, cheap to look at.
TOKENS, SIMILAR_TOKENS = 1024, 256
#: Experts whose similarities are kept: of a larger layer those that are used most.
LARGEST = 64
#: Sequences and tokens that lost most, and how much text is shown of them.
WORST_SEQUENCES, WORST_TOKENS, SHOWN_TOKENS, CONTEXT = 8, 20, 48, 12


class LayerPortrait(Record):
    """One scope: who answers for whom, how often each expert is chosen, what is lost."""

    layers: tuple[int, ...]
    assignment: tuple[int, ...]  # of each expert; -1: dropped, from the number of prototypes on: a constant
    made_of: tuple[int, ...]  # the expert with the largest share in each prototype
    mixed: bool  # whether a prototype is anything but a copy of an expert
    condensed: bool  # the layer has no router any more
    tokens: tuple[int, ...]  # calibration tokens of each expert
    contribution: tuple[float, ...]  # share of each expert in the sum of gate times norm of output
    uses: tuple[Use, ...]  # of each layer
    planned: Planned  # predicted and measured errors, and the method on two halves of the sample, not refined
    similar: tuple[int, ...]  # the experts of the matrix, those with the same prototype beside each other
    similarity: tuple[tuple[float, ...], ...]  # mean cosine of the outputs of two experts for the same token

    @model_validator(mode="after")
    def _fits(self) -> LayerPortrait:
        E, S = len(self.assignment), len(self.similar)
        if not len(self.tokens) == len(self.contribution) == E or [len(row) for row in self.similarity] != [S] * S:
            raise ValueError("the numbers of a layer differ in length")
        return self


class LostText(Record):
    """A sequence of the held-out text and its mean KL."""

    text: str
    kl: float


class LostToken(Record):
    """A place of the held-out text where source and result differ most."""

    before: str
    kl: float
    next: str  # what the text goes on with
    source: str  # the most likely token of the source
    result: str


class Portrait(Record):
    """Everything of one result that the page draws."""

    format: int = FORMAT
    command: str = ""
    scopes: tuple[LayerPortrait, ...] = Field(min_length=1)
    texts: tuple[LostText, ...] = ()
    tokens: tuple[LostToken, ...] = ()
    not_finite: int = 0  # sequences whose KL is no number


def portray(
    source: Source,
    statistics: Path,
    plan: Plan,
    *,
    lost: Lost | None = None,
    command: str = "",
    device: str = "cpu",
    advance: Callable[[int], None] = lambda layers: None,
) -> Portrait:
    """Look at every planned layer, on a part of its sample.

    Args:
        source: the checkpoint that was compressed.
        statistics: what the plan was made from.
        plan: of the result.
        lost: what watched the evaluation, if there was one.
        command: what was typed.
        device: where to compute.
        advance: called with the number of layers that were looked at.
    """
    scopes = []
    for scope in plan.scopes:
        scopes.append(_scope(source, statistics, plan, scope, device))
        advance(len(scope.layers))
    texts, tokens = lost.worst() if lost else ((), ())
    not_finite = lost.not_finite if lost else 0
    return Portrait(command=command, scopes=tuple(scopes), texts=texts, tokens=tokens, not_finite=not_finite)


def load_portrait(file: Path) -> Portrait | None:
    """What lies beside a result; None if nothing does.

    Raises:
        ConmoeError: it is damaged, or of another version.
    """
    return parse_record(Portrait, file, FORMAT) if file.is_file() else None


class Lost:
    """Watches an evaluation (:data:`conmoe.evaluate.fidelity.Watch`) and remembers where most was lost."""

    def __init__(self, data: TokenData, model: Path, *, trust_remote_code: bool = False) -> None:
        self.ids_NS = data.ids_NS
        self.tokenizer: Any = None
        with suppress(UsageError):  # text is for people; without a tokenizer they see the numbers of tokens
            self.tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        self.not_finite = 0
        self.sequences: list[tuple[float, int]] = []
        self.tokens: list[tuple[float, int, int, int, int]] = []

    def __call__(self, n: int, kl_S: Tensor, source_S: Tensor, model_S: Tensor) -> None:
        if not bool(torch.isfinite(kl_S).all()):
            self.not_finite += 1
            return
        self.sequences.append((float(kl_S.mean()), -n))
        kl_S = kl_S[:-1]  # what follows the last position is not in the text
        for position in kl_S.topk(min(WORST_TOKENS, len(kl_S))).indices.tolist():
            found = (float(kl_S[position]), -n, -position, int(source_S[position]), int(model_S[position]))
            heapq.heappush(self.tokens, found)
        self.tokens = heapq.nlargest(WORST_TOKENS, self.tokens)
        self.sequences = heapq.nlargest(WORST_SEQUENCES, self.sequences)

    def worst(self) -> tuple[tuple[LostText, ...], tuple[LostToken, ...]]:
        """The sequences and the tokens of largest KL, the largest first."""
        texts = [LostText(text=self._decode(-n, 0, SHOWN_TOKENS), kl=kl) for kl, n in self.sequences]
        tokens = [
            LostToken(
                before=self._decode(-n, max(0, -position - CONTEXT), -position + 1),
                kl=kl,
                next=self._decode(-n, -position + 1, -position + 2),
                source=self._text([source]),
                result=self._text([model]),
            )
            for kl, n, position, source, model in self.tokens
        ]
        return tuple(texts), tuple(tokens)

    def _decode(self, n: int, start: int, end: int) -> str:
        return self._text(self.ids_NS[n, start:end].tolist())

    def _text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else str(self.tokenizer.decode(ids))


def _scope(source: Source, statistics: Path, made: Plan, scope: ScopePlan, device: str) -> LayerPortrait:
    by_index = {layer.index: layer for layer in source.layers}
    plan, known = scope.plan, [read_layer(statistics, index) for index in scope.layers]
    count_E = torch.cat([each.sums["count"] for each in known])
    mass_E = torch.cat([each.sums["gate_norm"] for each in known]).double()
    sampled = known[0].sample.hidden_nD.shape[0] > 0
    shown = _shown(plan, count_E) if sampled and len(known) == 1 else []
    cosine_EE = torch.zeros(0, 0)
    if shown:
        experts = select(read_experts(source, by_index[scope.layers[0]]), torch.tensor(shown))
        cosine_EE = output_cosine(first_drawn(known[0].sample, SIMILAR_TOKENS), experts)
    return LayerPortrait(
        layers=scope.layers,
        assignment=tuple(plan.assignment_E.tolist()),
        made_of=tuple(plan.mixing_KE.argmax(dim=1).tolist()) if plan.mixing_KE.shape[0] else (),
        mixed=bool(plan.weights) or bool(((plan.mixing_KE != 0).sum(dim=1) > 1).any()),
        condensed=plan.static_K is not None,
        tokens=tuple(int(count) for count in count_E.tolist()),
        contribution=tuple(round(share, 6) for share in (mass_E / mass_E.sum().clamp_min(TINY)).tolist()),
        uses=tuple(layer_use(index, each) for index, each in zip(scope.layers, known, strict=True)),
        planned=glance(source, statistics, made, scope, tokens=TOKENS, device=device),
        similar=tuple(shown),
        similarity=tuple(tuple(round(value, 3) for value in row) for row in cosine_EE.tolist()),
    )


def _shown(plan: LayerPlan, count_E: Tensor) -> list[int]:
    """The most used experts, those that share a prototype beside each other, each prototype's own expert first."""
    used: Sequence[int] = count_E.argsort(descending=True, stable=True)[:LARGEST].tolist()
    made_of = plan.mixing_KE.argmax(dim=1).tolist()
    K = len(made_of)

    def place(expert: int) -> tuple[int, bool, int]:
        prototype = int(plan.assignment_E[expert])
        return (
            (prototype if prototype >= 0 else K + int(count_E.numel())),
            (not (0 <= prototype < K and made_of[prototype] == expert)),
            expert,
        )

    return sorted(used, key=place)
