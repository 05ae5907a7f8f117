"""From named tensors to the parameters of an engine."""
