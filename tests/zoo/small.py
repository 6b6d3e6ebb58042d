"""The bundled model's size and scheduler with a few random weights, for tests that ask nothing about the pictures."""

from pathlib import Path

from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny_core import autoencoder, clip_text, tokenizer
from tiny_unet import unet

from diffusers_guidance.samples import MODEL


def write_small(folder: Path) -> Path:
    """Its pictures have 128 by 128 pixels; a step of it takes a fifth of the time."""
    StableDiffusionPipeline(
        vae=autoencoder(depth=4, sample_size=128),
        text_encoder=clip_text(),
        tokenizer=tokenizer(),
        unet=unet(sample_size=16),
        scheduler=DDIMScheduler.from_pretrained(MODEL, subfolder="scheduler", local_files_only=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
