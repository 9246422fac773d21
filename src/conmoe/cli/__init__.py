"""The command line. A verb is one file in :mod:`conmoe.cli.verbs`: it parses, calls, and prints where the result is."""

from conmoe.cli import verbs  # noqa: F401  its files register themselves with the app
from conmoe.cli.app import app
from conmoe.cli.entry import main

__all__ = ["app", "main"]
