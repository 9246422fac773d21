"""The steps: Transformers' Trainer on the tuned parameters alone, from the last checkpoint of a killed run on."""

from __future__ import annotations

import gc
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from conmoe import runtime
from conmoe.apply import check_space
from conmoe.checkpoint import read_parameter
from conmoe.data import TokenData
from conmoe.moe import decoder_layers
from conmoe.source import Source
from conmoe.tune.objective import Objective
from conmoe.tune.options import Tuning
from conmoe.tune.pruning import LinePruning
from conmoe.types import ConmoeError

_COMPLETE = "complete"  # lies in each of the Trainer's checkpoints that is whole
_KEPT_CHECKPOINTS = 2
_LOSSES = 64  # numbers of the loss curve in the record


@dataclass(frozen=True, slots=True)
class Trained:
    """What came out, on the CPU."""

    weights: Mapping[str, Tensor]  # float32
    kept: Mapping[str, Tensor]  # which lines are left, by the parameter that holds their values
    losses: tuple[float, ...]  # means over equal parts of the run


def steps_of(options: Tuning, data: TokenData) -> int:
    return options.epochs * math.ceil(len(data.ids_NS) / options.batch)


def train(
    source: Source,
    teacher: Source | None,
    names: Sequence[str],
    pruning: LinePruning | None,
    data: TokenData,
    options: Tuning,
    folder: Path,
    advance: Callable[..., None],
) -> Trained:
    """Tune the parameters ``names``; the Trainer's checkpoints lie in ``folder``."""
    resumed = _last_checkpoint(folder)
    if resumed is None:
        _make_room(source, names, folder)
    weights = {name: read_parameter(source.layout, source.model, name, torch.float32) for name in names}
    student = _load(source, options)
    if options.gradient_checkpointing:
        # Renamed after Transformers 5.16; the old name warns.
        getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
        for layer in decoder_layers(student)[1]:
            layer.training = True  # only this flag, on which it depends: what is in the layer stays as it is used
    master = _load(teacher, options) if teacher and options.has_teacher else None
    objective = Objective(student, weights, master, options, pruning)
    with _own_randomness(options.device):
        losses = _run(objective, data, options, folder, resumed, advance)
    values = {name: weight.detach().cpu() for name, weight in objective.named_weights().items()}
    kept = pruning.kept(steps_of(options, data)) if pruning else {}
    trained = Trained(values, {name: mask.cpu() for name, mask in kept.items()}, losses)
    del objective, student, master
    gc.collect()  # the Trainer holds itself in a circle, and with it the models
    return trained


def _run(
    objective: Objective,
    data: TokenData,
    options: Tuning,
    folder: Path,
    resumed: Path | None,
    advance: Callable[..., None],
) -> tuple[float, ...]:
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            objective.prune(state.global_step + 1)

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

    rows: Any = [{"input_ids": ids_S} for ids_S in data.ids_NS]
    trainer = Trainer(model=objective, args=_arguments(options, folder), train_dataset=rows, callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)
    if resumed is not None:
        advance(int(resumed.name.rpartition("-")[2]))
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    return _curve([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def _arguments(options: Tuning, folder: Path) -> Any:
    from transformers import TrainingArguments

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
    return arguments


def _make_room(source: Source, names: Sequence[str], folder: Path) -> None:
    """Raise if the disk is too small; remove what was written from weights that are gone."""
    weights_bytes = sum(source.model.get_parameter(name).numel() for name in names) * 4
    result = sum(entry.nbytes for entry in source.entries.values())
    check_space(folder.parent, result + (_KEPT_CHECKPOINTS + 1) * 3 * weights_bytes)  # AdamW keeps two more of each
    for shard in folder.parent.glob("*.safetensors"):
        shard.unlink()


def _load(source: Source, options: Tuning) -> PreTrainedModel:
    runtime.register()
    dtype = options.dtype or (torch.float32 if options.device == "cpu" else torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=dtype, trust_remote_code=options.trust_remote_code
    )
    model.config.output_router_logits = False  # a balancing loss is none of ours
    loaded: PreTrainedModel = model.to(options.device).eval().requires_grad_(False)
    return loaded


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
