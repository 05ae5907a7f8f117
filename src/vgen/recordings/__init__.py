"""Recorded runs: what `JsonlSink` wrote, read back, judged and drawn. Needs nothing but the files."""
