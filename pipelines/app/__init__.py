"""The page: generate, compare, benchmark."""
