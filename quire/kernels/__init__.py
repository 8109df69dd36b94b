"""The arithmetic of the engine: native kernels for processors, and plain torch references of each.

`quire.kernels.native.ops` and `quire.kernels.reference.ops` have the same functions and signatures.
"""
