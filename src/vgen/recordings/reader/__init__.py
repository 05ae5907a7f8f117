"""From the files of a run to its processes, spans and measurements."""
