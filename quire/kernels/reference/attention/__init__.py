"""Plain torch counterparts of the attention kernels."""
