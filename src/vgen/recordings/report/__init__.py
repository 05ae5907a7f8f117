"""A run in figures: `vgen report`."""
