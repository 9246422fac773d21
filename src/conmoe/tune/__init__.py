"""Light tuning of a compressed checkpoint: its experts on text, its routers towards the source, or pruning on the way.

``experts`` is the light tuning of CD-MoE (arXiv 2412.00069): language modelling on a little text, in which only the
experts of the layers that the plan changed may move. ``router`` is Router KD (arXiv 2603.02217): only the routers move,
towards the next-token distribution of the source. ``prune`` is the second half of MC-SMoE (arXiv 2310.01334): experts
that are a low rank and whole rows lose most of these rows while both are trained. Everything else of the checkpoint is
copied as bytes.

Transformers' Trainer runs it. What it sees of the model are the tuned parameters alone, in float32: so its checkpoints
hold these alone, and the model itself stays in the mode (and may stay in the dtype) in which it will be used.
"""

from conmoe.tune.objective import distillation_loss
from conmoe.tune.options import Mode, Tuning
from conmoe.tune.parameters import tuned_parameters
from conmoe.tune.run import TUNING, Tuned, check, tune

__all__ = ["TUNING", "Mode", "Tuned", "Tuning", "check", "distillation_loss", "tune", "tuned_parameters"]
