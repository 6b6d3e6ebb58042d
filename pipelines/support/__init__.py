"""What all the others need: files, loading, Ray, the machine."""
