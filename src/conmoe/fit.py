"""How much to keep, where a size is asked for.

`--fit 24GB` keeps as many experts of each layer as fit into it, in place of `--keep`. It also takes `500MB`, `20GiB`
(kB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB of 1024) and `60%` of the source's bytes:

    conmoe compress Qwen/Qwen3-30B-A3B qwen-small --fit 40GB --data wiki.txt

The count is found before any calibration, from the headers of the checkpoint alone, and exactly: what is counted is
what `conmoe apply` would write in the form that the request takes, prototypes, router rows, maps and all the rest of
the model. One expert a layer more would be too large. Only counts that the router can work with are tried: with
groups, multiples of them. Headers of files, the tokenizer and the configuration come on top. A head that predicts
further tokens is counted as `conmoe apply` prunes it (a little too much, where it has to be dropped).

With `--scope` the pool of a scope holds so many for each of its layers. A budget shares out as many in all; where it
may give layers different numbers, the size is that of the shared form. It goes with every method whose results have a
size that follows from their counts, which leaves out `mc-smoe` (factors) and `cd-moe` (whole layers).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from conmoe.allocate import parse_counts, parse_size
from conmoe.apply import result_config, settle_heads
from conmoe.moe import MoeLayer, count_field
from conmoe.mtp import Policy, most_bytes, stated
from conmoe.ops.plans import identity, prune, remap
from conmoe.outputs import plan_outputs
from conmoe.progress import Progress
from conmoe.registry import Form
from conmoe.report.numbers import size as shown
from conmoe.request import FACTORED, Asked, Request, check_request
from conmoe.source import Source, outline_experts
from conmoe.types import LayerPlan, Plan, ScopePlan, UsageError

#: How many constant vectors the plan of a scope may hold, by its options, prototypes and logical experts.
CONSTANTS: Mapping[str, Callable[[Mapping[str, Any], int, int], int]] = {
    "mone": lambda options, K, M: M - K,
    "conmoe": lambda options, K, M: int(options["redirect"] == "zero"),
}


@dataclass(frozen=True, slots=True)
class Fitted:
    """A request with the ``keep`` that fits, and the result that it makes."""

    request: Request
    kept: int  # experts of each layer
    experts: int
    form: Form
    bytes: int  # of all tensors of the result


def fitted(source: Source, request: Request, progress: Progress, mtp: Policy = "auto") -> Request:
    """The request with a ``keep`` in place of ``fit``, if it has one, and a note of what was chosen.

    Raises:
        UsageError: see :func:`fit`.
    """
    if not request.fit:
        return request
    found = fit(source, request, mtp)
    progress.note(
        f"--fit {request.fit}: keeps {found.kept} of {found.experts} experts a layer, {shown(found.bytes)} in the "
        f"{found.form} form."
    )
    return found.request


def fit(source: Source, request: Request, mtp: Policy = "auto") -> Fitted:
    """The largest number of experts a layer whose result is no larger than ``request.fit``.

    Which experts stay does not matter to the size, nor how a budget shares them out, except that counts which may
    differ between layers take the shared form.

    Raises:
        UsageError: nothing that is allowed is so small, the model is no larger, or sizes are known only after planning.
    """
    whole = sum(entry.nbytes for entry in source.entries.values())
    limit = parse_size(request.fit, whole)
    if request.keep or parse_counts(request.budget):
        other = f"--keep {request.keep}" if request.keep else f"--budget {request.budget}"
        raise UsageError(f"--fit chooses how much to keep, and so does {other}; leave one of them out.")
    allowed = _allowed(source, request)
    if limit >= whole:
        raise UsageError(
            f"--fit {request.fit}: the model has {shown(whole)} and fits as it is; there is nothing to do."
        )

    def bytes_at(kept: int) -> int:
        return _bytes(source, allowed[kept], lambda config, form: most_bytes(source, _count(source, config), mtp))

    counts = sorted(allowed)
    place = bisect_right(counts, limit, key=bytes_at)
    if place == 0:
        raise UsageError(
            f"--fit {request.fit} is less than the smallest that can be made, {shown(bytes_at(counts[0]))} with "
            f"{counts[0]} expert{'s' * (counts[0] != 1)} a layer; allow more."
        )
    kept = counts[place - 1]
    asked = allowed[kept]
    resolved = replace(request, keep=str(kept), fit="")
    written = _bytes(source, asked, lambda config, form: _head(source, config, form, mtp))
    return Fitted(resolved, kept, source.layers[0].logical, _form(asked), written)


def _allowed(source: Source, request: Request) -> dict[int, Asked]:
    """How many experts of a layer may stay, and the request with so many."""

    def ask(kept: int) -> Asked:
        return check_request(source.layers, replace(request, keep=str(kept), fit=""))

    E = source.layers[0].logical
    found = {E: ask(E)}  # what is wrong with the request beside its counts is raised here
    _check_sizes(found[E])
    refused: UsageError | None = None
    for kept in range(E - 1, 0, -1):
        try:
            found[kept] = ask(kept)
        except UsageError as error:
            refused = refused or error
    if len(found) == 1 and refused:
        raise refused
    return found


def _check_sizes(asked: Asked) -> None:
    """Raise unless the size of a result follows from its counts, and falls with them."""
    if asked.method.condenses or asked.method.name in FACTORED:
        raise UsageError(f"The size of what {asked.method.name!r} makes is not known before it is made; use --keep.")
    if asked.form == "expanded":
        raise UsageError("The expanded form is as large as the source, so --fit cannot choose; use --form shared.")


def _form(asked: Asked) -> Form:
    """The form of the result; that of layers of several sizes, if the budget may come to that."""
    return "shared" if not asked.budget.even and asked.counts != asked.cap and asked.form == "sliced" else asked.form


def _count(source: Source, config: Mapping[str, Any]) -> int:
    return int(config[stated(source, config, count_field(source.config))[0]])


def _head(source: Source, config: Mapping[str, Any], form: Form, mtp: Policy) -> int:
    return sum(output.nbytes for output in settle_heads(source, config, form, mtp).outputs)


def _bytes(source: Source, asked: Asked, heads: Callable[[Mapping[str, Any], Form], int]) -> int:
    """What the tensors of the result take; ``heads`` says what those that predict further tokens do."""
    scopes = tuple(
        ScopePlan(tuple(layer.index for layer in scope), _stand_in(source, asked, scope[0], count, experts))
        for scope, count, experts in zip(asked.scopes, asked.counts, asked.cap, strict=True)
    )
    form = _form(asked)
    plan = Plan(scopes, asked.method.name, asked.options, asked.keep, form, {}, "", "", "")
    head = heads(result_config(source, plan, form), form)
    return head + sum(output.nbytes for output in plan_outputs(source, plan, form)[0])


def _stand_in(source: Source, asked: Asked, layer: MoeLayer, K: int, M: int) -> LayerPlan:
    """A plan that takes as much as the method's own: the first experts stay."""
    if K == M:
        return identity(M)
    if asked.method.form_with(asked.options) == "sliced":
        plan = prune(torch.arange(K), M)
    else:
        plan = remap(torch.arange(K), torch.arange(M).clamp_max(K - 1))
    counted = CONSTANTS.get(asked.method.name)
    count = counted(asked.options, K, M) if counted else 0
    if count:
        plan = replace(plan, constant_CD=torch.zeros(count, outline_experts(source, layer).down_EDI.shape[1]))
    return replace(plan, skip=0.5) if asked.options.get("skip") else plan
