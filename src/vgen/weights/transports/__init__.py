"""How weights travel to an engine in another process: one file for each way."""
