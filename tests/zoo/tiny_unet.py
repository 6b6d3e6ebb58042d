"""Tiny pipelines whose denoiser is a UNet and whose result is a picture: Stable Diffusion and its kin."""

from typing import Any

import diffusers
from tiny_core import (
    SCALE,
    autoencoder,
    clip_config,
    clip_text,
    clip_vision,
    ddim,
    ddpm,
    embeds,
    images,
    lively,
    masks,
    prompts,
    rows_of,
    tiny,
    tokenizer,
)
from torch import nn

BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
UP: dict[str, Any] = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 8}
SIZE = {"height": 16, "width": 16}
XL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
    "use_linear_projection": True,
}


LEAST: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}
"""One block each way and attention in one of them, for the many pipelines that need no more: what a network's
call takes is taken by its modules, however small."""
MIDDLE = {"mid_block_type": "UNetMidBlock2DCrossAttn"}
TWO: dict[str, Any] = {
    **{name: BLOCKS[name] for name in ("block_out_channels", "down_block_types")},
    **MIDDLE,
    "up_block_types": UP["up_block_types"],
}
"""Two blocks, for what hangs on them or looks between them."""
FIRST: dict[str, Any] = {
    **TWO,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def unet(**changes: Any) -> nn.Module:
    return lively(diffusers.UNet2DConditionModel(**{**BLOCKS, **UP, **LEAST, **changes}))


def controlnet(**changes: Any) -> nn.Module:
    config = {**BLOCKS, **LEAST, "mid_block_type": "UNetMidBlock2D", **changes}
    del config["up_block_types"]
    return lively(diffusers.ControlNetModel(**config, conditioning_embedding_out_channels=(4, 8)), seed=1)


def controlnet_union() -> nn.Module:
    """Its fuser attends across the batch, so that rows influence one another."""
    least = {name: LEAST[name] for name in ("block_out_channels", "down_block_types")}
    config = {**BLOCKS, **least, **XL, "conditioning_embedding_out_channels": (4, 8), "num_control_type": 2}
    channels = {"num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}
    return lively(diffusers.ControlNetUnionModel(**config, **channels), seed=1)


def adapter() -> nn.Module:
    """For a UNet with attention in the first block."""
    return lively(diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2), seed=1)


def picture(rows: range, name: str = "image") -> dict[str, Any]:
    return {name: images(rows, 16, 16)}


def edited(rows: range) -> dict[str, Any]:
    return {**picture(rows), "strength": 0.8}


def painted(rows: range) -> dict[str, Any]:
    return {**edited(rows), "mask_image": masks(rows, 16, 16), **SIZE}


def controlled(rows: range) -> dict[str, Any]:
    return {"control_image": images(rows, 16, 16, key=51), **SIZE}


def united(rows: range) -> dict[str, Any]:
    return {"control_image": [images(rows, 16, 16, key=51)], "control_mode": [1], **SIZE}


# Stable Diffusion 1 and 2


def text(rows: range, **extra: Any) -> dict[str, Any]:
    return prompts(rows, guidance_scale=SCALE, **extra)


def sd(prediction_type: str = "epsilon", **changes: Any) -> dict[str, Any]:
    return {
        "vae": autoencoder(),
        "text_encoder": clip_text(),
        "tokenizer": tokenizer(),
        "unet": unet(**changes),
        "scheduler": ddim(prediction_type),
    }


@tiny("StableDiffusionPipeline", lambda rows: text(rows, **SIZE))
@tiny("StableDiffusionImg2ImgPipeline", lambda rows: text(rows, **edited(rows)))
@tiny("StableDiffusionInpaintPipeline", lambda rows: text(rows, **painted(rows)))
def sd1() -> dict[str, Any]:
    return sd()


@tiny("StableDiffusionPipeline, v_prediction", lambda rows: text(rows, **SIZE), "StableDiffusionPipeline")
def sd1_velocity() -> dict[str, Any]:
    return sd("v_prediction")


@tiny("StableDiffusionPipeline, sample", lambda rows: text(rows, **SIZE), "StableDiffusionPipeline")
def sd1_sample() -> dict[str, Any]:
    return sd("sample")


@tiny(
    "StableDiffusionInpaintPipeline, 9 channels",
    lambda rows: text(rows, **painted(rows)),
    "StableDiffusionInpaintPipeline",
)
def sd1_inpaint() -> dict[str, Any]:
    return sd(in_channels=9)


@tiny("StableDiffusionControlNetPipeline", lambda rows: text(rows, **picture(rows), **SIZE))
@tiny(
    "StableDiffusionControlNetImg2ImgPipeline",
    lambda rows: text(rows, **{**edited(rows), **controlled(rows)}),
)
@tiny(
    "StableDiffusionControlNetInpaintPipeline",
    lambda rows: text(rows, **{**painted(rows), **controlled(rows)}),
)
def sd1_controlnet() -> dict[str, Any]:
    return {**sd(), "controlnet": controlnet()}


@tiny("StableDiffusionAdapterPipeline", lambda rows: text(rows, **picture(rows), **SIZE))
def sd1_adapter() -> dict[str, Any]:
    return {**sd(**FIRST), "adapter": adapter()}


@tiny(
    "StableDiffusionInstructPix2PixPipeline",
    lambda rows: text(rows, **picture(rows), image_guidance_scale=2.0),
    branches=3,
)
def sd1_instruct() -> dict[str, Any]:
    return sd(in_channels=8)


@tiny(
    "StableDiffusionPAGPipeline",
    lambda rows: text(rows, **SIZE),
    branches=3,
    terms=1,
    off={"guidance_scale": 1.0, "pag_scale": 0.0},
)
def sd1_pag() -> dict[str, Any]:
    return sd(**MIDDLE)


@tiny(
    "StableDiffusionDepth2ImgPipeline",
    lambda rows: text(rows, **edited(rows), depth_map=images(rows, 16, 16, key=52)[:, 0]),
)
def sd2_depth() -> dict[str, Any]:
    return {**sd(in_channels=5), "depth_estimator": clip_vision()}


@tiny("StableDiffusionUpscalePipeline", lambda rows: text(rows, image=images(rows, 8, 8)))
def sd2_upscale() -> dict[str, Any]:
    return {**sd("v_prediction", in_channels=7, num_class_embeds=1000), "low_res_scheduler": ddpm()}


@tiny(
    "StableDiffusionLatentUpscalePipeline",
    lambda rows: embeds(rows, 7, 16, pooled=16, guidance_scale=SCALE, image=rows_of(rows, 50, 4, 8, 8)),
)
def sd2_latent_upscale() -> dict[str, Any]:
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="sample")
    return {**sd(in_channels=8, out_channels=5, time_cond_proj_dim=16 + 128), "scheduler": scheduler}


