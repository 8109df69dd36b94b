"""Mixture of experts: routing, and the chosen experts' products for few and for many tokens."""
