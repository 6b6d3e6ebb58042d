"""Tiny pipelines of priors, cascades and Kandinsky's older kin, whose denoiser has many names."""

from typing import Any

import diffusers
import torch
from tiny_core import (
    SCALE,
    clip_config,
    clip_text,
    clip_vision,
    ddim,
    ddpm,
    image_processor,
    images,
    lively,
    masks,
    prompts,
    rows_of,
    tiny,
    tokenizer,
)
from tiny_unet import SIZE, movq, sd, unet
from torch import nn

PRIOR: dict[str, Any] = {"denoisers": ("prior",)}
DECODER: dict[str, Any] = {"denoisers": ("decoder",)}


def projected_text(width: int = 16) -> nn.Module:
    from transformers import CLIPTextModelWithProjection

    return lively(CLIPTextModelWithProjection(clip_config("text", width)), seed=11)


def words(rows: range, **extra: Any) -> dict[str, Any]:
    return prompts(rows, guidance_scale=SCALE, **extra)


# unCLIP priors


def prior() -> nn.Module:
    network = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=16,
        num_layers=1,
        num_embeddings=24,
    )
    return lively(network)


def unclip(**changes: Any) -> Any:
    return diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", **changes)


def alone(rows: range) -> dict[str, Any]:
    """Without a negative prompt, which a prior turns into a second run in the same batch."""
    call = words(rows)
    del call["negative_prompt"]
    return call


@tiny("KandinskyPriorPipeline", alone, output="pt", **PRIOR)
@tiny("KandinskyV22PriorPipeline", alone, output="pt", **PRIOR)
def kandinsky_prior() -> dict[str, Any]:
    return {
        "prior": prior(),
        "text_encoder": projected_text(),
        "tokenizer": tokenizer(),
        "image_encoder": clip_vision(),
        "image_processor": image_processor(),
        "scheduler": unclip(clip_sample=True, clip_sample_range=5.0),
    }


@tiny(
    "StableUnCLIPPipeline",
    lambda rows: words(rows, prior_guidance_scale=SCALE, prior_num_inference_steps=3, **SIZE),
    denoisers=("prior", "unet"),
    off={"guidance_scale": 1.0, "prior_guidance_scale": 1.0},
)
def stable_unclip() -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    return {
        **sd(class_embed_type="projection", projection_class_embeddings_input_dim=32),
        "prior": prior(),
        "prior_tokenizer": tokenizer(),
        "prior_text_encoder": projected_text(),
        "prior_scheduler": unclip(clip_sample=True, clip_sample_range=5.0),
        "image_normalizer": StableUnCLIPImageNormalizer(16),
        "image_noising_scheduler": ddpm(),
    }


# Stable Cascade


def cascade_text(rows: range, **extra: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"guidance_scale": SCALE, **extra}
    for key, prefix in enumerate(("", "negative_")):
        out[f"{prefix}prompt_embeds"] = rows_of(rows, key, 7, 16)
        out[f"{prefix}prompt_embeds_pooled"] = rows_of(rows, key + 2, 1, 16)
    return out


