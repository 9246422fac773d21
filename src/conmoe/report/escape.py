"""Text of others in Markdown: names and notes from checkpoints and files stay text, whatever is in them."""

from __future__ import annotations

import re
import unicodedata

_LONGEST = 300
_SPECIAL = re.compile(r"([\\`*_\[\]|#!~$])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def one_line(text: object, longest: int = _LONGEST) -> str:
    """The text on one line, without characters that do not show or that turn the direction of writing."""
    shown = "".join(" " if char.isspace() else char for char in str(text))
    shown = "".join(char for char in shown if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co"))
    shown = " ".join(shown.split())
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def escaped(text: object) -> str:
    """For a line of Markdown or a cell of a table."""
    plain = _SPECIAL.sub(r"\\\1", one_line(text))
    return "".join(_HTML.get(char, char) for char in plain)


def code(text: object) -> str:
    """A code span, also within a table, where a bar ends the cell even in code."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', chr(92) + '|') or ' '}`"


def block(text: str, language: str = "") -> list[str]:
    """A fenced block; the fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *text.splitlines(), fence]
