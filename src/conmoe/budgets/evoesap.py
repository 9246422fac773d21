"""EvoESAP: a search for the counts whose model speaks most like the source (arXiv 2603.06003)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import torch
from torch import Generator, Tensor

from conmoe.artifacts import read_measured, read_tokens, write_json
from conmoe.budgets import Context
from conmoe.observe import IMPLEMENTATION
from conmoe.outputs import forget_prototypes
from conmoe.preview import preview
from conmoe.registry import budget
from conmoe.search import Counts, Space, evolve, first_population
from conmoe.source import open_source
from conmoe.stream import LOGIT_TOKENS, Stream, open_stream
from conmoe.types import UsageError

#: What was measured so far, in the folder of the plan.
MEASURED = "search.json"


@budget("evoesap", paper="https://arxiv.org/abs/2603.06003")
def evoesap(
    context: Context,
    *,
    sequences: Annotated[int, "calibration sequences to measure on, the first ones"] = 64,
    population: Annotated[int, "candidates of a generation"] = 32,
    generations: Annotated[int, "generations, the first included"] = 50,
    elites: Annotated[int, "fittest candidates of a generation, which live on and have all the children"] = 4,
    seed: Annotated[int, "seed of the search"] = 0,
) -> list[int]:
    """Counts found by evolution: those whose model gives next tokens most nearly the source's probabilities.

    Which experts a layer keeps at each count is the method's decision; only the counts are searched, their sum fixed.
    The fitness is ESAP, the mean over tokens of ``sum over the vocabulary of min(p_source, p_candidate)`` = 1 - total
    variation, both models reading the calibration text: the chance that speculative decoding would accept the
    candidate's token. The search is that of :mod:`conmoe.search`. Departures: the authors take the answers to 64 maths
    problems, we every token of the calibration sequences; equal candidates count once among the elites; with any
    method, and with scopes.

    Cost: ``population + (generations - 1) (population - elites)`` candidates, 1,404 by default, less those met twice.
    Each is one pass of ``sequences`` through a model whose layers are made from the source's files on the way, plus
    the head of both. So each candidate reads the weights once (14 GB for 7B parameters; keep the files where the
    system can cache them) and computes twice the active parameters for each token (85 TFLOP for 64 sequences of 512
    tokens and 1.3B): minutes to hours on a GPU, and on a CPU only with few sequences, candidates and generations. The
    method plans each layer at each count that is tried, once: nothing for a score, much for one that compares outputs
    or aligns experts; its new weights, if it makes any, take disk for every count (memory, if the plan has no folder).
    A killed search goes on: ``search.json`` beside the plan has every candidate that was measured.
    """
    if min(sequences, population, generations, elites) < 1 or elites > population:
        raise UsageError(
            "evoesap takes at least one sequence, candidate, generation and elite, and no fewer candidates than elites."
        )
    space = Space(context.floor, context.cap, context.total, context.step)
    generator = Generator().manual_seed(seed)
    fits = all(low <= count for low, count in zip(context.floor, context.uniform, strict=True))
    even = context.uniform if fits else space.keeping([1.0] * len(context.uniform))  # protected experts need more
    first = first_population(space, population, even, generator)
    candidates = population + (generations - 1) * (population - elites)
    with ExitStack() as stack:
        advance = stack.enter_context(context.progress.stage("search", candidates, "candidates"))
        fitness = _remembered(_Esap(context, sequences, stack), context.work)
        best = evolve(
            first,
            space,
            fitness,
            size=population,
            generations=generations,
            elites=elites,
            generator=generator,
            advance=advance,
        )
        context.progress.note(f"ESAP {fitness(first[0]):.4f} with equal counts, {fitness(best):.4f} with those found.")
    return list(best)


class _Esap:
    """``counts -> ESAP`` of the model that would keep so many; the source runs when it is first asked."""

    def __init__(self, context: Context, sequences: int, stack: ExitStack) -> None:
        self._context, self._stack = context, stack
        self._ids_NS = read_tokens(context.statistics)[:sequences]
        self._reference: Stream | None = None

    def __call__(self, counts: Counts) -> float:
        context = self._context
        plan = context.assemble([context.plan_scope(scope, keep) for scope, keep in enumerate(counts)])
        trust = context.request.trust_remote_code
        candidate = preview(
            context.source, plan, "shared", experts_implementation=IMPLEMENTATION, trust_remote_code=trust
        )
        device = context.request.device
        if self._reference is None:
            source = open_source(context.source.folder, experts_implementation=IMPLEMENTATION, trust_remote_code=trust)
            self._reference = self._stack.enter_context(open_stream(source, self._ids_NS, device=device))
            self._reference.run()
        with open_stream(candidate, self._ids_NS, device=device) as stream:
            stream.run()
            forget_prototypes()
            return esap(stream, self._reference)


def esap(one: Stream, other: Stream) -> float:
    """The mean over all tokens of the probability that two models, which the text has run through, have in common."""
    with one.head() as one_head, other.head() as other_head:
        N, S = one.ids_NS.shape
        shared = 0.0
        for n in range(N):
            finals = one.final(n, n + 1), other.final(n, n + 1)
            for start in range(0, S, LOGIT_TOKENS):
                chunk = slice(start, start + LOGIT_TOKENS)
                p_SV, q_SV = one_head(finals[0][:, chunk])[0], other_head(finals[1][:, chunk])[0]
                shared += float(overlap(p_SV, q_SV).sum(dtype=torch.float64))
    return shared / (N * S)


def overlap(one_SV: Tensor, other_SV: Tensor) -> Tensor:
    """``sum over v of min(p_v, q_v)`` of softmaxes of logits, from 0 to 1, and exactly 1 for equal ones."""
    variation_S = (one_SV.float().softmax(-1) - other_SV.float().softmax(-1)).abs().sum(-1) / 2
    return 1 - variation_S.clamp_max(1)


def _remembered(fitness: Callable[[Counts], float], work: Path | None) -> Callable[[Counts], float]:
    """``fitness``, each candidate once, also over runs if there is a folder."""
    file = work and work / MEASURED
    known: dict[str, float] = read_measured(file)

    def remembered(counts: Counts) -> float:
        name = ",".join(map(str, counts))
        if name not in known:
            known[name] = fitness(counts)
            if file:
                write_json(file, known)
        return known[name]

    return remembered