def cascade(gain: float, **changes: Any) -> nn.Module:
    layers = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    config: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "conditioning_dim": 16}
    config |= {"block_out_channels": (16, 16), "num_attention_heads": (2, 2), "dropout": (0.0, 0.0)}
    config |= {"down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1)}
    config |= {"block_types_per_layer": (layers, layers), "clip_text_pooled_in_channels": 16}
    config |= {"timestep_ratio_embedding_dim": 16, "switch_level": (False,)}
    return lively(diffusers.StableCascadeUNet(**{**config, **changes}), gain=gain)


CASCADE_OFF = {"guidance_scale": 1.0, "negative_prompt_embeds": None, "negative_prompt_embeds_pooled": None}


@tiny(
    "StableCascadePriorPipeline",
    lambda rows: cascade_text(rows, height=256, width=256),
    output="pt",
    off=CASCADE_OFF,
    **PRIOR,
)
def cascade_prior() -> dict[str, Any]:
    network = cascade(1.0, clip_text_in_channels=16, clip_image_in_channels=16)
    return {"prior": network, "text_encoder": projected_text(), "scheduler": wuerstchen_scheduler()}


@tiny(
    "StableCascadeDecoderPipeline",
    lambda rows: cascade_text(rows, image_embeddings=rows_of(rows, 50, 4, 4, 4)),
    **DECODER,
)
def cascade_decoder() -> dict[str, Any]:
    network = cascade(0.7, effnet_in_channels=4)
    parts = {"decoder": network, "text_encoder": projected_text(), "scheduler": wuerstchen_scheduler()}
    return {**parts, "latent_dim_scale": 2.0}


def wuerstchen_scheduler() -> Any:
    return diffusers.DDPMWuerstchenScheduler()


# Wuerstchen


@tiny("WuerstchenPriorPipeline", lambda rows: words(rows, height=256, width=256), output="pt", **PRIOR)
def wuerstchen_prior() -> dict[str, Any]:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    network = WuerstchenPrior(c_in=4, c=16, c_cond=16, c_r=16, depth=1, nhead=2, dropout=0.0)
    return {**plain(), "prior": calm(lively(network, gain=1.5), network.out[1])}


def calm(network: nn.Module, last: nn.Module) -> nn.Module:
    """Half of what the last layer says is how near to one a divisor comes: keep it away."""
    for p in last.parameters():
        p.mul_(0.1)
    return network


def plain() -> dict[str, Any]:
    return {"text_encoder": clip_text(), "tokenizer": tokenizer(), "scheduler": wuerstchen_scheduler()}


@tiny(
    "WuerstchenDecoderPipeline",
    lambda rows: words(rows, image_embeddings=rows_of(rows, 50, 4, 4, 4)),
    batches=False,
    **DECODER,
)
def wuerstchen_decoder() -> dict[str, Any]:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt

    network = WuerstchenDiffNeXt(
        c_r=16,
        c_cond=16,
        c_hidden=[16, 16],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=4,
        clip_embd=16,
        dropout=0.0,
    )
    decoder = calm(lively(network), network.clf[1])
    return {**plain(), "decoder": decoder, "latent_dim_scale": 2.0}


# Kandinsky 3


def kandinsky3_text(rows: range) -> dict[str, Any]:
    mask = torch.ones(len(rows), 7, dtype=torch.long)
    embeds = {f"{n}prompt_embeds": rows_of(rows, k, 7, 16) for k, n in enumerate(("", "negative_"))}
    masks = {"attention_mask": mask, "negative_attention_mask": mask}
    return {"guidance_scale": SCALE, **embeds, **masks, **SIZE}


@tiny("Kandinsky3Pipeline", kandinsky3_text)
def kandinsky3() -> dict[str, Any]:
    network = diffusers.Kandinsky3UNet(
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=16,
        encoder_hid_dim=16,
    )
    return {"unet": lively(network), "movq": movq(), "scheduler": ddpm()}


# Kandinsky 2.1


def kandinsky21_text(rows: range, **extra: Any) -> dict[str, Any]:
    named = {f"{n}image_embeds": rows_of(rows, k, 16) for k, n in enumerate(("", "negative_"))}
    return words(rows, **named, **SIZE, **extra)


@tiny("KandinskyPipeline", kandinsky21_text, output="pt")
@tiny(
    "KandinskyImg2ImgPipeline",
    lambda rows: kandinsky21_text(rows, image=images(rows, 16, 16), strength=0.8),
    output="pt",
)
def kandinsky21() -> dict[str, Any]:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        numDims=16,
        transformerDimensions=16,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=len(tokenizer()),
    )
    network = unet(
        out_channels=8,
        encoder_hid_dim_type="text_image_proj",
        encoder_hid_dim=16,
        addition_embed_type="text_image",
    )
    return {
        "text_encoder": lively(MultilingualCLIP(config), seed=11),
        "tokenizer": tokenizer(),
        "unet": network,
        "scheduler": ddim(),
        "movq": movq(),
    }


@tiny(
    "KandinskyInpaintPipeline",
    lambda rows: kandinsky21_text(rows, image=images(range(1), 16, 16), mask_image=masks(range(1), 16, 16)[:, 0]),
    batches=False,
    output="pt",
)
def kandinsky21_inpaint() -> dict[str, Any]:
    network = unet(
        in_channels=9,
        out_channels=8,
        encoder_hid_dim_type="text_image_proj",
        encoder_hid_dim=16,
        addition_embed_type="text_image",
    )
    return {**kandinsky21(), "unet": network}


@tiny("Kandinsky3Img2ImgPipeline", lambda rows: kandinsky3_edit_text(rows))
def kandinsky3_edit() -> dict[str, Any]:
    return kandinsky3()


def kandinsky3_edit_text(rows: range) -> dict[str, Any]:
    call = {k: v for k, v in kandinsky3_text(rows).items() if k not in SIZE}
    return {**call, "image": images(rows, 16, 16), "strength": 0.8}


@tiny(
    "KandinskyV22PriorEmb2EmbPipeline",
    lambda rows: {**alone(rows), "image": rows_of(rows, 50, 16), "strength": 0.8},
    output="pt",
    **PRIOR,
)
def kandinsky_prior_edit() -> dict[str, Any]:
    return kandinsky_prior()
