"""Plain torch references of quire/kernels/triton/sampling."""
