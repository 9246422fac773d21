"""Measure a model: fidelity to its source."""

from conmoe.evaluate.fidelity import Fidelity, Measured, evaluate

__all__ = ["Fidelity", "Measured", "evaluate"]
