"""What all other packages need: files, loading, Ray, the machine."""
