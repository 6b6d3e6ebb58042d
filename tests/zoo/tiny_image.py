"""Tiny pipelines whose denoiser is a transformer and whose result is a picture."""

from typing import Any

import diffusers
import torch
from tiny_core import (
    BETAS,
    SCALE,
    SUBJECTS,
    TRUE_OFF,
    autoencoder,
    ddim,
    ddpm,
    embeds,
    flow,
    images,
    lively,
    masks,
    narrow,
    prompts,
    rows_of,
    tiny,
    tokenizer,
)
from torch import nn

NET = {"denoisers": ("transformer",)}
PAIRS: dict[str, Any] = {**NET, "style": "sequential"}
ZERO = {"guidance_scale": 0.0}  # where c + w (c - u) is the formula
TRUE: dict[str, Any] = {**PAIRS, "off": TRUE_OFF}
SIZE = {"height": 16, "width": 16}


def edited(rows: range) -> dict[str, Any]:
    return {"image": images(rows, 16, 16), "strength": 0.8, **SIZE}


def painted(rows: range) -> dict[str, Any]:
    return {**edited(rows), "mask_image": masks(rows, 16, 16)}


def controlled(rows: range) -> dict[str, Any]:
    return {"control_image": images(rows, 16, 16, key=51), **SIZE}


# Stable Diffusion 3


def sd3_text(rows: range, **extra: Any) -> dict[str, Any]:
    return embeds(rows, 7, 16, pooled=16, guidance_scale=SCALE, **extra)


SD3: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
}


@tiny("StableDiffusion3Pipeline", lambda rows: sd3_text(rows, **SIZE), **NET)
@tiny("StableDiffusion3Img2ImgPipeline", lambda rows: sd3_text(rows, **edited(rows)), **NET)
@tiny("StableDiffusion3InpaintPipeline", lambda rows: sd3_text(rows, **painted(rows)), **NET)
def sd3(**changes: Any) -> dict[str, Any]:
    transformer = diffusers.SD3Transformer2DModel(**{**SD3, **changes})
    return {"transformer": lively(transformer), "vae": autoencoder(16, shift_factor=0.0), "scheduler": flow()}


@tiny(
    "StableDiffusion3Pipeline, skipped layers",
    lambda rows: sd3_text(
        rows, **SIZE, skip_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.8
    ),
    "StableDiffusion3Pipeline",
    further=1,
    **NET,
)
def sd3_skipped() -> dict[str, Any]:
    return sd3(num_layers=2)


@tiny("StableDiffusion3ControlNetPipeline", lambda rows: sd3_text(rows, **controlled(rows)), **NET)
def sd3_controlnet() -> dict[str, Any]:
    controlnet = diffusers.SD3ControlNetModel(**SD3)
    return {**sd3(), "controlnet": lively(controlnet, seed=1)}


@tiny(
    "StableDiffusion3ControlNetInpaintingPipeline",
    lambda rows: sd3_text(rows, **controlled(rows), control_mask=masks(rows, 16, 16)),
    **NET,
)
def sd3_controlnet_inpaint() -> dict[str, Any]:
    controlnet = diffusers.SD3ControlNetModel(**SD3, extra_conditioning_channels=1)
    return {**sd3(), "controlnet": lively(controlnet, seed=1)}


# PixArt


def pixart_text(rows: range) -> dict[str, Any]:
    masked = embeds(rows, 7, 16, mask="attention_mask", guidance_scale=SCALE, use_resolution_binning=False)
    return {**masked, **SIZE, "negative_prompt": None}


@tiny("PixArtAlphaPipeline", pixart_text, **NET)
@tiny("PixArtSigmaPipeline", pixart_text, **NET)
def pixart() -> dict[str, Any]:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    return {
        "transformer": lively(transformer),
        "vae": autoencoder(),
        "scheduler": diffusers.DPMSolverMultistepScheduler(**BETAS),
    }


# Flux


def flux_text(rows: range, **extra: Any) -> dict[str, Any]:
    return embeds(rows, 7, 16, pooled=16, true_cfg_scale=SCALE, **extra)


FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}


