"""Plain torch references of the kernels: what each computes, and the fallback without a compiler."""
