"""Whether an engine would serve a result, asked before anything is computed, by the rules of :mod:`conmoe.serving`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from conmoe.fit import CONSTANTS
from conmoe.request import CONSTANT, FACTORED, Asked
from conmoe.serving import VERSIONS, Case, Facts, Finding, Nearest, examine, nearest
from conmoe.source import Source, outline_experts
from conmoe.types import UsageError


@dataclass(frozen=True, slots=True)
class Serve:
    """An engine and how it is to be started."""

    engine: str
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.engine not in VERSIONS:
            raise UsageError(f"--serve takes {', '.join(VERSIONS)}, not {self.engine!r}.")


@dataclass(frozen=True, slots=True)
class Serving:
    """What an engine would say of a result, and the nearest counts that it takes."""

    engine: str
    version: str
    tp: int
    ep: int
    form: str
    counts: tuple[int, ...]
    accepted: bool
    findings: tuple[Finding, ...]
    nearest: Nearest
    sentence: str  # why it is refused; empty where it is not

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"{self.engine} {self.version}: {found.sentence}." for found in self.findings if found.level == "warn"
        )


def look(case: Case, engine: str) -> Serving:
    """All findings of one engine about one case."""
    findings = examine(case, engine)
    refused = any(found.level == "refuse" for found in findings)
    near = nearest(case, engine) if refused else Nearest(None, None)
    sentence = _sentence(case, engine, findings, near) if refused else ""
    counts = tuple(sorted(set(case.counts)))
    return Serving(engine, VERSIONS[engine], case.tp, case.ep, case.form, counts, not refused, findings, near, sentence)


def refuse(serving: Serving) -> None:
    """Raise a UsageError if the engine would not serve the result."""
    if not serving.accepted:
        raise UsageError(serving.sentence)


def facts_of(source: Source) -> Facts:
    """What the rules need to know of a checkpoint, from its configuration and headers."""
    first, config = source.layers[0], source.config
    tiles = source.scheme.tiles if source.scheme else ()
    return Facts(
        family=config.model_type.removeprefix("conmoe_"),
        experts=first.logical,
        top_k=first.top_k,
        groups=first.groups,
        groups_used=first.groups_used,
        intermediate=outline_experts(source, first).down_EDI.shape[2],
        heads=int(getattr(config, "num_attention_heads", 0) or 0),
        scoring=str(getattr(config, "scoring_func", None) or ""),
        block=max((rows for rows, _ in tiles if rows > 1), default=0),
    )


def case_of_checkpoint(source: Source, serve: Serve, keep: int | None, form: str) -> Case:
    """A checkpoint as it is, or with ``keep`` of the experts of every layer."""
    facts, consolidated = facts_of(source), getattr(source.config, "num_logical_experts", None) is not None
    if keep is not None:
        return Case(facts, (keep,), form, serve.tp, serve.ep)
    if not consolidated:
        return Case(facts, (facts.experts,), "sliced", serve.tp, serve.ep)
    counts = tuple(sorted({layer.stored for layer in source.layers}))
    owners = {index: owner for index, (owner, _) in (getattr(source.config, "expert_pools", None) or {}).items()}
    shared = any(int(index) != owner for index, owner in owners.items())
    departs = bool(getattr(source.config, "consolidated_layers", None))
    return Case(facts, counts, "shared", serve.tp, serve.ep, departs, 2 if shared else 1)


def case_of_request(source: Source, asked: Asked, serve: Serve | None = None) -> Case:
    """What a request would come to, as far as that is known before it is planned."""
    tp, ep = (serve.tp, serve.ep) if serve else (1, 1)
    planned = sum(len(scope) for scope in asked.scopes)
    changed = asked.counts != asked.cap
    uneven = changed and not asked.budget.even
    form = "shared" if uneven and asked.form == "sliced" else asked.form
    facts, scope = facts_of(source), max(len(scope) for scope in asked.scopes)
    if form == "expanded" or (asked.method.condenses and form == "sliced"):
        return Case(facts, (facts.experts,), "sliced", tp, ep)
    rest = {facts.experts} if planned < len(source.layers) else set()
    counts = tuple(sorted({count or facts.experts for count in asked.counts} | rest))
    departs = form == "shared" and changed and _departs(asked)
    return Case(facts, counts, form, tp, ep, departs, scope, uneven)


def _departs(asked: Asked) -> bool:
    """Whether results of a request have more than maps in the shared form."""
    method, options = asked.method, asked.options
    counted = CONSTANTS.get(method.name)
    return (
        method.form_with(options) == "sliced"
        or method.condenses
        or method.name in (*FACTORED, *CONSTANT)
        or bool(options.get("skip"))
        or bool(counted and counted(options, asked.counts[0], asked.cap[0]))
    )


def _sentence(case: Case, engine: str, findings: tuple[Finding, ...], near: Nearest) -> str:
    reasons = "; ".join(found.sentence for found in findings if found.level == "refuse")
    how = "".join(f" --{name} {value}" for name, value in (("tp", case.tp), ("ep", case.ep)) if value > 1)
    counts = " and ".join(map(str, dict.fromkeys((min(case.counts), max(case.counts)))))
    keeps = [f"--keep {count}" for count in (near.below, near.above) if count is not None]
    hint = f"the nearest that it takes {'are' if len(keeps) > 1 else 'is'} {' and '.join(keeps)}" if keeps else ""
    return (
        f"{engine} {VERSIONS[engine]} would not serve {counts} of {case.facts.experts} experts a layer in the "
        f"{case.form} form{f' with{how}' if how else ''}: {reasons}; {hint or 'no other number of experts would help'}."
    )