@tiny("FluxPipeline", lambda rows: flux_text(rows, **SIZE), **TRUE)
@tiny("FluxImg2ImgPipeline", lambda rows: flux_text(rows, **edited(rows)), **TRUE)
@tiny("FluxInpaintPipeline", lambda rows: flux_text(rows, **painted(rows)), **TRUE)
@tiny(
    "FluxKontextPipeline",
    lambda rows: flux_text(rows, image=images(rows, 16, 16), **SIZE, max_area=256, _auto_resize=False),
    **TRUE,
)
def flux() -> dict[str, Any]:
    transformer = diffusers.FluxTransformer2DModel(**FLUX)
    return {"transformer": lively(transformer), "vae": autoencoder(shift_factor=0.0), "scheduler": flow()}


@tiny("FluxControlNetPipeline", lambda rows: flux_text(rows, **controlled(rows)), **TRUE)
def flux_controlnet() -> dict[str, Any]:
    return {**flux(), "controlnet": lively(diffusers.FluxControlNetModel(**FLUX), seed=1)}


def shifting() -> Any:
    return flow(use_dynamic_shifting=True)


# Qwen-Image


def qwen_text(rows: range, **extra: Any) -> dict[str, Any]:
    return embeds(rows, 7, 16, mask="embeds_mask", true_cfg_scale=SCALE, **extra)


QWEN: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}


def qwen_vae() -> nn.Module:
    return lively(
        diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        seed=13,
    )


@tiny("QwenImagePipeline", lambda rows: qwen_text(rows, **SIZE), **TRUE)
@tiny("QwenImageImg2ImgPipeline", lambda rows: qwen_text(rows, **edited(rows)), **TRUE)
@tiny("QwenImageInpaintPipeline", lambda rows: qwen_text(rows, **painted(rows)), **TRUE)
def qwen() -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(**QWEN)
    return {
        "transformer": lively(transformer),
        "vae": qwen_vae(),
        "scheduler": flow(use_dynamic_shifting=True),
    }


@tiny(
    "QwenImageControlNetInpaintPipeline",
    lambda rows: qwen_text(rows, **controlled(rows), control_mask=masks(rows, 16, 16)),
    batches=False,
    **TRUE,
)
def qwen_controlnet_inpaint() -> dict[str, Any]:
    config = {**QWEN, "extra_condition_channels": 4}
    return {**qwen(), "controlnet": lively(diffusers.QwenImageControlNetModel(**config), seed=1)}


@tiny("QwenImageControlNetPipeline", lambda rows: qwen_text(rows, **controlled(rows)), **TRUE)
def qwen_controlnet() -> dict[str, Any]:
    controlnet = diffusers.QwenImageControlNetModel(**QWEN)
    return {**qwen(), "controlnet": lively(controlnet, seed=1)}


def deep_vae() -> nn.Module:
    """Latents a thirty-second of the size, found without a network: editing makes pictures of a megapixel."""
    config = {"dim_mult": [1] * 6, "num_res_blocks": 1, "temperal_downsample": [False] * 5}
    config |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = lively(diffusers.AutoencoderKLQwenImage(base_dim=2, z_dim=4, **config), seed=13)
    vae.encode = shrink
    return vae


def shrink(picture: torch.Tensor) -> Any:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    mean = torch.nn.functional.avg_pool3d(picture, (1, 32, 32))[:, [0, 1, 2, 0]]
    parameters = torch.cat([mean, mean * 0 - 30], 1)
    return AutoencoderKLOutput(DiagonalGaussianDistribution(parameters, deterministic=True))


@tiny(
    "QwenImageEditPipeline",
    lambda rows: qwen_text(rows, image=photographs(rows), height=256, width=256),
    **TRUE,
)
@tiny(
    "QwenImageEditPlusPipeline",
    lambda rows: qwen_text(rows, image=photographs(rows), height=256, width=256),
    batches=False,
    **TRUE,
)
def qwen_edit() -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(**QWEN)
    return {**qwen(), "transformer": lively(transformer, gain=1.5), "vae": deep_vae()}


def photographs(rows: range) -> Any:
    from PIL import Image

    pixels = images(rows, 16, 16).permute(0, 2, 3, 1).mul(255).byte().numpy()
    return [Image.fromarray(picture) for picture in pixels]


