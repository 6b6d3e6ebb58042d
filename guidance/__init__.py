"""Adaptive projected guidance, Adaptive Guidance and LinearAG for unmodified diffusers pipelines."""
