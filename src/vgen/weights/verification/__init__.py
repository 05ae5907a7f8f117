"""Whether an engine's weights are the trainer's."""
