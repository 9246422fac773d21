"""A compressed checkpoint and text in, a tuned checkpoint out, with its record."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conmoe import __version__
from conmoe.apply import PLAN_FOLDER
from conmoe.artifacts import (
    PLAN_JSON,
    building,
    check_free,
    checkpoint_fingerprint,
    fingerprint,
    plan_fingerprint,
    read_plan,
    refuse_overlap,
    spoil,
    write_json,
)
from conmoe.compress import Progress
from conmoe.data import TokenData
from conmoe.evaluate import Fidelity, evaluate
from conmoe.evaluate.fidelity import check_vocabularies
from conmoe.parallel import refuse_several
from conmoe.report.card import tuning_section
from conmoe.source import Source, open_source
from conmoe.tune.options import Mode, Tuning, check_options
from conmoe.tune.parameters import tuned_parameters
from conmoe.tune.pruning import LinePruning, cut, cut_plan, stored_lines, with_factors
from conmoe.tune.result import copy_rest, finish, write, write_cut
from conmoe.tune.training import steps_of, train
from conmoe.types import ConmoeError, Plan, UsageError
from conmoe.verify import verify

TUNING = "tuning.json"
_CHECKPOINTS = "training"  # the Trainer's folder inside OUT.partial


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was tuned, and what it brought on text that was not trained on."""

    folder: Path
    mode: Mode
    tensors: int
    parameters: int  # as many as are stored in the end
    steps: int
    losses: tuple[float, ...]  # training loss, means over equal parts of the run
    lines: tuple[int, int] | None  # in the mode "prune": beside the low ranks, how many are left, and of how many
    before: Fidelity | None
    after: Fidelity | None

    def as_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        measured = {name: part and part.as_json() for name, part in (("before", self.before), ("after", self.after))}
        lists = {"losses": list(self.losses), "lines": self.lines and list(self.lines)}
        return {**fields, "folder": str(self.folder), **lists, **measured}


def tune(
    model: Path,
    out: Path,
    data: TokenData,
    options: Tuning,
    progress: Progress,
    *,
    against: Path | None = None,
    held_out: TokenData | None = None,
    force: bool = False,
) -> Tuned:
    """Train a few parameters of a compressed checkpoint on a little text. The whole model is loaded.

    A killed run goes on from its last checkpoint in ``OUT.partial``; on a CPU, to the same bits.

    Args:
        model: a checkpoint that conmoe wrote, with its plan; never written to.
        out: the folder to write: the layout of ``model``, and its bytes wherever nothing was tuned.
        data: the text to train on.
        options: which parameters, how far, how fast, where.
        progress: where the stages report to.
        against: the source checkpoint: the teacher of the modes ``router`` and ``prune``, and what ``held_out`` is
            compared with.
        held_out: text to measure the loss on, before and after; None to measure nothing.
        force: replace ``out`` if it exists.

    Raises:
        UsageError: ``model`` has no plan, the text does not fit, or the mode lacks its teacher.
        ConmoeError: the loss is not finite any more.
    """
    refuse_several("tune")
    check_options(options, data, held_out, against)
    source = open_source(model, trust_remote_code=options.trust_remote_code)
    if source.scheme:
        raise UsageError(f"{model} is stored as {source.scheme.name}, and only full precision can be trained.")
    plan = with_factors(source, _read_plan(model))
    teacher = open_source(against, trust_remote_code=options.trust_remote_code) if against else None
    for text in filter(None, (data, held_out)):
        check_vocabularies([source, *([teacher] if teacher else [])], text)
    names = tuned_parameters(source, plan, options.mode)
    steps = steps_of(options, data)
    lines = stored_lines(source, plan) if options.mode == "prune" else {}
    pruning = LinePruning(lines, options, steps) if lines else None
    for each in filter(None, (model, against)):
        refuse_overlap(out, each)
    asked = _describe(source, teacher, plan, data, held_out, options)
    if teacher and asked["against"] != plan.source:
        progress.note(f"{against} is not the checkpoint that {model} was made from.")

    with building(out, force=force, key=fingerprint(asked)) as folder:
        with progress.stage("tune", steps, "steps") as advance:
            trained = train(source, teacher, names, pruning, data, options, folder / _CHECKPOINTS, advance)
        losses = trained.losses
        weights = cut(trained.weights, trained.kept, lines)
        parameters = sum(weights[name].numel() for name in names)
        written = write(source, weights, folder, progress)
        copy_rest(model, folder, out)
        holds = None
        if pruning is not None:
            plan = cut_plan(source, plan, weights)
            write_cut(source, plan, folder, written)
        del trained, weights
        if pruning is not None and against and asked["against"] == plan.source:
            with progress.stage("verify", written, "bytes") as advance:
                holds = _holds(plan, folder, against, model, options, progress, advance)
        before, after = _measure(source, folder, against, held_out, options, progress)
        left = (pruning.left, pruning.all) if pruning else None
        tuned = Tuned(out, options.mode, len(names), parameters, steps, losses, left, before, after)
        record = {**asked, **tuned.as_json(), "tuned": names, "plan_holds": holds, "previous": _previous(model)}
        del record["folder"]
        write_json(folder / PLAN_FOLDER / TUNING, record)
        card = folder / "README.md"
        card.write_text(_text(model / "README.md") + tuning_section(record))
        shutil.rmtree(folder / _CHECKPOINTS)
        finish(model, folder, plan)
    return tuned


