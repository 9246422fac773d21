"""What is asked of a plan, and everything about it that can be refused before any work."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conmoe.allocate import parse_counts, parse_keep, uniform
from conmoe.forms import check_groups
from conmoe.methods import DEFAULT_METHOD
from conmoe.moe import MoeLayer
from conmoe.refine import NONE
from conmoe.registry import (
    Budget,
    Form,
    Method,
    bind_options,
    get_budget,
    get_method,
    get_refinement,
    refinements,
)
from conmoe.types import UsageError

#: Decoder layer -> experts that must stay.
Protected = Mapping[int, tuple[int, ...]]

DEFAULT_KEEP = "0.5"
#: Methods whose prototypes are products of factors.
FACTORED = ("mc-smoe",)
#: Methods that answer for some experts with constants, whatever their options.
CONSTANT = ("mone",)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a plan."""

    method: str = DEFAULT_METHOD
    keep: str = ""  # share or count; empty: half, or what a budget that lists counts adds up to
    options: Mapping[str, Any] | None = None
    protect: tuple[str, ...] = ("super",)
    scope: int = 1
    form: Form | None = None
    device: str = "cpu"
    trust_remote_code: bool = False
    layers: str = ""  # decoder layers to plan, as in "10-23,26"; empty: all that have experts
    budget: str = ""  # its name, or the prototypes of each scope, as in "12,16,16"; empty: the method's own
    budget_options: Mapping[str, Any] | None = None
    sequential: bool = False  # calibrate each layer anew, on inputs that passed the compressed layers before it
    refine: str = NONE  # the refinement that fits each layer to its own output afterwards
    refine_options: Mapping[str, Any] | None = None
    sample: int = 0  # tokens of each layer that a sequential plan looks at; 0: as many as the statistics have
    fit: str = ""  # in place of keep: a size such as "24GB", or a share of the source's bytes such as "60%"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was checked against a model."""

    method: Method
    options: dict[str, Any]
    budget: Budget
    budget_options: dict[str, Any]
    keep: str
    scopes: tuple[tuple[MoeLayer, ...], ...]
    counts: tuple[int, ...]  # prototypes of each scope when all layers give up the same share, or as they were listed
    cap: tuple[int, ...]  # logical experts of each scope
    cuts: bool  # router rows of experts that do not stay are taken out
    form: Form  # in which the result is stored, unless the budget's counts do not let it

    @property
    def groups(self) -> int:
        """Groups of the router that must keep equally many experts."""
        return self.scopes[0][0].groups if self.cuts else 1


