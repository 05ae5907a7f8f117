"""vLLM behind HTTP: what runs in the server's processes, and what starts them."""