# Sana, Lumina, AuraFlow


def masked_text(rows: range, **extra: Any) -> dict[str, Any]:
    return embeds(rows, 7, 16, mask="attention_mask", guidance_scale=SCALE, **extra)


LINEAR: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "sample_size": 8,
}


def sana_text(rows: range, **extra: Any) -> dict[str, Any]:
    return masked_text(rows, negative_prompt=None, use_resolution_binning=False, **extra)


@tiny("SanaPipeline", lambda rows: sana_text(rows, height=256, width=256), **NET)
def sana() -> dict[str, Any]:
    transformer = diffusers.SanaTransformer2DModel(in_channels=4, out_channels=4, **LINEAR)
    return {"transformer": lively(transformer), "scheduler": flow(shift=3.0)}


@tiny("LuminaPipeline", lambda rows: masked_text(rows, height=64, width=64), **NET)
def lumina() -> dict[str, Any]:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=16,
    )
    return {"transformer": lively(transformer), "vae": autoencoder(), "scheduler": flow()}


@tiny("Lumina2Pipeline", lambda rows: masked_text(rows, height=64, width=64), **PAIRS)
def lumina2() -> dict[str, Any]:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=16,
    )
    return {"transformer": lively(transformer), "vae": autoencoder(), "scheduler": flow()}


@tiny("AuraFlowPipeline", lambda rows: masked_text(rows, **SIZE), **NET)
def aura_flow() -> dict[str, Any]:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return {"transformer": lively(transformer, gain=1.5), "vae": autoencoder(), "scheduler": flow()}


# CogView


def plain_text(rows: range, **extra: Any) -> dict[str, Any]:
    return embeds(rows, 7, 16, guidance_scale=SCALE, **extra)


COGVIEW: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "pos_embed_max_size": 8,
    "sample_size": 8,
}


@tiny("CogView3PlusPipeline", lambda rows: plain_text(rows, **SIZE), **NET)
def cogview3() -> dict[str, Any]:
    transformer = diffusers.CogView3PlusTransformer2DModel(**COGVIEW)
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", **BETAS)
    return {"transformer": lively(transformer), "vae": autoencoder(), "scheduler": scheduler}


@tiny("CogView4Pipeline", lambda rows: plain_text(rows, **SIZE), **PAIRS)
def cogview4() -> dict[str, Any]:
    transformer = diffusers.CogView4Transformer2DModel(**COGVIEW, rope_axes_dim=(16, 16))
    scheduler = flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    return {"transformer": lively(transformer), "vae": autoencoder(), "scheduler": scheduler}


@tiny(
    "CogView4ControlPipeline",
    lambda rows: plain_text(rows, **controlled(rows)),
    **PAIRS,
)
def cogview4_control() -> dict[str, Any]:
    transformer = diffusers.CogView4Transformer2DModel(**{**COGVIEW, "in_channels": 8}, rope_axes_dim=(16, 16))
    return {**cogview4(), "transformer": lively(transformer)}


# Chroma


def chroma_text(rows: range, **extra: Any) -> dict[str, Any]:
    call = masked_text(rows, **extra)
    return {k: v.bool() if k.endswith("mask") else v for k, v in call.items()}


@tiny("ChromaPipeline", lambda rows: chroma_text(rows, **SIZE), **PAIRS)
@tiny("ChromaImg2ImgPipeline", lambda rows: chroma_text(rows, **edited(rows)), **PAIRS)
def chroma() -> dict[str, Any]:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return {"transformer": lively(transformer), "vae": autoencoder(shift_factor=0.0), "scheduler": flow()}


# HiDream, HunyuanDiT, DiT, Z-Image, PRX, Bria


def hidream_text(rows: range) -> dict[str, Any]:
    out: dict[str, Any] = {"guidance_scale": SCALE, **SIZE}
    for key, prefix in enumerate(("", "negative_")):
        out[f"{prefix}prompt_embeds_t5"] = rows_of(rows, key, 7, 16)
        out[f"{prefix}prompt_embeds_llama3"] = rows_of(rows, key + 2, 2, 7, 16).transpose(0, 1)
        out[f"{prefix}pooled_prompt_embeds"] = rows_of(rows, key + 4, 16)
    return out


