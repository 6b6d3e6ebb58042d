"""Uses the installed package from another folder; `make wheel` runs it in an environment that holds nothing else."""

import sys
from importlib.metadata import version
from pathlib import Path

from diffusers import StableDiffusionPipeline

import diffusers_guidance
from diffusers_guidance import attach
from diffusers_guidance.pipelines.support.loading import load
from diffusers_guidance.samples import CALIBRATION_PROMPTS, CALIBRATIONS, HELDOUT_PROMPTS, MODEL, PROMPTS, model

CHECKOUT = Path(__file__).resolve().parents[1]
installed = Path(diffusers_guidance.__file__).resolve()
assert Path(sys.prefix).resolve() in installed.parents, f"not the installed package: {installed}"
assert Path.cwd() != CHECKOUT
assert all(file.read_text().strip() for file in (PROMPTS, CALIBRATION_PROMPTS, HELDOUT_PROMPTS))
assert list(CALIBRATIONS.glob("*.safetensors"))
assert diffusers_guidance.__version__ == version("diffusers-guidance")
wheel = next((CHECKOUT / "dist").glob("diffusers_guidance-*.whl"))
assert wheel.stat().st_size < 35 * 2**20, f"{wheel.name} has {wheel.stat().st_size / 2**20:.1f} MB: at most 35"
for further in (CHECKOUT / "dist").glob("diffusers_guidance_models-*.whl"):
    assert further.stat().st_size < 40e6, f"{further.name} has {further.stat().st_size / 1e6:.1f} MB: at most 40"
    assert Path(sys.prefix).resolve() in model("emoji-flow").resolve().parents
    second = load("emoji-flow", device="cpu")
    with attach(second) as handle:
        assert second("a red apple", num_inference_steps=6, guidance_scale=5.0).images[0].size == (128, 128)
    assert handle.report.nfe < handle.report.nfe_full == 12

pipe = StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True)
pipe.set_progress_bar_config(disable=True)
handle = attach(pipe)
image = pipe("a red apple", num_inference_steps=5, guidance_scale=5.0).images[0]
assert image.size == (128, 128)
assert handle.report.nfe < handle.report.nfe_full == 10
print(f"{installed.parent}: {handle.report.summary()}")
