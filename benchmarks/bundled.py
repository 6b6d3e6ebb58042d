"""The bundled model for measuring policies, in settings named scheduler-steps-guidance scale, such as "dpm-20-5"."""

import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from diffusers_guidance import samples
from diffusers_guidance.pipelines.support.loading import load_whole

NAMES = ("dpm-20-5", "dpm-20-7.5", "ddim-20-5", "dpm-50-5", "ddim-50-5")
OUT = Path(__file__).parents[1] / "docs" / "results" / "policies"
_SCHEDULERS = {"dpm": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}


def prompts(file: Path) -> list[str]:
    return file.read_text().splitlines()


class Bundled:
    """The pipeline on one thread: two such processes are faster than one with two threads."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.pipe = load_whole(StableDiffusionPipeline, samples.MODEL)
        self.pipe.set_progress_bar_config(disable=True)
        self.config = self.pipe.scheduler.config

    def set_up(self, name: str) -> dict:
        """Sets the scheduler of that name; returns the arguments that belong to it."""
        scheduler, steps, scale = name.split("-")
        self.pipe.scheduler = _SCHEDULERS[scheduler].from_config(self.config)
        return {"num_inference_steps": int(steps), "guidance_scale": float(scale)}


def named() -> list[str]:
    """The settings named on the command line, or all of them."""
    found = [argument for argument in sys.argv[1:] if not argument.startswith("--")] or [*NAMES]
    if wrong := {*found} - {*NAMES}:
        sys.exit(f"no settings {', '.join(sorted(wrong))}: choose among {', '.join(NAMES)}")
    return found


def report(name: str):
    return lambda what, done, total: print(f"{name} {done}/{total} {what}", flush=True)