@tiny("HiDreamImagePipeline", hidream_text, settings={"default_sample_size": 8}, **NET)
def hidream() -> dict[str, Any]:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=16,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    return {"transformer": lively(transformer), "vae": autoencoder(), "scheduler": flow()}


def hunyuan_text(rows: range, **extra: Any) -> dict[str, Any]:
    first = embeds(rows, 7, 16, mask="attention_mask")
    second = {f"{k}_2": v.flip(1) for k, v in first.items()}
    return {**first, **second, "guidance_scale": SCALE, "use_resolution_binning": False, **SIZE, **extra}


HUNYUAN: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "cross_attention_dim": 16,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 16,
    "text_len": 7,
    "text_len_t5": 7,
}


@tiny("HunyuanDiTPipeline", hunyuan_text, **NET)
def hunyuan_dit() -> dict[str, Any]:
    transformer = diffusers.HunyuanDiT2DModel(**HUNYUAN)
    return {"transformer": lively(transformer), "vae": autoencoder(), "scheduler": ddpm()}


@tiny(
    "DiTPipeline",
    lambda rows: {"class_labels": [r + 1 for r in rows], "guidance_scale": SCALE},
    output="np",
    **NET,
)
def dit() -> dict[str, Any]:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
    )
    return {"transformer": lively(transformer), "vae": autoencoder(), "scheduler": ddim()}


def listed_text(rows: range, **extra: Any) -> dict[str, Any]:
    return {k: list(v) for k, v in embeds(rows, 7, 16).items()} | {"guidance_scale": SCALE, **extra}


@tiny("ZImageInpaintPipeline", lambda rows: listed_text(rows, **painted(rows)), off=ZERO, **NET)
@tiny("ZImagePipeline", lambda rows: listed_text(rows, **SIZE), off=ZERO, **NET)
@tiny(
    "ZImageImg2ImgPipeline",
    lambda rows: listed_text(rows, **edited(rows)),
    off=ZERO,
    **NET,
)
def z_image() -> dict[str, Any]:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return {"transformer": lively(transformer), "vae": autoencoder(shift_factor=0.0), "scheduler": flow()}


@tiny("PRXPipeline", lambda rows: masked_text(rows, **SIZE, use_resolution_binning=False), batches=False, **NET)
def prx() -> dict[str, Any]:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=16,
        hidden_size=16,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    )
    return {"transformer": lively(transformer), "vae": autoencoder(), "scheduler": flow(shift=3.0)}


@tiny("BriaPipeline", lambda rows: plain_text(rows, **SIZE), **NET)
def bria() -> dict[str, Any]:
    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    return {"transformer": lively(transformer), "vae": autoencoder(shift_factor=0.0), "scheduler": flow()}


@tiny(
    "PRXPixelPipeline",
    lambda rows: masked_text(rows, **SIZE, use_resolution_binning=False),
    batches=False,
    output="np",
    **NET,
)
def prx_pixel() -> dict[str, Any]:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=3,
        context_in_dim=16,
        hidden_size=16,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    )
    return {"transformer": lively(transformer), "scheduler": flow(shift=3.0)}


@tiny("HunyuanDiTControlNetPipeline", lambda rows: hunyuan_text(rows, **controlled(rows)), **NET)
def hunyuan_controlnet() -> dict[str, Any]:
    config = {k: v for k, v in HUNYUAN.items() if k != "num_layers"}
    network = diffusers.HunyuanDiT2DControlNetModel(**config, transformer_num_layers=4)
    return {**hunyuan_dit(), "controlnet": lively(network, seed=1)}


@tiny(
    "SanaControlNetPipeline",
    lambda rows: sana_text(rows, control_image=images(rows, 32, 32), height=32, width=32),
    **NET,
)
def sana_controlnet() -> dict[str, Any]:
    network = diffusers.SanaControlNetModel(in_channels=4, out_channels=4, **{**LINEAR, "num_layers": 1})
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    return {**sana(), "controlnet": lively(network, seed=1), "vae": lively(vae, seed=13)}


