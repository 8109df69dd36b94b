"""Products with quantised weights in plain torch."""
