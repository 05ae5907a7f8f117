"""Reads recorded runs. Needs nothing but the files."""
