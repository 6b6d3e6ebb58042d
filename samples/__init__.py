"""The bundled text-to-image pipeline and prompts to try it with."""

from importlib.resources import files
from pathlib import Path

MODEL = Path(str(files(__name__) / "emoji"))
"""Folder of the bundled pipeline: `StableDiffusionPipeline.from_pretrained(MODEL)`."""

PROMPTS = Path(str(files(__name__) / "prompts.txt"))
"""One prompt a line."""