def krea_text(rows: range) -> dict[str, Any]:
    out: dict[str, Any] = {"guidance_scale": SCALE, **SIZE}
    for key, prefix in enumerate(("", "negative_")):
        out[f"{prefix}prompt_embeds"] = rows_of(rows, key, 7, 2, 16)
        out[f"{prefix}prompt_embeds_mask"] = torch.ones(len(rows), 7, dtype=torch.bool)
    return out


@tiny("Krea2Pipeline", krea_text, off=ZERO, **PAIRS)
def krea2() -> dict[str, Any]:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )
    return {"transformer": lively(transformer), "vae": qwen_vae(), "scheduler": shifting()}


def nucleus_text(rows: range) -> dict[str, Any]:
    return embeds(rows, 7, 16, mask="embeds_mask", guidance_scale=SCALE, **SIZE)


@tiny("NucleusMoEImagePipeline", nucleus_text, **PAIRS)
def nucleus() -> dict[str, Any]:
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        moe_enabled=False,
        capacity_factors=[8.0] * 2,
    )
    return {"transformer": lively(transformer), "vae": qwen_vae(), "scheduler": shifting()}


def glm_text(rows: range) -> dict[str, Any]:
    tokens = torch.stack([torch.arange(r, r + 16) % 32 for r in rows])
    return embeds(rows, 7, 16, guidance_scale=SCALE, prior_token_ids=tokens, **SIZE)


@tiny("GlmImagePipeline", glm_text, **PAIRS)
def glm() -> dict[str, Any]:
    transformer = diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )
    scheduler = flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    vae = autoencoder(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return {"transformer": lively(transformer), "vae": vae, "scheduler": scheduler}


# Kandinsky 5


def kandinsky5_text(rows: range, **extra: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"guidance_scale": SCALE, **extra}
    for key, prefix in enumerate(("", "negative_")):
        out[f"{prefix}prompt_embeds_qwen"] = rows_of(rows, key, 7, 16)
        out[f"{prefix}prompt_embeds_clip"] = rows_of(rows, key + 2, 16)
        out[f"{prefix}prompt_cu_seqlens"] = torch.arange(0, 7 * len(rows) + 1, 7, dtype=torch.int32)
    return out


def kandinsky5_net(**changes: Any) -> nn.Module:
    return lively(
        diffusers.Kandinsky5Transformer3DModel(
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            model_dim=16,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(2, 2, 4),
            **changes,
        )
    )


@tiny(
    "Kandinsky5T2IPipeline",
    lambda rows: kandinsky5_text(rows, height=64, width=64),
    settings={"resolutions": [(64, 64)]},
    **PAIRS,
)
def kandinsky5() -> dict[str, Any]:
    return {"transformer": kandinsky5_net(), "vae": autoencoder(), "scheduler": flow(shift=5.0)}


# Flux's kin


@tiny("Flux2KleinPipeline", lambda rows: plain_text(rows, **SIZE), **PAIRS)
def flux2() -> dict[str, Any]:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    scheduler = flow(use_dynamic_shifting=True)
    return {"transformer": lively(transformer), "vae": lively(vae, seed=13), "scheduler": scheduler}


KIN: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": [4, 4, 8],
}


@tiny("OvisImagePipeline", lambda rows: plain_text(rows, **SIZE, negative_prompt=None), **PAIRS)
def ovis() -> dict[str, Any]:
    transformer = diffusers.OvisImageTransformer2DModel(**KIN, out_channels=16)
    return {"transformer": lively(transformer), "vae": autoencoder(shift_factor=0.0), "scheduler": flow()}


@tiny("ErnieImagePipeline", lambda rows: listed_text(rows, **SIZE, use_pe=False), **NET)
def ernie() -> dict[str, Any]:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(8, 4, 4),
    )
    return {**flux2(), "transformer": lively(transformer), "scheduler": flow()}


