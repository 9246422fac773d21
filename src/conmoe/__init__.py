"""conmoe: Mixture-of-Experts checkpoints, smaller after training.

The functions here are the verbs of the command line, one to one. Importing the package also teaches Transformers'
Auto classes to load consolidated checkpoints.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

__version__ = "0.1.0"

if _TYPE_CHECKING:
    from conmoe.api import *  # noqa: F403
    from conmoe.api import __all__ as __all__


def _load() -> None:
    """Put the public names here, all at once: module ``__getattr__`` would find ``conmoe.plan`` the module first."""
    if "__all__" not in globals():
        from conmoe import api

        globals().update({name: getattr(api, name) for name in api.__all__}, __all__=api.__all__)


def _is_command_line() -> bool:
    """Whether this process was started as ``conmoe`` or ``python -m conmoe``; one that is not sure is not."""
    import sys
    from pathlib import Path

    program = next((word for word in sys.orig_argv[1:] if word == "-" or not word.startswith("-")), "")
    return Path(program).stem == "conmoe"


# PyTorch and the classes for Transformers take seconds to import, which --help should not cost: the command line asks
# for them when a verb runs.
if not _is_command_line():
    _load()
