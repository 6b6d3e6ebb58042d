"""Makes pictures, measures them, and shows them side by side."""
