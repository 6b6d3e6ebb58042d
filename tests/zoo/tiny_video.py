"""Tiny pipelines whose result is a video."""

import inspect
from typing import Any

import diffusers
import torch
from tiny_core import (
    BETAS,
    SCALE,
    autoencoder,
    clip_text,
    clip_vision,
    ddim,
    embeds,
    flow,
    image_processor,
    images,
    lively,
    narrow,
    prompts,
    rows_of,
    tiny,
    tokenizer,
)
from tiny_image import LINEAR, kandinsky5_net, kandinsky5_text
from tiny_unet import BLOCKS, TWO, UP, XL, controlnet, unet
from torch import nn

NET: dict[str, Any] = {"denoisers": ("transformer",)}
PAIRS: dict[str, Any] = {**NET, "style": "sequential"}
EXPERTS: dict[str, Any] = {"denoisers": ("transformer", "transformer_2"), "style": "sequential"}
AUDIO: dict[str, Any] = {**NET, "off": {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}}
GUIDER: dict[str, Any] = {**NET, "style": "guider", "off": {}}
SIZE = {"height": 32, "width": 32, "num_frames": 5}


def plain_text(rows: range, **extra: Any) -> dict[str, Any]:
    return embeds(rows, 7, 16, guidance_scale=SCALE, **extra)


def masked_text(rows: range, **extra: Any) -> dict[str, Any]:
    return embeds(rows, 7, 16, mask="attention_mask", guidance_scale=SCALE, **extra)


# Wan, SkyReels


WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def wan_net(seed: int = 0, **changes: Any) -> nn.Module:
    return lively(diffusers.WanTransformer3DModel(**{**WAN, **changes}), seed)


def wan_vae() -> nn.Module:
    """Latents a fourth of the frames and half the size."""
    return lively(
        diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        ),
        seed=13,
    )


def unipc(**changes: Any) -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **changes
    )


@tiny("WanPipeline", lambda rows: plain_text(rows, **SIZE), **PAIRS)
def wan() -> dict[str, Any]:
    return {"transformer": wan_net(), "scheduler": unipc()}


@tiny("WanPipeline, a timestep per token", lambda rows: plain_text(rows, **SIZE), "WanPipeline", **PAIRS)
def wan_tokens() -> dict[str, Any]:
    return {**wan(), "expand_timesteps": True}


@tiny("WanPipeline, two experts", lambda rows: plain_text(rows, **SIZE), "WanPipeline", **EXPERTS)
def wan_experts() -> dict[str, Any]:
    return {**wan(), "transformer_2": wan_net(seed=1), "boundary_ratio": 0.875}


SMALL = {"height": 16, "width": 16, "num_frames": 5}


@tiny(
    "WanImageToVideoPipeline",
    lambda rows: plain_text(rows, image=images(rows, 16, 16), **SMALL),
    batches=False,
    **PAIRS,
)
def wan_image() -> dict[str, Any]:
    return {"transformer": wan_net(in_channels=10), "vae": wan_vae(), "scheduler": unipc()}


@tiny(
    "WanImageToVideoPipeline, two experts",
    lambda rows: plain_text(rows, image=images(rows, 16, 16), **SMALL),
    "WanImageToVideoPipeline",
    batches=False,
    **EXPERTS,
)
def wan_image_experts() -> dict[str, Any]:
    return {**wan_image(), "transformer_2": wan_net(seed=1, in_channels=10), "boundary_ratio": 0.875}


@tiny(
    "WanVideoToVideoPipeline",
    lambda rows: plain_text(rows, video=video(rows), height=16, width=16),
    batches=False,
    **PAIRS,
)
def wan_video() -> dict[str, Any]:
    return {"transformer": wan_net(), "vae": wan_vae(), "scheduler": unipc()}


def video(rows: range) -> Any:
    """(B, F, 3, H, W)"""
    return images(rows, 5, 16, 16).transpose(1, 2)


@tiny("WanVACEPipeline", lambda rows: plain_text(rows, video=video(rows), **SMALL), batches=False, **PAIRS)
def wan_vace() -> dict[str, Any]:
    transformer = diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=8 + 4)
    return {"transformer": lively(transformer), "vae": wan_vae(), "scheduler": unipc()}


@tiny("SkyReelsV2Pipeline", lambda rows: plain_text(rows, **SMALL), **PAIRS)
def skyreels() -> dict[str, Any]:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**WAN)
    return {"transformer": lively(transformer), "vae": wan_vae(), "scheduler": unipc()}


