"""Smaller Mixture-of-Experts checkpoints after training."""

__version__ = "0.1.0"

__all__ = ["__version__"]
