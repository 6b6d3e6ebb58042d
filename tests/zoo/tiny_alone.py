"""Tiny pipelines that evaluate one prediction of each sample a step: distilled models, and others at a scale of 1."""

from dataclasses import replace
from typing import Any

import diffusers
import tiny_video  # noqa: F401  (its entries are called without guidance here)
from tiny_core import BETAS, PIPELINES, autoencoder, embeds, images, lively, tiny
from tiny_image import FLUX, LINEAR, NET, SIZE, controlled, edited, flux, painted
from tiny_unet import SIZE as UNET_SIZE
from tiny_unet import sd, unet

ALONE: dict[str, Any] = {**NET, "branches": 1, "off": {}}
WITHOUT = (
    "CogVideoXPipeline",
    "FluxPipeline",
    "HunyuanDiTPipeline",
    "LTX2Pipeline",
    "LTXPipeline",
    "Lumina2Pipeline",
    "QwenImagePipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "WanPipeline",
    "ZImagePipeline",
)
"""Of those that guide, some that are also called without guidance: Turbo, Lightning and the like."""

for name in WITHOUT:
    entry = PIPELINES[name]

    def without(rows: range, entry: Any = entry) -> dict[str, Any]:
        return {**entry.arguments(rows), **entry.off}

    title = f"{name}, no guidance"
    PIPELINES[title] = replace(entry, name=title, arguments=without, branches=1, style="batched", off={})


def alone_text(rows: range, **extra: Any) -> dict[str, Any]:
    found = embeds(rows, 7, 16, pooled=16, **extra)
    return {name: value for name, value in found.items() if not name.startswith("negative")}


@tiny("FluxPipeline, schnell", lambda rows: alone_text(rows, **SIZE), "FluxPipeline", **ALONE)
def schnell() -> dict[str, Any]:
    transformer = diffusers.FluxTransformer2DModel(**{**FLUX, "guidance_embeds": False})
    return {**flux(), "transformer": lively(transformer)}


def control_net(channels: int) -> Any:
    return lively(diffusers.FluxTransformer2DModel(**{**FLUX, "in_channels": channels, "out_channels": 16}))


@tiny("FluxControlPipeline", lambda rows: alone_text(rows, **controlled(rows)), **ALONE)
@tiny("FluxControlImg2ImgPipeline", lambda rows: alone_text(rows, **{**edited(rows), **controlled(rows)}), **ALONE)
def flux_control() -> dict[str, Any]:
    return {**flux(), "transformer": control_net(32)}


@tiny("FluxControlNetImg2ImgPipeline", lambda rows: alone_text(rows, **{**edited(rows), **controlled(rows)}), **ALONE)
@tiny("FluxControlNetInpaintPipeline", lambda rows: alone_text(rows, **{**painted(rows), **controlled(rows)}), **ALONE)
def flux_controlnet_alone() -> dict[str, Any]:
    return {**flux(), "controlnet": lively(diffusers.FluxControlNetModel(**FLUX), seed=1)}


@tiny(
    "LatentConsistencyModelPipeline",
    lambda rows: {"prompt_embeds": alone_text(rows)["prompt_embeds"], "original_inference_steps": 20, **UNET_SIZE},
    branches=1,
    off={},
)
def lcm() -> dict[str, Any]:
    scheduler = diffusers.LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True)
    return {**sd(), "unet": unet(time_cond_proj_dim=8), "scheduler": scheduler}


def sprint_text(rows: range, **extra: Any) -> dict[str, Any]:
    found = embeds(rows, 7, 16, mask="attention_mask", **extra)
    del found["negative_prompt_embeds"], found["negative_prompt_attention_mask"]
    return {**found, "use_resolution_binning": False}


@tiny(
    "SanaSprintPipeline",
    lambda rows: sprint_text(rows, height=256, width=256, intermediate_timesteps=None),
    **ALONE,
)
def sana_sprint() -> dict[str, Any]:
    """What the network predicts is mixed with the sample for the scheduler."""
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, guidance_embeds=True, qk_norm="rms_norm_across_heads", **LINEAR
    )
    return {"transformer": lively(transformer), "scheduler": diffusers.SCMScheduler()}


@tiny("DDIMPipeline", lambda rows: {"batch_size": len(rows)}, branches=1, off={}, output="np")
def ddim_alone() -> dict[str, Any]:
    blocks: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    network = diffusers.UNet2DModel(
        sample_size=8, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **blocks
    )
    return {"unet": lively(network), "scheduler": diffusers.DDIMScheduler(clip_sample=False)}


@tiny("FluxFillPipeline", lambda rows: alone_text(rows, **filled(rows)), **ALONE)
def flux_fill() -> dict[str, Any]:
    # 16 of the sample, 16 of the picture, and a mask's 2 x 2 x 2 x 2 numbers.
    return {**flux(), "vae": autoencoder(shift_factor=0.0), "transformer": control_net(16 + 16 + 16)}


def filled(rows: range) -> dict[str, Any]:
    found = painted(rows)
    found.pop("strength", None)
    return {**found, "image": images(rows, 16, 16)}
