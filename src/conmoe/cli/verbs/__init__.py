"""One verb, or close kin, in a file: a function decorated with ``verb``, found by its file's name in the list below."""

from importlib import import_module

#: In the order of the help, which is the way of the data.
FILES = (
    "inspect",
    "methods",
    "budgets",
    "refinements",
    "write_text",
    "calibrate",
    "plan",
    "doctor",
    "slice",
    "apply",
    "compress",
    "tune",
    "dequantise",
    "push",
    "evaluate",
    "bench",
    "report",
    "generate",
    "demo",
)

for _name in FILES:
    import_module(f"{__name__}.{_name}")
