"""Measure a model: fidelity to its source, benchmark tasks, what it writes, speed and memory."""

from conmoe.evaluate.fidelity import Fidelity, Measured, evaluate
from conmoe.evaluate.task_files import TaskOptions, Tasks, load_tasks
from conmoe.evaluate.tasks import evaluate_tasks

__all__ = ["Fidelity", "Measured", "TaskOptions", "Tasks", "evaluate", "evaluate_tasks", "load_tasks"]
