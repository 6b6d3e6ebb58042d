"""What all of them need: files, loading, Ray, the machine."""
