"""Dense matrix products in plain torch."""