@tiny(
    "SkyReelsV2DiffusionForcingPipeline",
    lambda rows: plain_text(rows, **SMALL, base_num_frames=5, prompt=None),
    **PAIRS,
)
def skyreels_forcing() -> dict[str, Any]:
    return skyreels()


@tiny("AnyFlowPipeline", lambda rows: plain_text(rows, **SMALL), off={}, **NET)
def anyflow() -> dict[str, Any]:
    config = {k: v for k, v in WAN.items() if k != "qk_norm"}
    return {
        "transformer": lively(diffusers.AnyFlowTransformer3DModel(**config)),
        "vae": wan_vae(),
        "scheduler": diffusers.FlowMapEulerDiscreteScheduler(),
    }


@tiny(
    "AnyFlowFARPipeline",
    lambda rows: plain_text(rows, **SMALL, chunk_partition=[1, 2]),
    off={},
    **NET,
)
def anyflow_far() -> dict[str, Any]:
    config = {k: v for k, v in WAN.items() if k != "qk_norm"}
    return {**anyflow(), "transformer": lively(diffusers.AnyFlowFARTransformer3DModel(**config))}


@tiny(
    "ChronoEditPipeline",
    lambda rows: plain_text(rows, image=images(rows, 16, 16), **SMALL),
    batches=False,
    **PAIRS,
)
def chrono_edit() -> dict[str, Any]:
    network = diffusers.ChronoEditTransformer3DModel(**{**WAN, "in_channels": 10}, image_dim=16)
    return {"transformer": lively(network), "vae": wan_vae(), "scheduler": unipc(), **eyes()}


def eyes() -> dict[str, Any]:
    return {"image_encoder": clip_vision(), "image_processor": image_processor()}


@tiny("LucyEditPipeline", lambda rows: plain_text(rows, video=clip(rows), **SMALL), batches=False, **PAIRS)
def lucy() -> dict[str, Any]:
    return {"transformer": wan_net(in_channels=8), "vae": wan_vae(), "scheduler": unipc()}


def clip(rows: range) -> Any:
    """The frames of one video as pictures."""
    from PIL import Image

    frames = video(rows)[0].permute(0, 2, 3, 1).mul(255).byte().numpy()
    return [Image.fromarray(frame) for frame in frames]


@tiny(
    "SkyReelsV2ImageToVideoPipeline",
    lambda rows: plain_text(rows, image=images(rows, 16, 16), **SMALL),
    batches=False,
    **PAIRS,
)
def skyreels_image() -> dict[str, Any]:
    network = diffusers.SkyReelsV2Transformer3DModel(**{**WAN, "in_channels": 10}, image_dim=16)
    return {"transformer": lively(network), "vae": wan_vae(), "scheduler": unipc(), **eyes()}


@tiny("HeliosPipeline", lambda rows: plain_text(rows, **SMALL), **PAIRS)
def helios() -> dict[str, Any]:
    config = {k: v for k, v in WAN.items() if k != "rope_max_seq_len"}
    network = diffusers.HeliosTransformer3DModel(**config, rope_dim=(4, 4, 4))
    return {
        "transformer": lively(network),
        "vae": wan_vae(),
        "scheduler": diffusers.HeliosScheduler(stages=1),
    }


# Cosmos


class Unchecked:
    """Stands for the safety checker, which is a package of its own."""

    def to(self, *args: Any, **kwargs: Any) -> "Unchecked":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos_net(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2}
    config |= {"attention_head_dim": 16, "num_layers": 2, "mlp_ratio": 2, "text_embed_dim": 16}
    config |= {"adaln_lora_dim": 4, "max_size": (4, 32, 32), "concat_padding_mask": False}
    return lively(diffusers.CosmosTransformer3DModel(**{**config, **changes}))


@tiny("Cosmos2TextToImagePipeline", lambda rows: plain_text(rows, height=16, width=16), **PAIRS)
def cosmos2() -> dict[str, Any]:
    return {
        "transformer": cosmos_net(extra_pos_embed_type=None),
        "vae": wan_vae(),
        "scheduler": flow(use_karras_sigmas=True),
        "safety_checker": Unchecked(),
    }


@tiny(
    "Cosmos2VideoToWorldPipeline",
    lambda rows: plain_text(rows, image=images(rows, 16, 16), **SMALL),
    batches=False,
    **PAIRS,
)
def cosmos2_video() -> dict[str, Any]:
    return {**cosmos2(), "transformer": cosmos_net(extra_pos_embed_type=None, in_channels=5)}


