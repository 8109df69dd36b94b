"""Attention over the paged KV cache: decode with split KV, and runs of queries."""
