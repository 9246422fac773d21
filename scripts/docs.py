"""Write the generated pages: what every method and every command says of itself. ``--check`` only compares.

python scripts/docs.py [--check]
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path

import typer
from typer.main import get_command

from conmoe import fit, serving
from conmoe.cli import app
from conmoe.registry import Budget, Method, Refinement, budgets, methods, refinements, statistics

DOCS = Path(__file__).parent.parent / "docs"
NOTICE = "<!-- written by scripts/docs.py; edit the docstrings, then run make docs -->\n"


def methods_page() -> str:
    lines = ["# Methods", "", NOTICE, "| method | paper | form | budget | needs |", "|---|---|---|---|---|"]
    lines += [
        f"| [`{name}`](#{name}) | {item.paper} | {item.form} | {item.budget} | {', '.join(item.needs) or 'nothing'} |"
        for name, item in methods().items()
    ]
    lines += _explained(methods())
    lines += ["", "# Refinements", "", "What `--refine` fits to each layer's own output once its plan is made."]
    return "\n".join([*lines, *_explained(refinements())]) + "\n"


def budgets_page() -> str:
    lines = ["# Budgets", "", NOTICE, "How the experts that `--keep` asks for are shared out over the layers.", ""]
    lines += [
        "## How many: --fit",
        "",
        *(inspect.getdoc(fit) or "").splitlines()[2:],
        "",
        "## Over which layers: --budget",
        "",
    ]
    lines += ["| budget | paper |", "|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {item.paper} |" for name, item in budgets().items()]
    return "\n".join([*lines, *_explained(budgets())]) + "\n"


def _explained(items: Mapping[str, Method] | Mapping[str, Budget] | Mapping[str, Refinement]) -> list[str]:
    """What each says of itself, and its options."""
    lines = []
    for name, item in items.items():
        lines += ["", f"## {name}", "", item.help]
        if item.options:
            lines += ["", "| option | default | values | meaning |", "|---|---|---|---|"]
            lines += [
                f"| `{option.name}` | `{option.default}` "
                f"| {', '.join(map(str, option.choices)) or option.type.__name__} | {option.help} |"
                for option in item.options.values()
            ]
    return lines


def statistics_page() -> str:
    lines = [
        "# Statistics",
        "",
        NOTICE,
        "| statistic | seen per | axes | over tokens | meaning |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {item.per} | {item.shape} | {item.reduce} | {' '.join(item.help.split())} |"
        for name, item in statistics().items()
    ]
    return "\n".join(lines) + "\n"


def preflight_page() -> str:
    lines = ["# Serving pre-flight", "", NOTICE, *(inspect.getdoc(serving) or "").splitlines()[2:], ""]
    lines += [
        "`K` is the number of experts that a result stores, `k` how many a token goes to, `I` the units of one expert.",
    ]
    plain = {name: f"`{name}`" for name in ("K", "E", "k", "I", "tp", "ep")}
    plain |= {"groups": "", "heads": "", "block": "the block size", "sharded": "`tp` / `ep`", "reach": "so many"}
    for engine, version in serving.VERSIONS.items():
        lines += ["", f"## {engine} ({version})", "", "| | concerns | | read in |", "|---|---|---|---|"]
        lines += [
            f"| {rule.level}s | {rule.concerns} | {' '.join(rule.sentence.format(**plain).split())} | {rule.source} |"
            for rule in serving.RULES
            if rule.engine == engine
        ]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    lines = ["# Commands", "", NOTICE]
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for name, command in sorted(group.commands.items()):
        lines += [
            f"## conmoe {name}",
            "",
            command.help or "",
            "",
            "| argument or option | default | meaning |",
            "|---|---|---|",
        ]
        for parameter in command.params:
            option = parameter.param_type_name == "option"
            shown = ", ".join(parameter.opts) if option else parameter.metavar or parameter.name
            plain = parameter.default not in (None, False, ()) and not callable(parameter.default)
            default, meaning = f"`{parameter.default}`" if plain else "", getattr(parameter, "help", None) or ""
            lines.append(f"| `{shown}` | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    stale = []
    pages = {
        "methods": methods_page(),
        "budgets": budgets_page(),
        "statistics": statistics_page(),
        "commands": commands_page(),
        "preflight": preflight_page(),
    }
    for name, text in pages.items():
        file = DOCS / f"{name}.md"
        if "--check" in sys.argv:
            stale += [file.name] * (not file.is_file() or file.read_text() != text)
        else:
            file.write_text(text)
    if stale:
        print(f"stale: {', '.join(stale)}; run make docs", file=sys.stderr)
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