def check(model: Path, out: Path, options: Tuning, *, against: Path | None = None, force: bool = False) -> None:
    """What can be refused before text is read."""
    check_options(options, None, None, against)
    _read_plan(model)
    refuse_overlap(out, model)
    check_free(out, force=force)


def _holds(
    plan: Plan,
    folder: Path,
    against: Path,
    model: Path,
    options: Tuning,
    progress: Progress,
    advance: Callable[[int], None],
) -> bool:
    """Whether the result is what its plan, with the factors as they came out, makes of the source.

    An earlier tuning may have changed more than the plan says.
    """
    try:
        verify(folder, against, plan, "shared", trust_remote_code=options.trust_remote_code, advance=advance)
    except ConmoeError as error:
        if _previous(model) is None:
            spoil(folder)
            raise
        progress.note(f"An earlier tuning changed what the plan does not name, which therefore is not all: {error}")
        return False
    return True


def _measure(
    source: Source,
    folder: Path,
    against: Path | None,
    held_out: TokenData | None,
    options: Tuning,
    progress: Progress,
) -> tuple[Fidelity | None, Fidelity | None]:
    """Before and after, on text that was not trained on."""
    if held_out is None:
        return None, None
    total = 2 * held_out.tokens * source.config.num_hidden_layers * (2 if against else 1)
    with progress.stage("evaluate", total, "tokens x layers") as advance:
        before, after = (
            evaluate(
                each,
                held_out,
                against=against,
                device=options.device,
                dtype=options.dtype,
                trust_remote_code=options.trust_remote_code,
                advance=advance,
            )
            for each in (source.folder, folder)
        )
    return before, after


def _describe(
    source: Source,
    teacher: Source | None,
    plan: Plan,
    data: TokenData,
    held_out: TokenData | None,
    options: Tuning,
) -> dict[str, Any]:
    """Everything that the result depends on."""

    def text(part: TokenData) -> dict[str, Any]:
        return {
            "sources": [f"{each.source}: {each.sequences} sequences, weight {each.weight:g}" for each in part.sources],
            "sequences": part.ids_NS.shape[0],
            "seq_len": part.ids_NS.shape[1],
            "fingerprint": part.fingerprint,
        }

    def name(each: Source) -> str:
        return checkpoint_fingerprint(each.folder, each.files)

    return {
        "format": 1,
        "model": name(source),
        "against": teacher and name(teacher),
        "plan": plan_fingerprint(plan),
        "options": {
            **asdict(options),
            "dtype": options.dtype and str(options.dtype).removeprefix("torch."),
            "temperature": options.softening,
        },
        "data": {**text(data), "documents": list(data.documents)},
        "held_out": held_out and text(held_out),
        "versions": {
            "conmoe": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        },
    }


def _read_plan(model: Path) -> Plan:
    if not (model / PLAN_FOLDER / PLAN_JSON).is_file():
        raise UsageError(
            f"{model} holds no plan ({PLAN_FOLDER}/{PLAN_JSON}); tune what conmoe compress or apply wrote."
        )
    return read_plan(model / PLAN_FOLDER, weights=False)


def _previous(model: Path) -> dict[str, Any] | None:
    """The record of an earlier tuning of the same checkpoint."""
    text = _text(model / PLAN_FOLDER / TUNING)
    return dict(json.loads(text)) if text else None


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""
