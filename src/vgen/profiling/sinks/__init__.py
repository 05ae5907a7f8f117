"""One file for each sink. Each imports its own backend, and only users of that sink import the file."""
