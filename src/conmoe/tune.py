"""Light tuning of a compressed checkpoint: the experts on text, or the routers towards the source model.

``experts`` is the light tuning of CD-MoE (arXiv 2412.00069): language modelling on a little text, in which only the
experts of the layers that the plan changed may move. ``router`` is Router KD (arXiv 2603.02217): only the routers move,
towards the next-token distribution of the source. Everything else of the checkpoint is copied as bytes.

Transformers' Trainer runs it. What it sees of the model are the tuned parameters alone, in float32: so its checkpoints
hold these alone, and the model itself stays in the mode (and may stay in the dtype) in which it will be used.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import CHAT_TEMPLATE_DIR
from transformers.utils.import_utils import is_accelerate_available

from conmoe import __version__, runtime
from conmoe.apply import PLAN_FOLDER, SHARD_BYTES, check_space
from conmoe.artifacts import (
    LABEL,
    PLAN_JSON,
    building,
    check_free,
    checkpoint_fingerprint,
    fingerprint,
    plan_fingerprint,
    read_plan,
    refuse_overlap,
    write_json,
)
from conmoe.checkpoint import read_parameter, split_parameter
from conmoe.compress import RESULTS, Progress
from conmoe.data import TokenData
from conmoe.evaluate import Fidelity, evaluate
from conmoe.evaluate.fidelity import check_vocabularies
from conmoe.moe import decoder_layers, is_condensed_block, logical_rows
from conmoe.ops.plans import identity
from conmoe.parallel import refuse_several
from conmoe.report.card import tuning_section
from conmoe.shards import DTYPES, INDEX, Held, Output, raw_chunks, tensor_output, write_shards
from conmoe.source import Source, open_source
from conmoe.types import ConmoeError, LayerPlan, Plan, UsageError

Mode = Literal["experts", "router"]
TUNING = "tuning.json"
_CHECKPOINTS = "training"  # the Trainer's folder inside OUT.partial
_COMPLETE = "complete"  # lies in each of its checkpoints that is whole
_KEPT_CHECKPOINTS = 2
_LOSSES = 64  # numbers of the loss curve in the record
#: A bias that only ranks the experts takes no part in what is computed from them: there is no gradient to follow.
_RANKS_ONLY = "e_score_correction_bias"


@dataclass(frozen=True, slots=True)
class Tuning:
    """The options of a tuning run; the defaults are CD-MoE's, where it names one."""

    mode: Mode = "experts"
    learning_rate: float = 1e-5  # the highest; it falls linearly to zero
    batch: int = 8  # sequences
    epochs: int = 1
    warmup: float = 0.0  # share of the steps over which the learning rate rises
    temperature: float = 1.0  # of both distributions, in the mode "router"
    seed: int = 0  # of the order of the text
    device: str = "cpu"
    dtype: torch.dtype | None = None  # in which the model computes; None: float32, or bfloat16 on a GPU
    gradient_checkpointing: bool = False
    save_steps: int = 100  # between two checkpoints to go on from
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was tuned, and what it brought on text that was not trained on."""

    folder: Path
    mode: Mode
    tensors: int
    parameters: int
    steps: int
    losses: tuple[float, ...]  # training loss, means over equal parts of the run
    before: Fidelity | None
    after: Fidelity | None

    def as_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        measured = {name: part and part.as_json() for name, part in (("before", self.before), ("after", self.after))}
        return {**fields, "folder": str(self.folder), "losses": list(self.losses), **measured}


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
        against: the source checkpoint: the teacher of the mode ``router``, and what ``held_out`` is compared with.
        held_out: text to measure the loss on, before and after; None to measure nothing.
        force: replace ``out`` if it exists.

    Raises:
        UsageError: ``model`` has no plan, the text does not fit, or the mode lacks its teacher.
        ConmoeError: the loss is not finite any more.
    """
    refuse_several("tune")
    _check(options, data, held_out, against)
    plan = _read_plan(model)
    source = open_source(model, trust_remote_code=options.trust_remote_code)
    teacher = open_source(against, trust_remote_code=options.trust_remote_code) if against else None
    for text in filter(None, (data, held_out)):
        check_vocabularies([source, *([teacher] if teacher else [])], text)
    names = tuned_parameters(source, plan, options.mode)
    for each in filter(None, (model, against)):
        refuse_overlap(out, each)
    asked = _describe(source, teacher, plan, data, held_out, options)
    if teacher and asked["against"] != plan.source:
        progress.note(f"{against} is not the checkpoint that {model} was made from.")

    with building(out, force=force, key=fingerprint(asked)) as folder:
        steps = options.epochs * math.ceil(len(data.ids_NS) / options.batch)
        with progress.stage("tune", steps, "steps") as advance:
            weights, losses = _train(source, teacher, names, data, options, folder / _CHECKPOINTS, advance)
        parameters = sum(weight.numel() for weight in weights.values())
        outputs = list(_outputs(source, weights))
        with progress.stage("write", sum(output.nbytes for output in outputs), "bytes") as advance:
            write_shards(outputs, folder, SHARD_BYTES, advance)
        del outputs, weights
        _copy_rest(model, folder, out)
        before = after = None
        if held_out is not None:
            depth = source.config.num_hidden_layers
            total = 2 * held_out.tokens * depth * (2 if against else 1)
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
                    for each in (model, folder)
                )
        tuned = Tuned(out, options.mode, len(names), parameters, steps, losses, before, after)
        record = {**asked, **tuned.as_json(), "tuned": names, "previous": _previous(model)}
        del record["folder"]
        write_json(folder / PLAN_FOLDER / TUNING, record)
        card = folder / "README.md"
        card.write_text(_text(model / "README.md") + tuning_section(record))
        shutil.rmtree(folder / _CHECKPOINTS)
    return tuned


