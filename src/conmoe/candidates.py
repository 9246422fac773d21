"""What a bench compares: methods with options, by the names under which they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conmoe.calibrate import Calibration
from conmoe.refine import NONE
from conmoe.registry import (
    Budget,
    Form,
    Method,
    Refinement,
    bind_options,
    get_budget,
    get_method,
    get_refinement,
    methods,
)
from conmoe.request import Request, check_refine_options, parse_refine
from conmoe.types import UsageError

ALL = "all"

#: Names for lists of candidates. ``ablations`` are the switches of ConMoE's own ablation: what becomes of the others,
#: the two signals, shared pools, fusion, the distance, the selection; the last row is the independent implementation.
SETS: Mapping[str, tuple[str, ...]] = {
    "ablations": (
        "conmoe",
        "conmoe:redirect=zero",
        "conmoe:redirect=drop",
        "conmoe:redirect=random",
        "conmoe:signal=contribution",
        "conmoe:signal=replaceability",
        "conmoe:scope=2",
        "conmoe:scope=4",
        "conmoe:fusion=frequency",
        "conmoe:fusion=contribution",
        "conmoe:distance=weight",
        "conmoe:distance=mean_output",
        "conmoe:selection=product",
        "conmoe:selection=product,distance=weight,contribution=mean",
    )
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method with options, under the name by which it was asked for; its request lacks the budget and the seed."""

    name: str
    request: Request

    def at(self, keep: str, seed: int, options: Calibration) -> Request:
        """The request at one keep. What draws by a seed of its own gets the calibration's, unless told otherwise."""
        return replace(
            self.request,
            keep=keep,
            options=_seeded(get_method(self.request.method), self.request.options, seed),
            budget_options=_seeded(_budget(self.request), self.request.budget_options, seed),
            refine_options=_refine_options(self.request, seed),
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )


def _refine_options(request: Request, seed: int) -> dict[str, Any]:
    return {} if request.refine == NONE else _seeded(get_refinement(request.refine), request.refine_options, seed)


def _seeded(item: Method | Budget | Refinement, options: Mapping[str, Any] | None, seed: int) -> dict[str, Any]:
    return ({"seed": seed} if "seed" in item.options else {}) | dict(options or {})


def parse_candidates(texts: Sequence[str]) -> tuple[Candidate, ...]:
    """Candidates by name: ``all``, a name of ``SETS``, or ``METHOD[:OPTION=VALUE,...]``, each of them once.

    Raises:
        UsageError: a method or an option is unknown, or a value does not fit.
    """
    sets = {**SETS, ALL: tuple(methods())}
    names = [name for text in texts for name in sets.get(text, (text,))]
    return tuple(parse_candidate(name) for name in dict.fromkeys(names))


def parse_candidate(text: str) -> Candidate:
    """``METHOD[:OPTION=VALUE,...]``, where some options are those of the plan: ``OF_PLAN`` and ``budget.OPTION``."""
    method, _, rest = text.partition(":")
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise UsageError(f"--methods takes METHOD or METHOD:OPTION=VALUE,OPTION=VALUE, not {text!r}.")
        given[name] = value
    of_plan = {name: read(given.pop(name)) for name, read in OF_PLAN.items() if name in given}
    of_budget = _take(given, OF_BUDGET)
    of_refinement = _take(given, OF_REFINEMENT)
    request = Request(
        method=method,
        options=given,
        budget_options=of_budget,
        refine_options=of_refinement,
        **of_plan,
    )
    bind_options(get_method(method), given)
    bind_options(_budget(request), request.budget_options or {})
    check_refine_options(request)
    return Candidate(text, request)


def _take(given: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The options whose names begin with ``prefix``, which are taken out of ``given``."""
    return {name.removeprefix(prefix): given.pop(name) for name in list(given) if name.startswith(prefix)}


def _budget(request: Request) -> Budget:
    return get_budget(request.budget or get_method(request.method).budget)


def _read_scope(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"scope takes a number of neighbouring layers, not {text!r}.")
    return int(text)


def _read_sample(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"sample takes a number of tokens, not {text!r}.")
    return int(text)


def _read_form(text: str) -> Form:
    if text not in ("shared", "sliced", "expanded"):
        raise UsageError(f"form takes shared, sliced or expanded, not {text!r}.")
    return text  # type: ignore[return-value]


def _read_sequential(text: str) -> bool:
    if text not in ("true", "false"):
        raise UsageError(f"sequential takes true or false, not {text!r}.")
    return text == "true"


#: Options of a candidate that are the plan's, not its method's.
OF_PLAN: Mapping[str, Callable[[str], Any]] = {
    "scope": _read_scope,
    "form": _read_form,
    "layers": str,
    "budget": str,
    "sequential": _read_sequential,
    "refine": parse_refine,
    "sample": _read_sample,
}
OF_BUDGET = "budget."
OF_REFINEMENT = "refine."
