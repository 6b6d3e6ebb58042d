"""Makes the calibrations of the bundled model that lie in samples/calibrations.

    python benchmarks/calibrations.py [dpm-20-5 ...]

Interrupted, it goes on where it stopped. A quarter hour on two cores for all of them.
"""

import sys

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from diffusers_guidance import samples
from diffusers_guidance.pipelines.calibrate import calibrate

SCHEDULERS = {"dpm": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}
NAMES = ("dpm-20-5", "dpm-20-7.5", "ddim-20-5", "ddim-20-7.5", "dpm-50-5", "ddim-50-5")
"""scheduler-steps-guidance scale"""
NEGATIVE = ("", "noto emoji", "", "face")
"""Half of the trajectories have the empty negative prompt."""


def main() -> None:
    torch.set_num_threads(1)
    pipe = StableDiffusionPipeline.from_pretrained(samples.MODEL)
    pipe.set_progress_bar_config(disable=True)
    prompts = samples.CALIBRATION_PROMPTS.read_text().split("\n")
    config = pipe.scheduler.config
    for name in sys.argv[1:] or NAMES:
        scheduler, steps, scale = name.split("-")
        pipe.scheduler = SCHEDULERS[scheduler].from_config(config)
        calibrate(
            pipe,
            [prompt for prompt in prompts if prompt],
            negative_prompts=NEGATIVE,
            num_inference_steps=int(steps),
            guidance_scale=float(scale),
            batch_size=16,
            path=samples.CALIBRATIONS / f"{name}.safetensors",
            progress=lambda what, done, total, name=name: print(name, what, done, total, flush=True),
        )


if __name__ == "__main__":
    main()