@tiny("StableUnCLIPImg2ImgPipeline", lambda rows: text(rows, image_embeds=rows_of(rows, 50, 16), **SIZE))
def sd2_unclip() -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    return {
        **sd(class_embed_type="projection", projection_class_embeddings_input_dim=32),
        "image_encoder": clip_vision(),
        "image_normalizer": StableUnCLIPImageNormalizer(16),
        "image_noising_scheduler": ddpm(),
    }


@tiny(
    "StableDiffusionImageVariationPipeline",
    lambda rows: {**picture(rows), "guidance_scale": SCALE, **SIZE},
)
def sd1_variation() -> dict[str, Any]:
    return {"image_encoder": clip_vision(), "unet": unet(), "vae": autoencoder(), "scheduler": ddim()}


@tiny(
    "StableDiffusionPanoramaPipeline",
    lambda rows: text(rows, height=64, width=8 * 72),
    batches=False,
)
def sd1_panorama() -> dict[str, Any]:
    """Two views, each a denoiser call of its own."""
    return {**sd(), "vae": autoencoder(depth=4)}


@tiny("StableDiffusionSAGPipeline", lambda rows: text(rows, **SIZE, sag_scale=0.0))
def sd1_sag() -> dict[str, Any]:
    return sd(**MIDDLE)


@tiny("StableDiffusionControlNetXSPipeline", lambda rows: text(rows, **picture(rows), **SIZE))
def sd1_xs() -> dict[str, Any]:
    base = sd(**TWO, layers_per_block=2)
    adapter = diffusers.ControlNetXSAdapter.from_unet(
        base["unet"], size_ratio=1, learn_time_embedding=True, conditioning_embedding_out_channels=(4, 8)
    )
    return {**base, "controlnet": lively(adapter, seed=1)}