def check(model: Path, out: Path, options: Tuning, *, against: Path | None = None, force: bool = False) -> None:
    """What can be refused before text is read."""
    _check(options, None, None, against)
    _read_plan(model)
    refuse_overlap(out, model)
    check_free(out, force=force)


def tuned_parameters(source: Source, plan: Plan, mode: Mode) -> list[str]:
    """The parameters that a mode may change.

    ``experts``: the routed experts of the layers that the plan changed; where such a layer is condensed, its whole
    block, which is always-on experts, shared ones among them. ``router``: the routers of all layers, their biases too.

    Raises:
        UsageError: there are none.
    """
    model = source.model
    trainable = {name for name, _ in model.named_parameters()} & source.layout.sources.keys()
    if mode == "router":
        rows = {name for layer in source.layers for name in logical_rows(model, layer)}
        names = [name for name in source.layout.sources if name in rows & trainable and not name.endswith(_RANKS_ONLY)]
    else:
        changed = {index for scope in plan.scopes if _changes(scope.plan) for index in scope.layers}
        prefixes = tuple(
            [f"{layer.experts}." for layer in source.layers if layer.index in changed]
            + [f"{block}." for index, block in _condensed_blocks(model) if index in changed]
        )
        names = [name for name in source.layout.sources if name in trainable and name.startswith(prefixes)]
    if not names:
        what = "no router is left" if mode == "router" else "its plan changes no experts"
        raise UsageError(f"There is nothing to tune in {source.folder}: {what}.")
    return names


