"""Options that take several words: ``--keep 0.75 0.5`` is ``--keep 0.75 --keep 0.5``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from typer.core import TyperCommand

WORDS = "conmoe.words"


class Several(TyperCommand):
    """A command whose repeatable options take every word up to the next option, once its arguments are there.

    Before, a word may be the argument: in ``--keep 0.5 MODEL`` an option takes one word, as everywhere else. The words
    as they were typed are left in the context.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = tuple(args)
        options = [parameter for parameter in self.params if parameter.param_type_name == "option"]
        valued = {name for option in options if not getattr(option, "is_flag", False) for name in option.opts}
        repeatable = {name for option in options if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, list(spread(args, valued, repeatable, len(self.params) - len(options))))


def spread(words: Sequence[str], valued: Collection[str], repeatable: Collection[str], arguments: int) -> Iterator[str]:
    """Name a repeatable option again before each further word after it.

    Args:
        words: the command line.
        valued: options that take a value.
        repeatable: those of them that may be given several times.
        arguments: how many words belong to no option.
    """
    option, waiting = "", False
    for position, word in enumerate(words):
        if waiting:
            waiting = False
        elif word == "--":
            yield from words[position:]
            return
        elif word.startswith("-") and word != "-":
            option, equals, _ = word.partition("=")
            waiting = option in valued and not equals
        elif arguments == 0 and option in repeatable:
            yield option
        else:
            arguments -= 1
        yield word