@tiny(
    "StableDiffusionGLIGENPipeline",
    lambda rows: text(rows, **SIZE, gligen_phrases=["a boat"], gligen_boxes=[[0.1, 0.1, 0.6, 0.6]]),
)
def sd1_gligen() -> dict[str, Any]:
    return sd(attention_type="gated")


@tiny(
    "PaintByExamplePipeline",
    lambda rows: {
        "example_image": images(rows, 16, 16, key=51),
        "image": images(rows, 16, 16),
        "mask_image": masks(rows, 16, 16),
        "guidance_scale": SCALE,
    },
)
def paint_by_example() -> dict[str, Any]:
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder

    encoder = PaintByExampleImageEncoder(clip_config("vision"), proj_size=16)
    return {
        "unet": unet(in_channels=9),
        "vae": autoencoder(),
        "image_encoder": lively(encoder, seed=12),
        "scheduler": ddim(),
    }


# Stable Diffusion XL


def xl_text(rows: range, **extra: Any) -> dict[str, Any]:
    return embeds(rows, 7, 16, pooled=16, guidance_scale=SCALE, **extra)


def sdxl(**changes: Any) -> dict[str, Any]:
    return {"vae": autoencoder(), "unet": unet(**XL, **changes), "scheduler": ddim()}


@tiny("StableDiffusionXLPipeline", lambda rows: xl_text(rows, **SIZE))
@tiny("StableDiffusionXLImg2ImgPipeline", lambda rows: xl_text(rows, **edited(rows)))
@tiny("StableDiffusionXLInpaintPipeline", lambda rows: xl_text(rows, **painted(rows)))
def xl() -> dict[str, Any]:
    return sdxl()


@tiny("StableDiffusionXLControlNetPipeline", lambda rows: xl_text(rows, **picture(rows), **SIZE))
@tiny(
    "StableDiffusionXLControlNetImg2ImgPipeline",
    lambda rows: xl_text(rows, **{**edited(rows), **controlled(rows)}),
)
@tiny(
    "StableDiffusionXLControlNetInpaintPipeline",
    lambda rows: xl_text(rows, **{**painted(rows), **controlled(rows)}),
)
def xl_controlnet() -> dict[str, Any]:
    return {**sdxl(), "controlnet": controlnet(**XL)}


@tiny(
    "StableDiffusionXLControlNetUnionPipeline",
    lambda rows: xl_text(rows, **united(rows)),
    independent=False,
)
@tiny(
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    lambda rows: xl_text(rows, **{**edited(rows), **united(rows)}),
    independent=False,
)
@tiny(
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    lambda rows: xl_text(rows, **{**painted(rows), **united(rows)}),
    independent=False,
)
def xl_union() -> dict[str, Any]:
    return {**sdxl(), "controlnet": controlnet_union()}


@tiny("StableDiffusionXLAdapterPipeline", lambda rows: xl_text(rows, **picture(rows), **SIZE))
def xl_adapter() -> dict[str, Any]:
    return {**sdxl(**FIRST), "adapter": adapter()}


@tiny(
    "StableDiffusionXLInstructPix2PixPipeline",
    lambda rows: xl_text(rows, **picture(rows), **SIZE, image_guidance_scale=2.0),
    branches=3,
)
def xl_instruct() -> dict[str, Any]:
    return sdxl(in_channels=8)


@tiny(
    "StableDiffusionXLPAGPipeline",
    lambda rows: xl_text(rows, **SIZE),
    branches=3,
    terms=1,
    off={"guidance_scale": 1.0, "pag_scale": 0.0},
)
def xl_pag() -> dict[str, Any]:
    return sdxl(**MIDDLE)


@tiny("KolorsPipeline", lambda rows: xl_text(rows, **SIZE))
def kolors(**changes: Any) -> dict[str, Any]:
    return sdxl(encoder_hid_dim=16, encoder_hid_dim_type="text_proj", **changes)


# DeepFloyd IF: pixels, and a variance learned beside the noise


def pixel_text(rows: range, **extra: Any) -> dict[str, Any]:
    return embeds(rows, 7, 16, guidance_scale=SCALE, **extra)


def deepfloyd(**changes: Any) -> dict[str, Any]:
    config = {"in_channels": 3, "out_channels": 6, "resnet_time_scale_shift": "scale_shift"}
    return {
        "unet": unet(**{**config, **changes}),
        "scheduler": ddpm(variance_type="learned_range", thresholding=True, sample_max_value=1.5),
    }


