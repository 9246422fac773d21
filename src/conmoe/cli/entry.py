"""Where the command line begins and how it ends: every expected failure is one sentence and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from conmoe.cli import console
from conmoe.cli.app import app, debugging

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every expected failure is one sentence and an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    debugging.set(debug)
    try:
        code = app([word for word in given if word != "--debug"], prog_name="conmoe", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        shown = getattr(error, "format_message", None)  # what the parser raises knows how to say it
        if shown is not None:
            code = _fail(shown(), getattr(error, "exit_code", 2))
        elif debug:
            raise
        else:
            code = _fail(*_explained(error))
    if code == INTERRUPTED:  # the parser catches Ctrl-C inside a verb, and returns this without a word
        _fail("Interrupted; what was finished is kept, and the same command goes on from there.", code)
    sys.exit(code if isinstance(code, int) else 0)


def _explained(error: Exception) -> tuple[str, int]:
    """The sentence and the exit code for what a verb raised."""
    from conmoe.types import ConmoeError

    if isinstance(error, ConmoeError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return _os_sentence(error), 1
    return f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 1


def _fail(sentence: str, code: int) -> int:
    rank = os.environ.get("RANK")
    console.errors.print(f"Error{f' of process {rank}' if rank else ''}: {sentence}", style="red", soft_wrap=True)
    return code


def _os_sentence(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"The disk is full{where}; free some space and run the same command again, it goes on where it stopped."
    return f"{error.strerror or error}{where}."
