"""Measure a model: fidelity to its source, benchmark tasks, what it writes, speed and memory."""

from conmoe.evaluate.fidelity import Fidelity, Measured, evaluate
from conmoe.evaluate.generation import GenerationOptions, cut_prompts, evaluate_generation, read_prompts
from conmoe.evaluate.speed import SpeedOptions, evaluate_speed
from conmoe.evaluate.task_files import TaskOptions, Tasks, load_tasks
from conmoe.evaluate.tasks import evaluate_tasks

__all__ = [
    "Fidelity",
    "GenerationOptions",
    "Measured",
    "SpeedOptions",
    "TaskOptions",
    "Tasks",
    "cut_prompts",
    "evaluate",
    "evaluate_generation",
    "evaluate_speed",
    "evaluate_tasks",
    "load_tasks",
    "read_prompts",
]
