"""Meeting a pipeline: what diffusers does with guidance, found out, verified and taken over."""