class Objective(nn.Module):
    """The tuned parameters in float32, and the loss that they give the model: all of it that the Trainer sees.

    The model has no parameters under these names any more. Before each pass it gets them in the dtype in which it
    computes, so that a step far below that dtype's resolution is not lost.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Mapping[str, Tensor],
        teacher: PreTrainedModel | None,
        temperature: float,
    ) -> None:
        super().__init__()
        self._models = (model, teacher)  # in a tuple, so that they are no part of this module
        self._temperature = temperature
        self._dtype = model.dtype
        everywhere = list(model.named_parameters(remove_duplicate=False))  # layers may share a pool
        self._places = []
        for name in weights:
            original = model.get_parameter(name)
            self._places.append([_place(model, other) for other, value in everywhere if value is original])
        for places in self._places:
            for module, leaf in places:
                delattr(module, leaf)
        self.weights = nn.ParameterList(nn.Parameter(value) for value in weights.values())

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        for weight, places in zip(self.weights, self._places, strict=True):
            value = weight.to(self._dtype)
            for module, leaf in places:
                setattr(module, leaf, value)
        model, teacher = self._models
        logits_NSV = model(input_ids=input_ids, use_cache=False).logits.float()
        if teacher is None:
            return {"loss": language_model_loss(logits_NSV, input_ids)}
        with torch.no_grad():
            target_NSV = teacher(input_ids=input_ids, use_cache=False).logits.float()
        return {"loss": distillation_loss(logits_NSV, target_NSV, self._temperature)}


def language_model_loss(logits_NSV: Tensor, ids_NS: Tensor) -> Tensor:
    """Negative log likelihood of each next token, nats, mean over tokens."""
    return nn.functional.cross_entropy(logits_NSV[:, :-1].flatten(0, 1), ids_NS[:, 1:].flatten())


def distillation_loss(logits_NSV: Tensor, target_NSV: Tensor, temperature: float) -> Tensor:
    """KL(target || model) of the next token at a temperature, nats, mean over tokens.

    Times the temperature squared, without which a higher one would also be a smaller step (Hinton et al., 2015).
    """
    logp = (logits_NSV / temperature).log_softmax(-1)
    target = (target_NSV / temperature).log_softmax(-1)
    terms = (target.exp() * (target - logp)).masked_fill(target == -torch.inf, 0.0)
    return terms.sum(-1).mean() * temperature**2


def _train(
    source: Source,
    teacher: Source | None,
    names: Sequence[str],
    data: TokenData,
    options: Tuning,
    folder: Path,
    advance: Callable[..., None],
) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    """The tuned parameters, float32, on the CPU, and the curve of the loss."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            advance(1)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loss = state.log_history[-1].get("loss", 0.0)
            if not math.isfinite(loss):
                raise ConmoeError(
                    f"The loss is {loss} after {state.global_step} steps; tune with a lower learning rate."
                )

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (folder / f"checkpoint-{state.global_step}" / _COMPLETE).touch()

    resumed = _last_checkpoint(folder)
    if resumed is None:
        weights_bytes = sum(source.model.get_parameter(name).numel() for name in names) * 4
        result = sum(entry.nbytes for entry in source.entries.values())
        check_space(folder.parent, result + (_KEPT_CHECKPOINTS + 1) * 3 * weights_bytes)  # AdamW keeps two more of each
        for shard in folder.parent.glob("*.safetensors"):  # written from weights that are gone
            shard.unlink()
    weights = {name: read_parameter(source.layout, source.model, name, torch.float32) for name in names}
    student = _load(source, options)
    if options.gradient_checkpointing:
        # Renamed after Transformers 5.16; the old name warns.
        getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
        for layer in decoder_layers(student)[1]:
            layer.training = True  # only this flag, on which it depends: what is in the layer stays as it is used
    master = _load(teacher, options) if teacher and options.mode == "router" else None
    objective = Objective(student, weights, master, options.temperature)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=options.warmup,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=options.device == "cpu",
        save_steps=options.save_steps,
        save_total_limit=_KEPT_CHECKPOINTS,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible ones would be given a replica each
    with _own_randomness(options.device):
        rows: Any = [{"input_ids": ids_S} for ids_S in data.ids_NS]
        trainer = Trainer(model=objective, args=arguments, train_dataset=rows, callbacks=[Watch()])
        trainer.remove_callback(PrinterCallback)
        if resumed is not None:
            advance(int(resumed.name.rpartition("-")[2]))
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    values = [weight.detach().cpu() for weight in objective.weights]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    del trainer, objective, student, master
    gc.collect()  # the Trainer holds itself in a circle, and with it the models
    return dict(zip(names, values, strict=True)), _curve(losses)


def _load(source: Source, options: Tuning) -> PreTrainedModel:
    runtime.register()
    dtype = options.dtype or (torch.float32 if options.device == "cpu" else torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=dtype, trust_remote_code=options.trust_remote_code
    )
    model.config.output_router_logits = False  # a balancing loss is none of ours
    loaded: PreTrainedModel = model.to(options.device).eval().requires_grad_(False)
    return loaded


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


@contextmanager
def _own_randomness(device: str) -> Iterator[None]:
    """The Trainer seeds every global generator; they are put back as they were."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.device(device)] if device != "cpu" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def _last_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a killed run; what is not whole is removed."""
    steps = {int(found.name.rpartition("-")[2]): found for found in folder.glob("checkpoint-*")}
    for step, found in list(steps.items()):
        if not (found / _COMPLETE).is_file():
            shutil.rmtree(steps.pop(step))
    return steps[max(steps)] if steps else None


def _curve(losses: Sequence[float]) -> tuple[float, ...]:
    parts = np.array_split(np.asarray(losses, dtype=np.float64), min(_LOSSES, max(1, len(losses))))
    return tuple(float(part.mean()) for part in parts)


def _outputs(source: Source, weights: Mapping[str, Tensor]) -> Iterator[Output]:
    """Every tensor of the checkpoint in its order: tuned, or as it was."""
    shares = {
        entry.name: share
        for target, weight in weights.items()
        for entry, share in split_parameter(source.layout, target, weight)
    }
    for name, entry in source.entries.items():
        if name in shares:
            yield tensor_output(name, entry.dtype, entry.shape, partial(_rounded, entry, shares[name]))
        else:
            yield Output(name, entry.dtype, entry.shape, entry.nbytes, partial(raw_chunks, entry))


