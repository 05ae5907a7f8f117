"""From the trainer's model to a stream of named tensors."""