@tiny(
    "CosmosVideoToWorldPipeline",
    lambda rows: plain_text(rows, image=images(rows, 16, 16), **SMALL),
    batches=False,
    **PAIRS,
)
def cosmos1_video() -> dict[str, Any]:
    return {**cosmos1(), "transformer": cosmos_net(in_channels=5)}


@tiny("CosmosTextToWorldPipeline", lambda rows: plain_text(rows, **SMALL), **PAIRS)
def cosmos1() -> dict[str, Any]:
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decode_block_out_channels=(8, 8),
        attention_resolutions=(8,),
        resolution=16,
        num_layers=1,
        patch_size=2,
        scaling_factor=1.0,
        spatial_compression_ratio=2,
        temporal_compression_ratio=2,
    )
    return {
        "transformer": cosmos_net(),
        "vae": lively(vae, seed=13),
        "scheduler": scheduler,
        "safety_checker": Unchecked(),
    }


# LTX


def ltx_net(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2}
    config |= {"attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 16}
    return lively(diffusers.LTXVideoTransformer3DModel(**config, **changes))


def ltx_vae() -> nn.Module:
    return lively(
        diffusers.AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            spatio_temporal_scaling=(True, False),
            decoder_spatio_temporal_scaling=(True, False),
            patch_size=2,
        ),
        seed=13,
    )


@tiny("LTXPipeline", lambda rows: masked_text(rows, **SIZE), **NET)
@tiny("LTXImageToVideoPipeline", lambda rows: masked_text(rows, image=images(rows, 32, 32), **SIZE), **NET)
def ltx() -> dict[str, Any]:
    return {"transformer": ltx_net(), "vae": ltx_vae(), "scheduler": flow(use_dynamic_shifting=True)}


@tiny("LTXConditionPipeline", lambda rows: masked_text(rows, image=images(rows, 32, 32), **SIZE), **NET)
def ltx_condition() -> dict[str, Any]:
    return {**ltx(), "scheduler": flow()}


def ltx2_text(rows: range) -> dict[str, Any]:
    plain = {f"{kind}stg_scale": 0.0 for kind in ("", "audio_")}
    plain |= {f"{kind}modality_scale": 1.0 for kind in ("", "audio_")}
    large = {"height": 64, "width": 64, "num_frames": 9}
    rescale = {"guidance_rescale": 0.0, "audio_guidance_rescale": 0.0, "audio_guidance_scale": SCALE}
    return embeds(rows, 7, 32, mask="attention_mask", guidance_scale=SCALE, **plain, **rescale, **large)


def ltx2_defaults(rows: range) -> dict[str, Any]:
    """Spatio-temporal guidance, modality isolation and rescaling, as diffusers 0.42 has them on."""
    on = {"stg_scale": 1.0, "modality_scale": 3.0, "guidance_rescale": 0.7}
    on |= {f"audio_{name}": value for name, value in on.items()}
    return {**ltx2_text(rows), **on, "spatio_temporal_guidance_blocks": [0]}


@tiny(
    "LTX2Pipeline, its defaults",
    ltx2_defaults,
    "LTX2Pipeline",
    further=2,
    off={"guidance_scale": 1.0, "audio_guidance_scale": 1.0},
    **NET,
)
def ltx2_perturbed() -> dict[str, Any]:
    return ltx2(perturbed_attn=True)


