"""From logits to tokens and log-probabilities, for slots of the state on the device."""
