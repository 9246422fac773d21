"""One small registry for methods, statistics and budgets: a decorator, and entry points for packages with their own."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

from conmoe.types import LayerPlan, UsageError

Form = Literal["shared", "sliced", "expanded"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a method or a budget: a keyword-only argument of its function, explained where it is declared."""

    name: str
    type: Any
    default: Any
    help: str

    @property
    def choices(self) -> tuple[Any, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()


@dataclass(frozen=True, slots=True)
class Method:
    """A registered method. ``function(statistics, experts, keep, **options)`` returns a :class:`LayerPlan`."""

    name: str
    function: Callable[..., LayerPlan]
    paper: str
    needs: tuple[str, ...]  # names of statistics; "sample" for the token sample; "weights" for the experts
    form: Form  # how a result is stored unless the user says otherwise
    promises_lossless_duplicates: bool  # duplicated experts are consolidated without changing the layer's output
    drops_if: tuple[str, Any] | None  # the option value by which it drops experts, though it redirects otherwise
    condenses: bool  # its layers lose their routers: the experts kept answer every token, and there may be none
    budget: str  # how prototypes are shared out over the layers unless the user says otherwise
    options: Mapping[str, Option]

    @property
    def help(self) -> str:
        return inspect.getdoc(self.function) or ""

    def form_with(self, options: Mapping[str, Any]) -> Form:
        """How a result with these options is stored unless the user says otherwise."""
        return "sliced" if self.drops_if and options.get(self.drops_if[0]) == self.drops_if[1] else self.form


@dataclass(frozen=True, slots=True)
class Statistic:
    """A registered statistic: a sum or a maximum over tokens.

    ``shape`` names its axes (``"E"``, ``"ED"``, ``"EE"``). With ``per="expert"`` the function maps a
    :class:`~conmoe.types.Routed` to one expert's row; with ``per="batch"`` it maps a
    :class:`~conmoe.types.Routing` to the whole tensor.
    """

    name: str
    function: Callable[..., Tensor]
    per: Literal["expert", "batch"]
    shape: str
    reduce: Literal["sum", "max"]

    @property
    def help(self) -> str:
        return inspect.getdoc(self.function) or ""


@dataclass(frozen=True, slots=True)
class Budget:
    """A registered budget. ``function(context, **options)`` returns how many prototypes each scope keeps, given a
    :class:`conmoe.budgets.Context`."""

    name: str
    function: Callable[..., list[int]]
    paper: str
    even: bool  # all layers keep equally many, which the sliced form asks for
    options: Mapping[str, Option]
    check: Callable[..., None] | None = None  # (asked, **options) raises if it cannot be met, before any work

    @property
    def help(self) -> str:
        return inspect.getdoc(self.function) or ""


@dataclass(frozen=True, slots=True)
class Refinement:
    """A registered refinement. ``function(answers, held_n, frozen, **options)`` returns the plan of ``answers``, an
    :class:`conmoe.ops.answers.Answers`, fitted to its tokens but for ``held_n``, and ``frozen`` prototypes as they
    are."""

    name: str
    function: Callable[..., LayerPlan]
    options: Mapping[str, Option]
    check: Callable[..., None] | None = None  # (**options) raises if they cannot be, before any work

    @property
    def help(self) -> str:
        return inspect.getdoc(self.function) or ""


Item = TypeVar("Item", Method, Statistic, Budget, Refinement)


class _Registry(Generic[Item]):
    """Items by name. The project's own are found in its package, those of other packages by their entry points."""

    def __init__(self, kind: str, package: str) -> None:
        self._kind, self._package, self._loaded = kind, package, False
        self._items: dict[str, Item] = {}

    def add(self, item: Item) -> None:
        known = self._items.get(item.name)
        if known is not None and known.function is not item.function:
            raise ValueError(f"two {self._kind}s are named {item.name!r}")
        self._items[item.name] = item

    def all(self) -> Mapping[str, Item]:
        if not self._loaded:
            package = import_module(self._package)
            for module in sorted(iter_modules(package.__path__), key=lambda module: module.name):
                import_module(f"{self._package}.{module.name}")
            for entry in sorted(entry_points(group=self._package), key=lambda entry: entry.name):
                entry.load()
            self._loaded = True
        return {name: self._items[name] for name in sorted(self._items)}

    def get(self, name: str) -> Item:
        items = self.all()
        if name not in items:
            raise UsageError(unknown(self._kind, name, items))
        return items[name]


_methods: _Registry[Method] = _Registry("method", "conmoe.methods")
_statistics: _Registry[Statistic] = _Registry("statistic", "conmoe.statistics")
_budgets: _Registry[Budget] = _Registry("budget", "conmoe.budgets")
_refinements: _Registry[Refinement] = _Registry("refinement", "conmoe.refinements")

methods, get_method = _methods.all, _methods.get
statistics, get_statistic = _statistics.all, _statistics.get
budgets, get_budget = _budgets.all, _budgets.get
refinements, get_refinement = _refinements.all, _refinements.get

Function = TypeVar("Function", bound=Callable[..., Any])


def method(
    name: str,
    *,
    paper: str,
    needs: tuple[str, ...] = (),
    form: Form = "shared",
    promises_lossless_duplicates: bool = False,
    drops_if: tuple[str, Any] | None = None,
    condenses: bool = False,
    budget: str = "uniform",
) -> Callable[[Function], Function]:
    """Register ``(statistics, experts, keep, *, options) -> LayerPlan`` under ``name``.

    Its keyword-only arguments are its options, typed and explained by ``Annotated[type, "help"]``.
    """

    def register(function: Function) -> Function:
        lossless, options = promises_lossless_duplicates, _options(function)
        _methods.add(Method(name, function, paper, needs, form, lossless, drops_if, condenses, budget, options))
        return function

    return register


def budget(
    name: str, *, paper: str = "", even: bool = False, check: Callable[..., None] | None = None
) -> Callable[[Function], Function]:
    """Register ``(context, *, options) -> list[int]`` as the budget ``name``; its options are those of a method."""

    def register(function: Function) -> Function:
        _budgets.add(Budget(name, function, paper, even, _options(function), check))
        return function

    return register


def refinement(name: str, *, check: Callable[..., None] | None = None) -> Callable[[Function], Function]:
    """Register ``(answers, held_n, frozen, *, options) -> LayerPlan``; its options are those of a method."""

    def register(function: Function) -> Function:
        _refinements.add(Refinement(name, function, _options(function), check))
        return function

    return register


def statistic(
    name: str, *, per: Literal["expert", "batch"], shape: str, reduce: Literal["sum", "max"] = "sum"
) -> Callable[[Function], Function]:
    """Register a pure function of what an expert (or the router) did as the statistic ``name``."""

    def register(function: Function) -> Function:
        _statistics.add(Statistic(name, function, per, shape, reduce))
        return function

    return register


def bind_options(item: Method | Budget | Refinement, given: Mapping[str, str | Any]) -> dict[str, Any]:
    """Defaults overridden by ``given``; text from the command line is converted to each option's type.

    Raises:
        UsageError: an option is unknown (the nearest name is offered) or its value does not fit.
    """
    values = {option.name: option.default for option in item.options.values()}
    for name, value in given.items():
        if name not in item.options:
            raise UsageError(unknown(f"option of {item.name}", name, item.options))
        values[name] = _convert(item.options[name], value)
    if isinstance(item, Refinement) and item.check:
        item.check(**values)
    return values


def unknown(kind: str, name: str, known: Mapping[str, Any]) -> str:
    """The sentence for a name that does not exist, with the nearest one that does."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known) or 'none'}."
    return f"There is no {kind} {name!r}; {remedy}"


def _options(function: Callable[..., Any]) -> dict[str, Option]:
    hints = get_type_hints(function, include_extras=True)
    options = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kind, *notes = get_args(hints[parameter.name])
            options[parameter.name] = Option(parameter.name, kind, parameter.default, notes[0])
    return options


def _convert(option: Option, value: Any) -> Any:
    try:
        if option.choices:
            chosen = {str(choice): choice for choice in option.choices}
            return chosen[str(value)]
        if option.type is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        return option.type(value)
    except (KeyError, TypeError, ValueError) as error:
        wanted = "one of " + ", ".join(map(str, option.choices)) if option.choices else option.type.__name__
        raise UsageError(f"Option {option.name!r} takes {wanted}, not {value!r}.") from error