@tiny("LTX2Pipeline", ltx2_text, off={"guidance_scale": 1.0, "audio_guidance_scale": 1.0}, **NET)
def ltx2(**changes: Any) -> dict[str, Any]:
    """Picture and sound are denoised together and guided apart."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    both: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=16,
        rope_double_precision=False,
        **both,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        **changes,
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=2,
        rope_double_precision=False,
        **{f"{kind}_connector_{k}": v for kind in ("video", "audio") for k, v in both.items()},
        **{f"{kind}_connector_num_layers": 1 for kind in ("video", "audio")},
        **{f"{kind}_connector_num_learnable_registers": None for kind in ("video", "audio")},
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        patch_size=1,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    return {
        "transformer": lively(transformer),
        "connectors": lively(connectors, seed=2),
        "vae": lively(vae, seed=13),
        "audio_vae": lively(audio_vae, seed=14),
        "scheduler": flow(use_dynamic_shifting=True),
    }


# CogVideoX


def cogvideo_net(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4}
    config |= {"out_channels": 4, "time_embed_dim": 4, "text_embed_dim": 16, "num_layers": 2}
    config |= {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 7}
    config |= {"use_rotary_positional_embeddings": True}
    return lively(diffusers.CogVideoXTransformer3DModel(**{**config, **changes}))


def cogvideo_vae() -> nn.Module:
    return lively(
        diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        seed=13,
    )


@tiny("CogVideoXPipeline", lambda rows: plain_text(rows, **SIZE), **NET)
@tiny(
    "CogVideoXVideoToVideoPipeline",
    lambda rows: plain_text(rows, video=large_video(rows), height=32, width=32),
    **NET,
)
def cogvideo() -> dict[str, Any]:
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", **BETAS)
    return {"transformer": cogvideo_net(), "vae": cogvideo_vae(), "scheduler": scheduler}


def large_video(rows: range) -> Any:
    return images(rows, 5, 32, 32).transpose(1, 2)


@tiny("CogVideoXImageToVideoPipeline", lambda rows: plain_text(rows, image=images(rows, 32, 32), **SIZE), **NET)
def cogvideo_image() -> dict[str, Any]:
    return {**cogvideo(), "transformer": cogvideo_net(in_channels=8)}


@tiny(
    "CogVideoXFunControlPipeline",
    lambda rows: plain_text(rows, control_video=large_video(rows), height=32, width=32),
    **NET,
)
def cogvideo_control() -> dict[str, Any]:
    return {**cogvideo(), "transformer": cogvideo_net(in_channels=8)}


# HunyuanVideo

HUNYUAN: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 4, 8),
}


@tiny(
    "HunyuanVideoPipeline",
    lambda rows: hunyuan_text(rows, **SIZE),
    off={"true_cfg_scale": 1.0},
    **PAIRS,
)
def hunyuan_video() -> dict[str, Any]:
    transformer = diffusers.HunyuanVideoTransformer3DModel(**HUNYUAN)
    return {"transformer": lively(transformer), "scheduler": flow(shift=7.0)}


def guided() -> Any:
    from diffusers.guiders import ClassifierFreeGuidance

    return ClassifierFreeGuidance(SCALE)


def hunyuan15_text(rows: range) -> dict[str, Any]:
    out: dict[str, Any] = {**SMALL}
    for key, prefix in enumerate(("", "negative_")):
        for number, suffix in enumerate(("", "_2")):
            out[f"{prefix}prompt_embeds{suffix}"] = rows_of(rows, key + 2 * number, 7, 16)
            out[f"{prefix}prompt_embeds_mask{suffix}"] = torch.ones(len(rows), 7)
    return out


@tiny("HunyuanVideo15Pipeline", hunyuan15_text, **GUIDER)
def hunyuan_video15() -> dict[str, Any]:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 4, 8),
        task_type="t2v",
    )
    narrow(transformer, 32)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return {
        "transformer": lively(transformer),
        "vae": lively(vae, seed=13),
        "scheduler": flow(shift=7.0),
        "guider": guided(),
    }


@tiny("MotifVideoPipeline", lambda rows: embeds(rows, 7, 16, mask="attention_mask", **SMALL), **GUIDER)
def motif() -> dict[str, Any]:
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        patch_size=1,
        text_embed_dim=16,
        rope_axes_dim=(4, 4, 8),
    )
    parts = {"transformer": lively(transformer, gain=2.0), "vae": wan_vae(), "scheduler": flow()}
    return {**parts, "guider": guided()}


def hunyuan_text(rows: range, **extra: Any) -> dict[str, Any]:
    return embeds(rows, 7, 16, pooled=16, mask="attention_mask", true_cfg_scale=SCALE, **extra)


@tiny(
    "HunyuanSkyreelsImageToVideoPipeline",
    lambda rows: hunyuan_text(rows, image=images(rows, 16, 16), **SMALL),
    off={"true_cfg_scale": 1.0},
    **PAIRS,
)
def hunyuan_skyreels() -> dict[str, Any]:
    network = diffusers.HunyuanVideoTransformer3DModel(**{**HUNYUAN, "in_channels": 8})
    return {"transformer": lively(network), "vae": hunyuan_vae(), "scheduler": flow(shift=7.0)}


@tiny(
    "HunyuanVideoImageToVideoPipeline",
    lambda rows: hunyuan_text(rows, image=images(rows, 16, 16), **SMALL),
    off={"true_cfg_scale": 1.0},
    batches=False,
    **PAIRS,
)
def hunyuan_image() -> dict[str, Any]:
    condition = {"in_channels": 9, "image_condition_type": "latent_concat"}
    network = diffusers.HunyuanVideoTransformer3DModel(**{**HUNYUAN, **condition})
    return {"transformer": lively(network), "vae": hunyuan_vae(), "scheduler": flow(shift=7.0)}


def hunyuan_vae() -> nn.Module:
    return lively(
        diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            spatial_compression_ratio=4,
            mid_block_add_attention=False,
        ),
        seed=13,
    )


@tiny(
    "Kandinsky5I2VPipeline",
    lambda rows: kandinsky5_text(rows, image=images(rows, 32, 32), height=32, width=32, num_frames=21),
    batches=False,
    **PAIRS,
)
def kandinsky5_image() -> dict[str, Any]:
    return {"transformer": kandinsky5_net(visual_cond=True), "vae": hunyuan_vae(), "scheduler": flow(shift=5.0)}


# Mochi, Allegro, Latte, Sana, EasyAnimate, Kandinsky 5


@tiny("MochiPipeline", lambda rows: masked_text(rows, height=32, width=32, num_frames=7), **NET)
def mochi() -> dict[str, Any]:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=16,
        max_sequence_length=7,
    )
    return {"transformer": lively(transformer), "scheduler": flow()}


@tiny("AllegroPipeline", lambda rows: masked_text(rows, **SIZE, negative_prompt=None), **NET)
def allegro() -> dict[str, Any]:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
        caption_channels=16,
    )
    return {"transformer": lively(transformer), "scheduler": ddim()}


@tiny(
    "LattePipeline",
    lambda rows: plain_text(rows, height=16, width=16, video_length=2, negative_prompt=None),
    **NET,
)
def latte() -> dict[str, Any]:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=2,
    )
    return {"transformer": lively(transformer), "vae": autoencoder(), "scheduler": ddim()}


@tiny(
    "SanaVideoPipeline",
    lambda rows: masked_text(rows, height=32, width=32, frames=5, negative_prompt=None, use_resolution_binning=False),
    **NET,
)
def sana_video() -> dict[str, Any]:
    config = {**LINEAR, "attention_head_dim": 12, "num_cross_attention_heads": 2}
    config |= {"cross_attention_head_dim": 12, "cross_attention_dim": 24, "rope_max_seq_len": 32}
    transformer = diffusers.SanaVideoTransformer3DModel(in_channels=4, out_channels=4, **config)
    return {"transformer": lively(transformer), "scheduler": flow(shift=3.0)}


@tiny(
    "SanaImageToVideoPipeline",
    lambda rows: masked_text(
        rows,
        image=images(rows, 32, 32),
        height=32,
        width=32,
        frames=5,
        negative_prompt=None,
        use_resolution_binning=False,
    ),
    batches=False,
    **NET,
)
def sana_image() -> dict[str, Any]:
    return {**sana_video(), "vae": wan_vae()}


@tiny("EasyAnimatePipeline", lambda rows: masked_text(rows, **SMALL), **NET)
def easy_animate() -> dict[str, Any]:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        time_embed_dim=4,
        text_embed_dim=16,
        num_layers=2,
        mmdit_layers=1,
        sample_width=8,
        sample_height=8,
    )
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=[4, 4],
        down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D"],
        up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D"],
        layers_per_block=1,
        norm_num_groups=2,
    )
    return {"transformer": lively(transformer, gain=1.5), "vae": lively(vae, seed=13), "scheduler": flow()}


@tiny("Kandinsky5T2VPipeline", lambda rows: kandinsky5_text(rows, **SIZE), **PAIRS)
def kandinsky5_video() -> dict[str, Any]:
    return {"transformer": kandinsky5_net(), "scheduler": flow(shift=5.0)}


# UNets in time


def frames_text(rows: range, **extra: Any) -> dict[str, Any]:
    return prompts(rows, guidance_scale=SCALE, height=16, width=16, num_frames=2, **extra)


def text_parts() -> dict[str, Any]:
    return {
        "vae": autoencoder(),
        "text_encoder": clip_text(),
        "tokenizer": tokenizer(),
        "scheduler": ddim(),
    }


def motion(**changes: Any) -> nn.Module:
    return lively(
        diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=2,
            motion_num_attention_heads=2,
            **changes,
        ),
        seed=2,
    )


@tiny("AnimateDiffPipeline", frames_text)
def animate() -> dict[str, Any]:
    return {**text_parts(), "unet": unet(**TWO), "motion_adapter": motion()}


@tiny("AnimateDiffVideoToVideoPipeline", lambda rows: prompts(rows, **moving(rows)), batches=False)
def animate_video() -> dict[str, Any]:
    return animate()


@tiny(
    "AnimateDiffVideoToVideoControlNetPipeline",
    lambda rows: prompts(rows, **moving(rows), conditioning_frames=clip(rows)),
    batches=False,
)
def animate_video_controlnet() -> dict[str, Any]:
    return animate_controlnet()


def moving(rows: range) -> dict[str, Any]:
    return {"video": clip(rows), "strength": 0.8, "guidance_scale": SCALE, "height": 16, "width": 16}


@tiny(
    "AnimateDiffSparseControlNetPipeline",
    lambda rows: frames_text(rows, conditioning_frames=clip(rows)[:1]),
    batches=False,
)
def animate_sparse() -> dict[str, Any]:
    network = diffusers.SparseControlNetModel(
        **{**BLOCKS, "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion")},
        conditioning_embedding_out_channels=(4, 8),
        motion_num_attention_heads=2,
    )
    return {**animate(), "controlnet": lively(network, seed=1)}


@tiny("PIAPipeline", lambda rows: frames_text(rows, image=images(rows, 16, 16)), batches=False)
def pia() -> dict[str, Any]:
    return {**text_parts(), "unet": unet(**TWO), "motion_adapter": motion(conv_in_channels=9)}


@tiny(
    "AnimateDiffControlNetPipeline",
    lambda rows: frames_text(rows, conditioning_frames=list(images(range(2), 16, 16))),
    batches=False,
)
def animate_controlnet() -> dict[str, Any]:
    return {**animate(), "controlnet": controlnet(**TWO)}


@tiny(
    "AnimateDiffSDXLPipeline",
    lambda rows: embeds(rows, 7, 16, pooled=16, guidance_scale=SCALE, height=16, width=16, num_frames=2),
)
def animate_xl() -> dict[str, Any]:
    return {"vae": autoencoder(), "unet": unet(**TWO, **XL), "motion_adapter": motion(), "scheduler": ddim()}


IN_TIME: dict[str, Any] = {
    **BLOCKS,
    **UP,
    "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
    "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
    "attention_head_dim": 4,
}


@tiny("TextToVideoSDPipeline", frames_text)
@tiny(
    "VideoToVideoSDPipeline",
    lambda rows: prompts(rows, guidance_scale=SCALE, video=video(rows), strength=0.8),
    batches=False,
)
def text_to_video() -> dict[str, Any]:
    return {**text_parts(), "unet": lively(diffusers.UNet3DConditionModel(**IN_TIME))}


@tiny("I2VGenXLPipeline", lambda rows: frames_text(rows, image=images(rows, 16, 16), clip_skip=None))
def i2vgen() -> dict[str, Any]:
    return {
        **text_parts(),
        "unet": lively(diffusers.I2VGenXLUNet(**IN_TIME)),
        "image_encoder": clip_vision(),
        "feature_extractor": image_processor(),
    }


def still(rows: range) -> dict[str, Any]:
    size = {"height": 16, "width": 16, "num_frames": 2}
    return {"image": images(rows, 16, 16), "max_guidance_scale": SCALE, **size}


@tiny("StableVideoDiffusionPipeline", still, off={"max_guidance_scale": 1.0})
def svd() -> dict[str, Any]:
    network = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=2,
        num_frames=2,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.02, sigma_max=20.0, **BETAS
    )
    return {
        "unet": lively(network),
        "vae": lively(vae, seed=13),
        "image_encoder": clip_vision(),
        "feature_extractor": image_processor(),
        "scheduler": scheduler,
    }


@tiny("AnimateDiffPAGPipeline", frames_text, branches=3, terms=1, off={"guidance_scale": 1.0, "pag_scale": 0.0})
def animate_pag() -> dict[str, Any]:
    return animate()


@tiny("LTX2ConditionPipeline", lambda rows: ltx2_text(rows), **AUDIO)
def ltx2_condition() -> dict[str, Any]:
    return ltx2()


def ltx2_picture(rows: range) -> dict[str, Any]:
    """Its picture is not compressed, where that is asked."""
    taken = inspect.signature(diffusers.LTX2ImageToVideoPipeline.__call__).parameters
    return {**ltx2_text(rows), "image": images(rows, 64, 64), **({"image_crf": 0} if "image_crf" in taken else {})}


@tiny("LTX2ImageToVideoPipeline", ltx2_picture, **AUDIO)
def ltx2_image() -> dict[str, Any]:
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        patch_size=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
    )
    return {**ltx2(), "vae": lively(vae, seed=13)}
