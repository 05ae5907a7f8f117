"""vLLM behind HTTP: the trainer's side."""
