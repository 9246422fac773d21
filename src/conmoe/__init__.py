"""Smaller Mixture-of-Experts checkpoints after training."""
