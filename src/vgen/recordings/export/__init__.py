"""A run as a picture or as another tool's format: `vgen trace`."""
