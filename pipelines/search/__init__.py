"""Finding policies: calibrations, searches, and the frontier that they reach."""