@tiny("IFPipeline", lambda rows: pixel_text(rows, **SIZE), output="pt")
@tiny("IFImg2ImgPipeline", lambda rows: pixel_text(rows, **edited(rows)), output="pt")
@tiny(
    "IFInpaintingPipeline",
    lambda rows: pixel_text(rows, **edited(rows), mask_image=masks(rows, 16, 16)),
    output="pt",
)
def deepfloyd_if() -> dict[str, Any]:
    return deepfloyd()


@tiny(
    "IFSuperResolutionPipeline",
    lambda rows: pixel_text(rows, image=images(rows, 8, 8), **SIZE),
    output="pt",
)
def deepfloyd_super() -> dict[str, Any]:
    large = deepfloyd(in_channels=6, class_embed_type="timestep")
    return {**large, "image_noising_scheduler": ddpm()}


# Kandinsky


def kandinsky_text(rows: range, **extra: Any) -> dict[str, Any]:
    named = {f"{n}image_embeds": rows_of(rows, k, 16) for k, n in enumerate(("", "negative_"))}
    return {**named, "guidance_scale": SCALE, **SIZE, **extra}


def kandinsky(**changes: Any) -> dict[str, Any]:
    image = {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16, "addition_embed_type": "image"}
    return {
        "unet": unet(**{**image, "out_channels": 8, **changes}),
        "scheduler": ddim(),
        "movq": movq(),
    }


def movq() -> nn.Module:
    return lively(
        diffusers.VQModel(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            num_vq_embeddings=12,
            latent_channels=4,
            vq_embed_dim=4,
        ),
        seed=13,
    )


def one_picture(rows: range) -> Any:
    """The same for all rows, since the pipeline puts the first row's picture under every row's mask."""
    return images(range(1), 16, 16).repeat(len(rows), 1, 1, 1)


@tiny("KandinskyV22Pipeline", kandinsky_text)
@tiny("KandinskyV22Img2ImgPipeline", lambda rows: kandinsky_text(rows, **edited(rows)))
def kandinsky22() -> dict[str, Any]:
    return kandinsky()


@tiny(
    "KandinskyV22InpaintPipeline",
    lambda rows: kandinsky_text(rows, image=one_picture(rows), mask_image=masks(rows, 16, 16)),
)
def kandinsky22_inpaint() -> dict[str, Any]:
    return kandinsky(in_channels=9)


@tiny(
    "KandinskyV22ControlnetPipeline",
    lambda rows: kandinsky_text(rows, hint=images(rows, 64, 64)),
    output="pt",
)
def kandinsky22_controlnet() -> dict[str, Any]:
    return kandinsky(in_channels=8, addition_embed_type="image_hint")


# More of Stable Diffusion's kin

PAG: dict[str, Any] = {"branches": 3, "terms": 1, "off": {"guidance_scale": 1.0, "pag_scale": 0.0}}


@tiny("StableDiffusionPAGImg2ImgPipeline", lambda rows: text(rows, **edited(rows)), **PAG)
@tiny("StableDiffusionPAGInpaintPipeline", lambda rows: text(rows, **painted(rows)), **PAG)
def sd1_pag_edit() -> dict[str, Any]:
    return sd(**MIDDLE)


@tiny("StableDiffusionControlNetPAGPipeline", lambda rows: text(rows, **picture(rows), **SIZE), **PAG)
@tiny(
    "StableDiffusionControlNetPAGInpaintPipeline",
    lambda rows: text(rows, **{**painted(rows), **controlled(rows)}),
    **PAG,
)
def sd1_pag_controlnet() -> dict[str, Any]:
    return {**sd(**MIDDLE), "controlnet": controlnet()}


@tiny("StableDiffusionXLPAGImg2ImgPipeline", lambda rows: xl_text(rows, **edited(rows)), **PAG)
@tiny("StableDiffusionXLPAGInpaintPipeline", lambda rows: xl_text(rows, **painted(rows)), **PAG)
def xl_pag_edit() -> dict[str, Any]:
    return sdxl(**MIDDLE)


