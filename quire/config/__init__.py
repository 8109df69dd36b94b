"""Typed options: one dataclass tree that gives CLI flags, environment names, file keys and docs."""
