"""Making pictures, measuring them, showing them side by side."""
