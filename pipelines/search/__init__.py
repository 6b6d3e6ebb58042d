"""Finding policies: calibrations, searches, and the frontier they reach."""
