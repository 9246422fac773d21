"""The application that verbs register with. Whatever is imported here or by a verb's file delays ``--help``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Annotated, ParamSpec

import typer

import conmoe
from conmoe.cli import console

app = typer.Typer(
    name="conmoe",
    help="Make Mixture-of-Experts checkpoints smaller, without training, and measure what it cost.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

#: Whether the command asks for tracebacks and for what the libraries beneath have to say.
debugging: ContextVar[bool] = ContextVar("debugging", default=False)

P = ParamSpec("P")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere.")] = False,
) -> None:
    if version:
        console.stdout.print(conmoe.__version__)


def verb(
    name: str | None = None, cls: type[typer.core.TyperCommand] | None = None
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Register a function as a command of its own name, or of ``name``; ``cls`` reads its words in another way.

    Its annotated arguments are the command's, its docstring is its help and ends with an example. PyTorch and
    Transformers take seconds to import, so what stands on them is imported inside the function.
    """

    def register(function: Callable[P, None]) -> Callable[P, None]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            _prepare()
            function(*args, **kwargs)

        return app.command(name, cls=cls)(call)

    return register


def _prepare() -> None:
    """What every verb stands on, once its arguments are known to be parsed."""
    conmoe._load()
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    if not debugging.get():
        transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity(logging.ERROR)
