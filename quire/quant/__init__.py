"""Quantised checkpoints: which weights are stored in which format, and reading them."""