@tiny(
    "Kandinsky5I2IPipeline",
    lambda rows: kandinsky5_text(rows, image=photographs(rows)[0].resize((64, 64)), height=64, width=64),
    settings={"resolutions": [(64, 64)]},
    batches=False,
    **PAIRS,
)
def kandinsky5_edit() -> dict[str, Any]:
    return {**kandinsky5(), "transformer": kandinsky5_net(visual_cond=True), "vae": autoencoder(depth=4)}


def hunyuan_image_text(rows: range) -> dict[str, Any]:
    out: dict[str, Any] = {"height": 256, "width": 256}
    for key, prefix in enumerate(("", "negative_")):
        for number, suffix in enumerate(("", "_2")):
            out[f"{prefix}prompt_embeds{suffix}"] = rows_of(rows, key + 2 * number, 7, 16)
            out[f"{prefix}prompt_embeds_mask{suffix}"] = torch.ones(len(rows), 7)
    return out


@tiny("HunyuanImagePipeline", hunyuan_image_text, style="guider", off={}, **NET)
def hunyuan_image() -> dict[str, Any]:
    from diffusers.guiders import ClassifierFreeGuidance

    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
    )
    narrow(transformer, 32)
    guiders = {"guider": ClassifierFreeGuidance(SCALE), "ocr_guider": ClassifierFreeGuidance(SCALE)}
    return {"transformer": lively(transformer), "scheduler": flow(), **guiders}


# Perturbed attention


PAG: dict[str, Any] = {**NET, "branches": 3, "terms": 1, "off": {"guidance_scale": 1.0, "pag_scale": 0.0}}


@tiny("StableDiffusion3PAGPipeline", lambda rows: sd3_text(rows, **SIZE), **PAG)
@tiny("StableDiffusion3PAGImg2ImgPipeline", lambda rows: sd3_text(rows, **edited(rows)), **PAG)
def sd3_pag() -> dict[str, Any]:
    return {**sd3(num_layers=2), "pag_applied_layers": "blocks.1"}


@tiny("PixArtSigmaPAGPipeline", pixart_text, **PAG)
def pixart_pag() -> dict[str, Any]:
    return pixart()


@tiny("SanaPAGPipeline", lambda rows: sana_text(rows, height=256, width=256), **PAG)
def sana_pag() -> dict[str, Any]:
    return {**sana(), "pag_applied_layers": "transformer_blocks.0"}


@tiny("HunyuanDiTPAGPipeline", hunyuan_text, **PAG)
def hunyuan_pag() -> dict[str, Any]:
    return {**hunyuan_dit(), "pag_applied_layers": "blocks.1"}


# Inpainting and editing


@tiny("ChromaInpaintPipeline", lambda rows: chroma_text(rows, **painted(rows)), **PAIRS)
def chroma_inpaint() -> dict[str, Any]:
    base = chroma()
    base["transformer"].register_to_config(guidance_embeds=False)  # which the pipeline asks for
    return base


@tiny(
    "FluxKontextInpaintPipeline",
    lambda rows: flux_text(rows, **painted(rows), max_area=256, _auto_resize=False),
    **TRUE,
)
def flux_kontext_inpaint() -> dict[str, Any]:
    return flux()


@tiny("Flux2KleinInpaintPipeline", lambda rows: plain_text(rows, **painted(rows)), **PAIRS)
def flux2_inpaint() -> dict[str, Any]:
    return flux2()


@tiny(
    "QwenImageEditInpaintPipeline",
    lambda rows: qwen_text(
        rows,
        image=photographs(rows),
        mask_image=masks(rows, 256, 256),
        strength=0.8,
        height=256,
        width=256,
    ),
    batches=False,
    **TRUE,
)
def qwen_edit_inpaint() -> dict[str, Any]:
    return qwen_edit()


@tiny("ZImageControlNetPipeline", lambda rows: listed_text(rows, **controlled(rows)), off=ZERO, **NET)
def z_image_controlnet(control_in_dim: int = 4) -> dict[str, Any]:
    base = z_image()
    network = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=control_in_dim,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    return {**base, "controlnet": lively(network, seed=1)}


@tiny(
    "ZImageControlNetInpaintPipeline",
    lambda rows: listed_text(rows, **controlled(rows), image=images(rows, 16, 16), mask_image=masks(rows, 16, 16)),
    off=ZERO,
    **NET,
)
def z_image_controlnet_inpaint() -> dict[str, Any]:
    return z_image_controlnet(control_in_dim=9)


