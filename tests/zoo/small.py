"""The bundled models' sizes and schedulers with a few random weights, for tests that ask nothing about the pictures."""

from pathlib import Path

from diffusers import (
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from tiny_core import autoencoder, clip_text, lively, tokenizer
from tiny_image import COGVIEW
from tiny_unet import TWO, unet
from transformers import CLIPTokenizer, GlmConfig, GlmModel

from diffusers_guidance import samples

FEW = TWO | {"up_block_types": ("UpBlock2D", "UpBlock2D"), "mid_block_type": None}
"""Two blocks each way, with attention in one: half of its layers, and half of its time."""


def write_small(folder: Path) -> Path:
    """Its pictures have 128 by 128 pixels; a step of it takes a fifth of the time."""
    StableDiffusionPipeline(
        vae=autoencoder(depth=4, sample_size=128),
        text_encoder=clip_text(num_hidden_layers=2),
        tokenizer=tokenizer(),
        unet=unet(**FEW, sample_size=16),
        scheduler=DDIMScheduler.from_pretrained(samples.MODEL, subfolder="scheduler", local_files_only=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_small_flow(folder: Path) -> Path:
    """The same of the second model."""
    bundled = {"pretrained_model_name_or_path": samples.model("emoji-flow"), "local_files_only": True}
    words = CLIPTokenizer.from_pretrained(**bundled, subfolder="tokenizer")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    text = GlmConfig(
        vocab_size=len(words), **size, num_attention_heads=2, num_key_value_heads=2, pad_token_id=words.pad_token_id
    )
    sides = {"sample_size": 16, "pos_embed_max_size": 16, "rope_axes_dim": (16, 16)}
    CogView4Pipeline(
        tokenizer=words,
        text_encoder=lively(GlmModel(text)),
        vae=autoencoder(depth=4, sample_size=128),
        transformer=lively(CogView4Transformer2DModel(**{**COGVIEW, **sides})),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(**bundled, subfolder="scheduler"),
    ).save_pretrained(folder)
    return folder
