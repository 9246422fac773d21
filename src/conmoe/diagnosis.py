"""What the doctor found, as a record, and what it advises: rules on numbers, without tensors, files or models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from conmoe.artifacts import Record

#: Fewer tokens make an expert's score noise: the standard error of a mean over 32 tokens is 18 % of their spread.
NOISY = 32
#: As long as there is little text, no more than this share of a layer's experts may be so badly known.
FEW = 0.05
#: There is text enough where the median expert has more tokens than this. Those that have hardly any even so are for
#: other kinds of text, ...
PLENTY = 10 * NOISY
#: ... or for nothing: up to this share of a layer's experts may be, which routers leave unused that were trained so.
SPARE = 0.25
#: More tokens are worth their time where they would take off this share of a layer's error.
EXCESS = 0.1
#: An estimate fails where the measured error is this many times as large, ...
OFF = 1.5
#: ... by more than this share of the layer's output ...
VISIBLE = 0.02
#: ... and by this many standard errors.
CERTAIN = 3.0
#: A layer whose error is this share of its output is better off without any routed expert.
LOST = 1.05
#: Methods that fit down projections to the token sample by themselves; ``--refine refit`` does it for the others.
FITTED = ("mergemoe",)

Kind = Literal["unknown experts", "starved fit", "too few tokens", "estimate fails", "other text", "beyond repair"]


class Estimate(Record):
    """A number and its standard error over tokens, None for a single token."""

    value: float
    stderr: float | None


class Use(Record):
    """How well one layer's experts are known from the calibration text."""

    layer: int
    experts: int
    tokens: int  # calibrated on
    sample: int  # tokens of the sample
    least: int  # tokens of the expert that got fewest
    median: float
    never: int  # experts without any token
    few: int  # experts with some, but fewer than NOISY
    reach: float  # how many times as many tokens would give NOISY to the median of those; 1 if there are none
    busiest: float  # share of all choices that fell on the most used eighth of the experts
    effective: float  # exp of the entropy of the choices: how many equally used experts are as uneven


class Halves(Record):
    """The plan of a scope made twice, each time on half of the token sample."""

    tokens: int  # of a half, for each layer
    kept_alike: float | None  # share of kept experts in common; None where nothing was to choose
    by_chance: float | None  # what two random choices would have in common
    answers_alike: float | None  # share of experts with the same prototype, or dropped in both; None where condensed
    own: Estimate  # what is left of the output on the half that was planned on
    other: Estimate  # and on the other half
    gap: Estimate  # other - own
    #: What of the plan's error on new tokens would go if it had been made from many more: with ``h`` tokens a fit gains
    #: ``c / h`` on its own tokens and loses as much on others, so that the gap of halves is ``2 c / h``, and the plan
    #: loses ``c / N`` with the ``N`` tokens that it rests on.
    excess: float


class Planned(Record):
    """What a plan leaves of the output of one scope, by its own account and as measured: relative squared errors."""

    layers: tuple[int, ...]
    experts: int
    prototypes: int
    sequential: bool  # planned behind the compressed layers before it; measured all the same on the source's inputs
    predicted: float | None  # by the method; None if it says nothing
    sample: Estimate | None  # measured on the token sample
    expected: Estimate | None  # on new tokens of the same kind: sample + 2 halves.excess
    fresh: Estimate | None  # measured on other text
    halves: Halves | None
    width: int  # hidden units of an expert
    tokens: int  # calibrated on
    sample_tokens: int  # of the token sample, for each layer
    rests_on: int  # tokens of each layer that the decision was made from: of the sample, or all that were calibrated on
    reached: float  # tokens of the sample that reach the median prototype
    starved: int  # prototypes that fewer tokens reach than an expert has hidden units
    untold: str = ""  # why something is missing


class Advice(Record):
    """A warning: one sentence that says what is wrong, where, and what to do."""

    kind: Kind
    layers: tuple[int, ...]
    text: str


class Diagnosis(Record):
    """All that the doctor found."""

    version: str
    statistics: str  # fingerprints
    method: str | None  # None without a plan
    keep: str | None
    refine: str | None
    fits: bool  # whether down projections were fitted to the sample
    fresh: tuple[str, ...]  # the other text, one line for each source
    uses: tuple[Use, ...]
    planned: tuple[Planned, ...]
    warnings: tuple[Advice, ...]


def advise(uses: Sequence[Use], planned: Sequence[Planned], *, fits: bool = False) -> tuple[Advice, ...]:
    """The warnings that these numbers call for, one of a kind, the worst layer named."""
    rules = (_unknown(uses), _starved(planned if fits else ()), _small(planned), _off(planned), _other(planned))
    return tuple(advice for rule in (*rules, _lost(planned)) for advice in rule)


def _unknown(uses: Sequence[Use]) -> Iterator[Advice]:
    found = [use for use in uses if use.never + use.few > (SPARE if use.median > PLENTY else FEW) * use.experts]
    if not found:
        return
    worst = max(found, key=lambda use: (use.never + use.few) / use.experts)
    silent = f", {worst.never} of them none" if worst.never else ""
    if worst.median > PLENTY:
        remedy = "the text is long enough, but not what they are for: add other kinds of it (--data) if users bring any"
    else:
        more = worst.tokens * _doubled(max(2.0, *(use.reach for use in found), PLENTY / max(worst.median, 1.0)))
        remedy = f"calibrate on more text (--tokens {more})"
    yield Advice(
        kind="unknown experts",
        layers=tuple(use.layer for use in found),
        text=f"{_name(worst, len(found))}: {worst.never + worst.few} of {worst.experts} experts got fewer than {NOISY} "
        f"tokens{silent}; {remedy}.",
    )


