"""Request state on the device: what the host sends is taken over, a step's inputs come out."""
