"""From the trainer's model to the engine's weights."""
