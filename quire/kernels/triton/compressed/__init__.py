"""Attention over compressed entries (DeepSeek V4): queries, keys, entries, their choice."""