def _starved(planned: Sequence[Planned]) -> Iterator[Advice]:
    found = [each for each in planned if each.starved > each.prototypes / 2]
    if not found:
        return
    worst = min(found, key=lambda each: each.reached)
    more = worst.rests_on * _doubled(worst.width / max(worst.reached, 1.0))
    yield Advice(
        kind="starved fit",
        layers=_layers(found),
        text=f"{_name(worst, len(found))}: {worst.starved} of {worst.prototypes} prototypes were fitted to fewer "
        f"tokens than their {worst.width} hidden units, so that the sample alone does not say what they should be; use "
        f"a larger sample ({_sample(worst, more)}).",
    )


def _small(planned: Sequence[Planned]) -> Iterator[Advice]:
    found = [(each, each.halves) for each in planned if each.halves and _excess(each) > EXCESS]
    if not found:
        return
    worst, halves = max(found, key=lambda pair: _excess(pair[0]))
    more = 2 * worst.rests_on
    if worst.rests_on == worst.sample_tokens or (worst.sequential and worst.rests_on > worst.sample_tokens):
        remedy = f"a larger sample ({_sample(worst, more)})"
    elif worst.rests_on < worst.sample_tokens:
        remedy = f"more tokens of it (--option tokens={more})"
    else:
        remedy = f"more text (--tokens {more})"
    alike = "" if halves.kept_alike is None else f", by plans that keep the same in {halves.kept_alike:.0%}"
    yield Advice(
        kind="too few tokens",
        layers=_layers([each for each, _ in found]),
        text=f"{_name(worst, len(found))}: planned on half of the sample, {halves.own.value:.3f} of the output "
        f"is lost there and {halves.other.value:.3f} on the other half{alike}; {remedy} would help, in the end by some "
        f"{_excess(worst):.0%} of the error.",
    )


def _excess(each: Planned) -> float:
    """The share of the plan's error on new tokens that would go with many more; 0 if the gap may be chance."""
    if each.halves is None or _value(each.expected) <= VISIBLE:
        return 0.0
    certain = each.halves.gap.value > CERTAIN * (each.halves.gap.stderr or 0.0)
    return each.halves.excess / _value(each.expected) if certain else 0.0


def _off(planned: Sequence[Planned]) -> Iterator[Advice]:
    found = [
        each
        for each in planned
        if each.predicted is not None and not each.sequential and _exceeds(_on_its_kind(each), each.predicted, 0.0)
    ]
    if not found:
        return
    worst = max(found, key=lambda each: _value(_on_its_kind(each)) / max(each.predicted or 0.0, VISIBLE))
    yield Advice(
        kind="estimate fails",
        layers=_layers(found),
        text=f"{_name(worst, len(found))} predicts an error of {worst.predicted:.3f}, measures "
        f"{_value(worst.sample):.3f} on the sample and is expected to lose {_value(_on_its_kind(worst)):.3f} on new "
        "tokens; share out no budget by such predictions, and compare methods by what is measured (conmoe bench).",
    )


def _other(planned: Sequence[Planned]) -> Iterator[Advice]:
    def before(each: Planned) -> Estimate:
        return _on_its_kind(each) or Estimate(value=math.inf, stderr=None)

    found = [each for each in planned if _exceeds(each.fresh, before(each).value, before(each).stderr or 0.0)]
    if not found:
        return
    worst = max(found, key=lambda each: _value(each.fresh) / max(before(each).value, VISIBLE))
    yield Advice(
        kind="other text",
        layers=_layers(found),
        text=f"{_name(worst, len(found))} loses {_value(worst.fresh):.3f} of its output on the other "
        f"text, where {before(worst).value:.3f} was to be expected; calibrate on text like it too (--data), or keep "
        "more.",
    )


def _on_its_kind(each: Planned) -> Estimate | None:
    """What is known of the error on text of the kind that was calibrated on."""
    return each.expected or each.sample


def _lost(planned: Sequence[Planned]) -> Iterator[Advice]:
    def error(each: Planned) -> float:
        return _value(each.fresh or _on_its_kind(each))

    found = [each for each in planned if error(each) > LOST]
    if not found:
        return
    worst = max(found, key=error)
    yield Advice(
        kind="beyond repair",
        layers=_layers(found),
        text=f"{_name(worst, len(found))} is {error(worst):.2f} times its output's energy away from the source, so "
        "that no routed expert at all would be nearer; keep more there (--budget), or leave it whole (--layers).",
    )


def _exceeds(found: Estimate | None, expected: float, stderr: float) -> bool:
    if found is None:
        return False
    doubt = CERTAIN * math.hypot(found.stderr or 0.0, stderr)
    return found.value > OFF * expected and found.value - expected > max(VISIBLE, doubt)


def _value(found: Estimate | None) -> float:
    return found.value if found else 0.0


def _sample(each: Planned, tokens: int) -> str:
    """The options of calibrate for a sample of so many tokens, for which there may have to be more text."""
    return f"--sample {tokens}" if tokens <= each.tokens else f"--tokens {tokens} --sample {tokens}"


def _layers(planned: Sequence[Planned]) -> tuple[int, ...]:
    return tuple(layer for each in planned for layer in each.layers)


def _name(worst: Planned | Use, count: int) -> str:
    layers = worst.layers if isinstance(worst, Planned) else (worst.layer,)
    named = f"Layer {layers[0]}" if len(layers) == 1 else f"Layers {layers[0]} to {layers[-1]}"
    return named if count == 1 else f"{named} (the worst of {count})"


def _doubled(times: float) -> int:
    """The power of two, 16 at most, that is no less."""
    return 1 << min(4, max(0, math.ceil(math.log2(times))))