def _rounded(entry: Held, share: Tensor) -> Tensor:
    value = share.to(DTYPES[entry.dtype])
    if not bool(torch.isfinite(value).all()):
        raise ConmoeError(f"{entry.name} came out of tuning with numbers that are not finite; lower the learning rate.")
    return value


def _copy_rest(model: Path, folder: Path, out: Path) -> None:
    """Configuration, tokenizer, modelling files, plan: all but weights, card and what is said of the old weights."""
    for file in sorted(model.iterdir()):
        if file.is_file() and file.suffix != ".safetensors" and file.name not in (LABEL, INDEX, "README.md"):
            shutil.copy(file, folder / file.name)
    for name in (PLAN_FOLDER, CHAT_TEMPLATE_DIR):
        if (model / name).is_dir():
            shutil.copytree(model / name, folder / name, dirs_exist_ok=True)
    if (model / PLAN_FOLDER / RESULTS).is_file():
        results = json.loads((model / PLAN_FOLDER / RESULTS).read_text())
        write_json(folder / PLAN_FOLDER / RESULTS, {**results, "output": str(out), "fidelity": None})


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
        "options": {**asdict(options), "dtype": options.dtype and str(options.dtype).removeprefix("torch.")},
        "data": {**text(data), "documents": list(data.documents)},
        "held_out": held_out and text(held_out),
        "versions": {
            "conmoe": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        },
    }


def _check(options: Tuning, data: TokenData | None, held_out: TokenData | None, against: Path | None) -> None:
    """Everything that can be refused by looking at the request."""
    if not is_accelerate_available():
        raise UsageError('Tuning needs accelerate, which is not installed: pip install "conmoe[tune]".')
    if options.mode not in ("experts", "router"):
        raise UsageError(f"--mode takes experts or router, not {options.mode!r}.")
    if options.mode == "router" and against is None:
        raise UsageError("--mode router learns from the source model; name it with --against SOURCE.")
    if not (math.isfinite(options.learning_rate) and options.learning_rate > 0):
        raise UsageError(f"The learning rate must be a number above 0, not {options.learning_rate}.")
    if not (math.isfinite(options.temperature) and options.temperature > 0):
        raise UsageError(f"The temperature must be a number above 0, not {options.temperature}.")
    if min(options.batch, options.epochs, options.save_steps) < 1 or not 0 <= options.warmup < 1:
        raise UsageError("Batch, epochs and steps between checkpoints start at 1; the warm-up is a share below 1.")
    if options.dtype == torch.float16:
        raise UsageError("float16 has too little range for gradients; tune in bfloat16 or float32.")
    if options.device not in ("cpu", "cuda", "cuda:0"):
        raise UsageError(f"Tuning runs on cpu or on the first GPU, not on {options.device}; set CUDA_VISIBLE_DEVICES.")
    if data is None:
        return
    N, S = data.ids_NS.shape
    if options.batch > N or S < 2:
        raise UsageError(
            f"The text has {N} sequences of {S} tokens, too short for a batch of {options.batch}; give more text."
        )
    if held_out is not None:
        trained = {tuple(row) for row in data.ids_NS.tolist()}
        if any(tuple(row) in trained for row in held_out.ids_NS.tolist()):
            raise UsageError("The held-out text holds sequences that are trained on; measure on other text.")


def _read_plan(model: Path) -> Plan:
    if not (model / PLAN_FOLDER / PLAN_JSON).is_file():
        raise UsageError(
            f"{model} holds no plan ({PLAN_FOLDER}/{PLAN_JSON}); tune what conmoe compress or apply wrote."
        )
    return read_plan(model / PLAN_FOLDER)


def _changes(plan: LayerPlan) -> bool:
    """Whether a layer is another than before."""
    same = identity(plan.assignment_E.numel())
    if plan.weights or plan.skip or plan.constant_CD is not None or plan.static_K is not None:
        return True
    return not all(
        torch.equal(getattr(plan, name).double(), getattr(same, name).double())
        for name in ("assignment_E", "mixing_KE", "gain_E")
    )


def _condensed_blocks(model: PreTrainedModel) -> Iterator[tuple[int, str]]:
    """Decoder layer and path of the blocks that have lost their router."""
    path, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if is_condensed_block(module):
                yield index, f"{path}.{index}.{name}"


def _previous(model: Path) -> dict[str, Any] | None:
    """The record of an earlier tuning of the same checkpoint."""
    text = _text(model / PLAN_FOLDER / TUNING)
    return dict(json.loads(text)) if text else None


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""