@tiny("StableDiffusionXLControlNetPAGPipeline", lambda rows: xl_text(rows, **picture(rows), **SIZE), **PAG)
@tiny(
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    lambda rows: xl_text(rows, **{**edited(rows), **controlled(rows)}),
    **PAG,
)
def xl_pag_controlnet() -> dict[str, Any]:
    return {**sdxl(**MIDDLE), "controlnet": controlnet(**XL)}


@tiny("KolorsPAGPipeline", lambda rows: xl_text(rows, **SIZE), **PAG)
def kolors_pag() -> dict[str, Any]:
    return kolors(**MIDDLE)


@tiny("AltDiffusionPipeline", lambda rows: text(rows, **SIZE))
@tiny("AltDiffusionImg2ImgPipeline", lambda rows: text(rows, **edited(rows)))
@tiny("StableDiffusionModelEditingPipeline", lambda rows: text(rows, **SIZE))
@tiny("SemanticStableDiffusionPipeline", lambda rows: text(rows, **SIZE))
def sd1_kin() -> dict[str, Any]:
    return sd()


@tiny("StableDiffusionLDM3DPipeline", lambda rows: text(rows, **SIZE), output="np")
def sd1_depth() -> dict[str, Any]:
    return {**sd(), "vae": autoencoder(in_channels=6, out_channels=6)}


@tiny(
    "SemanticStableDiffusionPipeline, an edit",
    lambda rows: text(rows, **SIZE, editing_prompt="a hat", edit_warmup_steps=0),
    "SemanticStableDiffusionPipeline",
    branches=3,
    batches=False,
)
def sd1_semantic() -> dict[str, Any]:
    return {**sd(), "text_encoder": clip_text(num_hidden_layers=2)}


@tiny(
    "StableDiffusionPipelineSafe, its safety off",
    lambda rows: text(rows, **SIZE, sld_guidance_scale=0.0),
    "StableDiffusionPipelineSafe",
)
def sd1_safe() -> dict[str, Any]:
    return {**sd(), "safety_checker": None}


@tiny(
    "StableDiffusionPipelineSafe",
    lambda rows: text(rows, **SIZE, sld_guidance_scale=1000.0, sld_warmup_steps=0),
    branches=3,
)
def sd1_safer() -> dict[str, Any]:
    return {**sd(), "safety_checker": None}


@tiny(
    "StableDiffusionInpaintPipelineLegacy",
    lambda rows: text(rows, **edited(rows), mask_image=masks(rows, 16, 16)),
    batches=False,
    output="np",
)
def sd1_legacy() -> dict[str, Any]:
    return sd()


@tiny(
    "StableDiffusionDiffEditPipeline",
    lambda rows: text(rows, mask_image=masks(rows, 8, 8)[:, 0], image_latents=rows_of(rows, 53, 3, 4, 8, 8)),
    batches=False,
)
def sd1_diffedit() -> dict[str, Any]:
    return {**sd(), "inverse_scheduler": diffusers.DDIMInverseScheduler()}


@tiny("StableDiffusionXLControlNetXSPipeline", lambda rows: xl_text(rows, **picture(rows), **SIZE))
def xl_xs() -> dict[str, Any]:
    base = sdxl(**TWO, layers_per_block=2)
    adapter = diffusers.ControlNetXSAdapter.from_unet(
        base["unet"], size_ratio=1, learn_time_embedding=True, conditioning_embedding_out_channels=(4, 8)
    )
    return {**base, "controlnet": lively(adapter, seed=1)}


@tiny(
    "IFImg2ImgSuperResolutionPipeline",
    lambda rows: pixel_text(rows, image=images(rows, 8, 8), original_image=images(rows, 16, 16, key=51)),
    output="pt",
)
@tiny(
    "IFInpaintingSuperResolutionPipeline",
    lambda rows: pixel_text(
        rows,
        image=images(rows, 8, 8),
        original_image=images(rows, 16, 16, key=51),
        mask_image=masks(rows, 16, 16),
    ),
    output="pt",
)
def deepfloyd_super_edit() -> dict[str, Any]:
    return deepfloyd_super()


@tiny(
    "KandinskyV22ControlnetImg2ImgPipeline",
    lambda rows: kandinsky_text(rows, **edited(rows), hint=images(rows, 64, 64)),
    output="pt",
)
def kandinsky22_controlnet_edit() -> dict[str, Any]:
    return kandinsky(in_channels=8, addition_embed_type="image_hint")
