"""The version of vgen, in a module that imports nothing: `pyproject.toml` repeats it, a test compares the two."""

__version__ = "0.1.0"
