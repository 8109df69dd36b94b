"""Dense matrix products: small batches at the speed of memory, one GEMM with fixed bits."""
