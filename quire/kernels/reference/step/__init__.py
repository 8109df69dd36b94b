"""Plain torch references of quire/kernels/triton/step."""
