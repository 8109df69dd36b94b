"""Products with quantised weights: read as they are stored, made bfloat16 in registers."""
