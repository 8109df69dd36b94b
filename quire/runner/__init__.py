"""Runners turn a Batch into device work and its Result."""
