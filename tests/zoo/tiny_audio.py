"""Tiny pipelines whose result is a sound."""

from typing import Any

import diffusers
import torch
from tiny_core import (
    SCALE,
    autoencoder,
    clip_text,
    ddim,
    embeds,
    flow,
    lively,
    prompts,
    rows_of,
    tiny,
    tokenizer,
)
from tiny_unet import BLOCKS, UP

NET: dict[str, Any] = {"denoisers": ("transformer",)}


@tiny("StableAudioPipeline", lambda rows: embeds(rows, 7, 16, guidance_scale=SCALE), **NET)
def stable_audio() -> dict[str, Any]:
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    transformer = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        cross_attention_input_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
    )
    return {
        "transformer": lively(transformer),
        "vae": lively(vae, seed=13),
        "projection_model": lively(StableAudioProjectionModel(16, 16, 0, 32), seed=2),
        "scheduler": diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
    }


def audioldm_text(rows: range) -> dict[str, Any]:
    out: dict[str, Any] = {"guidance_scale": SCALE}
    for key, prefix in enumerate(("", "negative_")):
        out[f"{prefix}prompt_embeds"] = rows_of(rows, key, 7, 16)
        out[f"{prefix}generated_prompt_embeds"] = rows_of(rows, key + 2, 5, 16)
        out[f"{prefix}attention_mask"] = torch.ones(len(rows), 7, dtype=torch.long)
    return out


class Stage(torch.nn.Module):
    """A component of which the pipeline only reads the configuration."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(**config)
        self.device, self.dtype = torch.device("cpu"), torch.float32


@tiny("AudioLDM2Pipeline", audioldm_text)
def audioldm2() -> dict[str, Any]:
    config = {**BLOCKS, **UP, "cross_attention_dim": ((16, 16),) * 2, "attention_head_dim": 2}
    return {
        "unet": lively(diffusers.AudioLDM2UNet2DConditionModel(**config)),
        "vae": autoencoder(in_channels=1, out_channels=1),
        "vocoder": Stage(upsample_rates=[2, 2], sampling_rate=16000, model_in_dim=16),
        "language_model": Stage(),
        "text_encoder_2": Stage(model_type="t5"),
        "scheduler": ddim(),
    }


@tiny(
    "AceStepPipeline",
    lambda rows: words(rows, lyrics=["la la"] * len(rows), audio_duration=0.4),
    independent=False,
    **NET,
)
def ace_step() -> dict[str, Any]:
    """It has an APG of its own in place of plain guidance; prompts are padded to the longest of the batch."""
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    shared: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    shared |= {"num_key_value_heads": 1, "head_dim": 16}
    transformer = diffusers.AceStepTransformer1DModel(
        **shared, num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4
    )
    encoder = AceStepConditionEncoder(
        **shared,
        text_hidden_dim=16,
        timbre_hidden_dim=4,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        sampling_rate=400,
    )
    return {
        "transformer": lively(transformer),
        "condition_encoder": lively(encoder, seed=2),
        "text_encoder": clip_text(max_position_embeddings=512),
        "tokenizer": tokenizer(),
        "vae": lively(vae, seed=13),
        "scheduler": flow(num_train_timesteps=1, shift=1.0),
    }


def words(rows: range, **extra: Any) -> dict[str, Any]:
    call = prompts(range(rows.start, rows.stop + 1))
    return {"prompt": call["prompt"][: len(rows)], "guidance_scale": SCALE, **extra}


@tiny("AudioLDMPipeline", lambda rows: embeds(rows, 16, guidance_scale=SCALE), output=None)
@tiny("MusicLDMPipeline", lambda rows: embeds(rows, 16, guidance_scale=SCALE), output=None)
def audioldm() -> dict[str, Any]:
    text_encoder = Stage()
    text_encoder.text_model = Stage()
    config = {**BLOCKS, **UP, "cross_attention_dim": (8, 16), "class_embed_type": "simple_projection"}
    config |= {"projection_class_embeddings_input_dim": 16, "class_embeddings_concat": True}
    return {
        "unet": lively(diffusers.UNet2DConditionModel(**config)),
        "vae": autoencoder(in_channels=1, out_channels=1),
        "vocoder": vocoder(),
        "text_encoder": text_encoder,
        "scheduler": ddim(),
    }


def vocoder() -> Any:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=16,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )
    return lively(SpeechT5HifiGan(config), seed=14)


@tiny("StableAudio3Pipeline", lambda rows: embeds(rows, 7, 16, guidance_scale=SCALE, duration=1.0), **NET)
def stable_audio3() -> dict[str, Any]:
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

    transformer = diffusers.StableAudio3DiTModel(
        io_channels=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        cond_token_dim=16,
        global_cond_dim=16,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=2,
    )
    vae = Stage(sampling_rate=64, latent_dim=4)
    vae.downsampling_ratio = 4
    return {
        "transformer": lively(transformer),
        "vae": vae,
        "text_encoder": Stage(),
        "duration_embedder": lively(StableAudio3DurationEmbedder(output_dim=16, fourier_dim=16), seed=2),
        "scheduler": flow(),
    }
