"""Plain torch references of the kernels: what each computes; the fallback without a compiler."""
