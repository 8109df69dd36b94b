"""Attention over a window and compressed entries of what lies before it."""
