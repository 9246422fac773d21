"""What is minimised: the tuned parameters, and the loss that they give the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conmoe.tune.options import Tuning
from conmoe.tune.pruning import LinePruning


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
        options: Tuning,
        pruning: LinePruning | None = None,
    ) -> None:
        super().__init__()
        self._models = (model, teacher)  # in a tuple, so that they are no part of this module
        self._options = options
        self._dtype = model.dtype
        everywhere = list(model.named_parameters(remove_duplicate=False))  # layers may share a pool
        self._places = []
        for name in weights:
            original = model.get_parameter(name)
            self._places.append([_place(model, other) for other, value in everywhere if value is original])
        for places in self._places:
            for module, leaf in places:
                delattr(module, leaf)
        self.names = tuple(weights)
        self.weights = nn.ParameterList(nn.Parameter(value) for value in weights.values())
        self.pruning = pruning  # part of this module, so that a run goes on with what it had learned

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
        loss = distillation_loss(logits_NSV, target_NSV, self._options.softening)
        if self._options.mode == "prune":
            loss = language_model_loss(logits_NSV, input_ids) + self._options.distillation * loss
        return {"loss": loss}

    def named_weights(self) -> dict[str, nn.Parameter]:
        """The tuned parameters under the names that they have in the model."""
        return dict(zip(self.names, self.weights, strict=True))

    def prune(self, step: int) -> None:
        """To be called after each step of the optimizer, the gradients still there."""
        if self.pruning is not None:
            self.pruning.update(self.named_weights(), step)


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


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
