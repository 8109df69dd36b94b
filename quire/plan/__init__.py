"""The plan: what goes where, which kernel serves what, and why, before anything is loaded."""
