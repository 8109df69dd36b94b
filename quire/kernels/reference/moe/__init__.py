"""Mixture of experts in plain torch."""
