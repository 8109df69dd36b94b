"""Streams beside each other that layers read and write through learned mixes."""
