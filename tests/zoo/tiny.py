"""Tiny pipelines with random weights, one for every way diffusers does guidance: offline, built in a moment.

    entry = PIPELINES["StableDiffusionXLPipeline"]
    pipe = entry.build()
    with counting(pipe.unet) as count:
        latents = run(pipe, entry, steps=4, batch=3)    # count.rows == [6, 6, 6, 6]

Row 2 of that run is `run(pipe, entry, steps=4, first=2)`: same prompts, same generator.
"""

import tiny_alone
import tiny_audio
import tiny_image
import tiny_prior
import tiny_unet
import tiny_video
from tiny_core import PIPELINES, Count, Tiny, counting, run

__all__ = [
    "PIPELINES",
    "Count",
    "Tiny",
    "counting",
    "run",
    "tiny_alone",
    "tiny_audio",
    "tiny_image",
    "tiny_prior",
    "tiny_unet",
    "tiny_video",
]
