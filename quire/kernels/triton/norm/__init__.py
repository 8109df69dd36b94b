"""Root-mean-square norms, alone and fused with the residual's addition."""
