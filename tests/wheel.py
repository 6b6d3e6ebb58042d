"""Uses the installed package from another folder; `make wheel` runs it in an environment that holds nothing else."""

import sys
from pathlib import Path

from diffusers import StableDiffusionPipeline

import diffusers_guidance
from diffusers_guidance import attach
from diffusers_guidance.samples import CALIBRATION_PROMPTS, CALIBRATIONS, HELDOUT_PROMPTS, MODEL, PROMPTS

CHECKOUT = Path(__file__).resolve().parents[1]
installed = Path(diffusers_guidance.__file__).resolve()
assert Path(sys.prefix).resolve() in installed.parents, f"not the installed package: {installed}"
assert Path.cwd() != CHECKOUT
assert all(file.read_text().strip() for file in (PROMPTS, CALIBRATION_PROMPTS, HELDOUT_PROMPTS))
assert list(CALIBRATIONS.glob("*.safetensors"))

pipe = StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True)
pipe.set_progress_bar_config(disable=True)
handle = attach(pipe)
image = pipe("a red apple", num_inference_steps=5, guidance_scale=5.0).images[0]
assert image.size == (128, 128)
assert handle.report.nfe < handle.report.nfe_full == 10
print(f"{installed.parent}: {handle.report.summary()}")
