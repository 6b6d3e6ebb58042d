"""All knowledge of diffusers pipelines: attaching, hooks, discovery."""
