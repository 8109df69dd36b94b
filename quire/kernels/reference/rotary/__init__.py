"""From query, key, value projections to rotated queries and a written KV cache."""