def check_request(layers: Sequence[MoeLayer], request: Request) -> Asked:
    """Everything about a request that can be refused before any work.

    Args:
        layers: the MoE layers of the model, in depth order.
        request: what is asked.

    Raises:
        UsageError: it cannot be met.
    """
    method = get_method(request.method)
    options = bind_options(method, request.options or {})
    if request.scope < 1:
        raise UsageError(f"--scope takes a number of neighbouring layers, not {request.scope}.")
    if request.sequential and request.scope > 1:
        raise UsageError("Layers that share a pool of prototypes are planned at once; use --scope 1 with --sequential.")
    if request.sample and not request.sequential:
        raise UsageError("A sample is drawn anew only with --sequential; without, leave --sample to conmoe calibrate.")
    planned = parse_layers(request.layers, layers)
    scopes = windows(planned, layers, request.scope)
    listed = parse_counts(request.budget)
    budget = _listed(request.budget, listed) if listed else get_budget(request.budget or method.budget)
    budget_options = bind_options(budget, request.budget_options or {})
    keep, counts = _counts(request, scopes, listed, 0 if method.condenses else 1)

    cap = tuple(sum(layer.logical for layer in scope) for scope in scopes)
    form = request.form or method.form_with(options)
    drops = method.form_with(options) == "sliced" and counts != cap
    if drops and form == "expanded":
        raise UsageError(
            f"{method.name!r} drops experts, which the expanded form cannot take out of the router; use --form sliced "
            "or --form shared."
        )
    unheld = _unheld(method, form) if counts != cap else ""
    if unheld:
        raise UsageError(f"{method.name!r} {unheld}, which the {form} form cannot hold; use --form shared.")
    if method.condenses and (form == "expanded" or request.scope > 1):
        what = "its layers share nothing; use --scope 1" if request.scope > 1 else "use --form shared or --form sliced"
        raise UsageError(f"{method.name!r} takes the routers of whole layers away: {what}.")
    if drops and request.scope > 1 and scopes[0][0].groups > 1:
        raise UsageError(
            f"{method.name!r} drops experts, and each layer's router has {scopes[0][0].groups} groups that must keep "
            "equally many, which a pool that layers share does not see to; use --scope 1."
        )
    if request.scope > 1 and form == "sliced":
        raise UsageError("Layers that share a pool of prototypes have no sliced form; use --form shared.")
    # where a layer is condensed, it becomes a dense one, and no router has to work with fewer experts
    slices = form == "sliced" and not method.condenses
    if slices and request.form == "sliced" and counts != cap:
        _check_sliced(request, budget, len(planned) == len(layers))
    cuts = slices or method.form_with(options) == "sliced"
    if slices or drops:
        for scope, count, experts in zip(scopes, counts, cap, strict=True):
            if count < experts:
                asked_by = f"--budget {request.budget}" if listed else f"--keep {keep}"
                _check_router(asked_by, scope[0], count // len(scope))
    if slices and (len(planned) < len(layers) or len(set(counts)) > 1) and counts != cap:
        form = "shared"  # which is the one that holds layers of different sizes
    _check_refine(request, method, drops)
    if request.refine != NONE and form == "sliced" and options.get("skip"):
        raise UsageError(
            f"{method.name!r} skips experts at run time, for which the sliced form has no place; use --form shared "
            "with --refine, or --refine none."
        )
    asked = Asked(method, options, budget, budget_options, keep, scopes, counts, cap, cuts, form)

    named = named_experts(layers, request.protect)
    if method.condenses and named:
        raise UsageError(
            f"{method.name!r} condenses whole layers, where no expert can be protected; leave layers out by --layers."
        )
    if budget.even or listed:
        for scope, count, experts in zip(scopes, counts, cap, strict=True):
            check_protected(positions(scope, named), count, asked.groups, experts)
    else:
        check_floor(asked, floor(asked, named))
    if budget.check:
        budget.check(asked, **budget_options)
    return asked


def floor(asked: Asked, protected: Protected) -> tuple[int, ...]:
    """The fewest prototypes that each scope can be left with: what routers need, and one beside the protected."""
    return tuple(
        min(cap, _fewest(asked, scope, positions(scope, protected)))
        for scope, cap in zip(asked.scopes, asked.cap, strict=True)
    )


def _fewest(asked: Asked, scope: Sequence[MoeLayer], held: Sequence[int]) -> int:
    first, groups = scope[0], asked.groups
    per_layer = 0 if asked.method.condenses else 1
    if asked.cuts:
        per_layer = first.top_k if groups == 1 else groups * max(2, -(-first.top_k // first.groups_used))
    size = len(scope) * first.logical // groups
    most = max(sum(expert // size == group for expert in held) for group in range(groups))
    return max(per_layer * len(scope), groups * (most + 1) if most else 0)


def check_floor(asked: Asked, least: Sequence[int]) -> None:
    """Raise a UsageError if there are not prototypes enough to give every scope its fewest."""
    if sum(least) > sum(asked.counts):
        raise UsageError(
            f"--keep {asked.keep} leaves {sum(asked.counts)} experts, and the {len(least)} layers or scopes need "
            f"{sum(least)} at least; keep more, or use --form shared with a method that remaps."
        )


def parse_layers(text: str, layers: Sequence[MoeLayer]) -> list[MoeLayer]:
    """The layers that ``--layers`` names, in depth order; a range leaps over layers without experts.

    Raises:
        UsageError: not a list of numbers and ranges, or one of them holds no layer with experts.
    """
    if not text.strip():
        return list(layers)
    first, last = layers[0].index, layers[-1].index
    chosen: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found:
            raise UsageError(f"--layers takes numbers and ranges of decoder layers, such as 10-23,26, not {text!r}.")
        start, stop = int(found[1]), int(found[2] or found[1])
        inside = [layer.index for layer in layers if start <= layer.index <= stop]
        if start > stop:
            raise UsageError(f"--layers {part.strip()} ends before it begins.")
        if not inside or stop > last:
            raise UsageError(
                f"--layers {part.strip()}: no experts {'there' if not inside else f'beyond layer {last}'}; layers with "
                f"experts lie between {first} and {last}."
            )
        chosen.update(inside)
    return [layer for layer in layers if layer.index in chosen]


def parse_refine(text: str) -> str:
    """What ``--refine`` names.

    Raises:
        UsageError: it names nothing.
    """
    if text not in (NONE, *refinements()):
        raise UsageError(f"--refine takes {', '.join((NONE, *refinements()))}, not {text!r}.")
    return text


def windows(planned: Sequence[MoeLayer], layers: Sequence[MoeLayer], width: int) -> tuple[tuple[MoeLayer, ...], ...]:
    """The planned layers in scopes of ``width`` neighbours; one that is left alone at the end of a run is narrower."""
    place = {layer.index: position for position, layer in enumerate(layers)}
    scopes: list[list[MoeLayer]] = []
    for layer in planned:
        follows = bool(scopes) and place[scopes[-1][-1].index] + 1 == place[layer.index]
        if follows and len(scopes[-1]) < width:
            scopes[-1].append(layer)
        else:
            scopes.append([layer])
    return tuple(tuple(scope) for scope in scopes)


def check_protected(held: Sequence[int], keep: int, groups: int, experts: int) -> None:
    """Raise a UsageError if the protected experts leave a method nothing to choose, in any group of the router."""
    size = experts // groups
    for group in range(groups):
        count = sum(group * size <= expert < (group + 1) * size for expert in held)
        if count and count >= keep // groups and count < size:
            raise UsageError(
                f"{count} experts are protected where {keep // groups} may stay; keep more, or protect fewer "
                "(--protect none protects nobody)."
            )


def named_experts(layers: Sequence[MoeLayer], protect: Sequence[str]) -> Protected:
    """Decoder layer -> experts that are protected by name, which can be told before any statistics."""
    chosen: dict[int, set[int]] = {}
    known = {layer.index: layer.logical for layer in layers}
    for text in protect:
        if text not in ("super", "none"):
            index, _, expert = text.partition(":")
            if not (index.isdecimal() and expert.isdecimal() and int(expert) < known.get(int(index), 0)):
                raise UsageError(f"--protect takes 'super', 'none' or LAYER:EXPERT of this model, not {text!r}.")
            chosen.setdefault(int(index), set()).add(int(expert))
    return {index: tuple(sorted(experts)) for index, experts in chosen.items()}


def positions(layers: Sequence[MoeLayer], protected: Protected) -> list[int]:
    """Where the protected experts stand among all of a scope."""
    return [
        position * layer.logical + expert
        for position, layer in enumerate(layers)
        for expert in protected.get(layer.index, ())
    ]


def _counts(
    request: Request, scopes: Sequence[Sequence[MoeLayer]], listed: Sequence[int], fewest: int
) -> tuple[str, tuple[int, ...]]:
    """``--keep`` as it is or works out to be, and the prototypes of each scope."""
    first, widths = scopes[0][0], [len(scope) for scope in scopes]
    wanted = request.keep or ("" if listed else DEFAULT_KEEP)
    counts = tuple(uniform(parse_keep(wanted), first.logical, widths)) if wanted else ()
    if not listed:
        return wanted, counts
    if len(listed) != len(scopes):
        raise UsageError(
            f"--budget lists {len(listed)} counts for {len(scopes)} {'scopes' if request.scope > 1 else 'layers'}; "
            "give one for each."
        )
    for scope, count in zip(scopes, listed, strict=True):
        if not fewest <= count <= len(scope) * first.logical:
            raise UsageError(
                f"--budget asks for {count} experts in layer {scope[0].index}, which takes {fewest} to "
                f"{len(scope) * first.logical}."
            )
    if counts and sum(counts) != sum(listed):
        raise UsageError(
            f"--budget adds up to {sum(listed)} experts and --keep {wanted} to {sum(counts)}; leave one of them out."
        )
    return wanted or str(round(sum(listed) / (sum(widths) * first.logical), 4)), tuple(listed)


def _listed(text: str, counts: Sequence[int]) -> Budget:
    return Budget(text.strip(), lambda context: list(counts), "", len(set(counts)) == 1, {})


def _check_sliced(request: Request, budget: Budget, whole: bool) -> None:
    """Raise where the sliced form is asked for by name, and layers may come to differ in size."""
    if not whole:
        raise UsageError(
            "The sliced form stores one number of experts for all layers, so --layers cannot leave any out; use "
            "--form shared."
        )
    if not budget.even:
        raise UsageError(
            f"The budget {budget.name!r} lets layers keep different numbers of experts, which the sliced form cannot "
            "hold; use --form shared, or --budget uniform."
        )


def _unheld(method: Method, form: Form) -> str:
    """What the results of a method have that a form has no place for, whatever the model."""
    if form != "shared" and method.name in FACTORED:
        return "stores experts as factors"
    return "answers with constants" if form == "expanded" and method.name in CONSTANT else ""


def unrefinable(method: Method) -> str:
    """Why plans of a method cannot be refined, or nothing."""
    return "condenses layers" if method.condenses else "stores experts as factors" if method.name in FACTORED else ""


def _check_refine(request: Request, method: Method, drops: bool) -> None:
    check_refine_options(request)
    if request.refine == NONE:
        return
    if unrefinable(method):
        raise UsageError(f"{method.name!r} {unrefinable(method)}, which cannot be refined; use --refine none.")
    if drops and request.scope > 1:
        raise UsageError(
            f"{method.name!r} drops experts, and layers that share a pool of prototypes have no one router to ask what "
            "it would choose without them; use --scope 1 with --refine."
        )


def check_refine_options(request: Request) -> None:
    """Raise a UsageError unless there is such a refinement, with such options."""
    if parse_refine(request.refine) != NONE:
        bind_options(get_refinement(request.refine), request.refine_options or {})
    elif request.refine_options:
        raise UsageError("Without a refinement there are no options of it; name one by --refine.")


def _check_router(asked: str, layer: MoeLayer, count: int) -> None:
    """Raise unless a router whose rows are cut can work with ``count`` experts."""
    if count < layer.top_k:
        raise UsageError(
            f"{asked} leaves {count} experts, but every token goes to {layer.top_k}; keep at least "
            f"{layer.top_k} in the sliced form, or use --form shared with a method that remaps."
        )
    if layer.groups > 1:
        check_groups(layer, count)
