"""The benchmark: what is saved and what it costs."""