LONGCAT: dict[str, Any] = {**PAIRS, "settings": {"_encode_prompt": lambda words: spelled(words)}}


@tiny("LongCatImagePipeline", lambda rows: longcat_text(rows, enable_cfg_renorm=True), **LONGCAT)
@tiny(
    "LongCatImagePipeline, without renorm",
    lambda rows: longcat_text(rows, enable_cfg_renorm=False),
    "LongCatImagePipeline",
    **LONGCAT,
)
def longcat() -> dict[str, Any]:
    transformer = diffusers.LongCatImageTransformer2DModel(**{**KIN, "in_channels": 64}, pooled_projection_dim=16)
    vae = autoencoder(16, shift_factor=0.0)
    return {"transformer": lively(transformer), "vae": vae, "scheduler": shifting()}


def longcat_text(rows: range, **extra: Any) -> dict[str, Any]:
    one = {name: [words] if isinstance(words, str) else words for name, words in prompts(rows).items()}
    return {**one, "guidance_scale": SCALE, **SIZE, "enable_prompt_rewrite": False, **extra}


def spelled(words: list[str]) -> torch.Tensor:
    """In place of a language model: embeddings that depend on the prompt's letters."""
    return torch.cat([rows_of(range(sum(text.encode()), sum(text.encode()) + 1), 5, 7, 16) for text in words])


def wan_vae() -> nn.Module:
    config: dict[str, Any] = {"dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
    config |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    config |= {"scale_factor_temporal": 2, "scale_factor_spatial": 2}
    return lively(diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, **config), seed=13)


@tiny("BriaFiboPipeline", lambda rows: fibo_text(rows), batches=False, **NET)
def bria_fibo() -> dict[str, Any]:
    transformer = diffusers.BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        text_encoder_dim=16,
    )
    return {**fibo_texts(), "transformer": lively(transformer), "vae": wan_vae(), "scheduler": flow()}


def fibo_text(rows: range) -> dict[str, Any]:
    words = {"prompt": "a smiling red raccoon", "negative_prompt": "blurry"}
    return {**words, "guidance_scale": SCALE, "height": 32, "width": 32, "max_sequence_length": 16}


def fibo_texts() -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return {"text_encoder": lively(LlamaForCausalLM(config), seed=11), "tokenizer": words}


# Ideogram 4


def ideogram_prompt(
    prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """In place of the pipeline's, whose text encoder has 36 layers: features by the prompt's subject."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    rows = [SUBJECTS.index(text) for text in texts]
    features = torch.cat([rows_of(range(row, row + 1), 0, max_sequence_length, 12) for row in rows])
    features = torch.cat([features, torch.zeros(len(rows), grid_h * grid_w, 12)], 1)
    lengths = [max_sequence_length] * len(rows)
    ids = diffusers.Ideogram4Pipeline._prepare_ids(lengths, grid_h, grid_w, max_sequence_length, device)
    return features, *ids


def ideogram_text(rows: range, **extra: Any) -> dict[str, Any]:
    subjects = [SUBJECTS[r % len(SUBJECTS)] for r in rows]
    return {"prompt": subjects[0] if len(rows) == 1 else subjects, "max_sequence_length": 5, **extra}


@tiny(
    "Ideogram4Pipeline",
    lambda rows: ideogram_text(rows, height=16, width=16, guidance_scale=SCALE, guidance_schedule=None),
    denoisers=("transformer", "unconditional_transformer"),
    style="sequential",
    settings={"encode_prompt": ideogram_prompt},
)
def ideogram() -> dict[str, Any]:
    def net(seed: int) -> nn.Module:
        return lively(
            diffusers.Ideogram4Transformer2DModel(
                in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, intermediate_size=32,
                adaln_dim=16, llm_features_dim=12, mrope_section=(4, 2, 2),
            ),
            seed=seed,
        )  # fmt: skip

    return {
        "transformer": net(0), "unconditional_transformer": net(1), "vae": flux2()["vae"], "scheduler": flow(),
    }  # fmt: skip
