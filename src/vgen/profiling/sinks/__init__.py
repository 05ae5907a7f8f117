"""One file for each sink; each imports its own backend and nothing imports it but its user."""
