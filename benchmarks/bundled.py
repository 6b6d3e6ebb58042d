"""The bundled models for measuring policies, in settings named scheduler-steps-guidance scale, such as "dpm-20-5".

"flow" in the scheduler's place is the second model, with its own.
"""

import sys
from pathlib import Path

import diffusers
import torch

from diffusers_guidance import samples
from diffusers_guidance.pipelines.support.loading import load

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ancestral": "EulerAncestralDiscreteScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
}
NAMES = ("dpm-20-5", "dpm-20-7.5", "ddim-20-5", "dpm-50-5", "ddim-50-5", "flow-20-5")
OUT = Path(__file__).parents[1] / "docs" / "results" / "policies"


def prompts(file: Path) -> list[str]:
    return file.read_text().splitlines()


class Bundled:
    """The pipelines on one thread: two such processes are faster than one with two threads."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.first = self.pipe = load("emoji", device="cpu")
        self.config = self.pipe.scheduler.config

    def set_up(self, name: str) -> dict:
        """Sets the pipeline and scheduler of that name; returns the arguments that belong to it."""
        scheduler, steps, scale = name.split("-")
        self.pipe = load("emoji-flow", device="cpu") if scheduler == "flow" else self.first
        config = self.pipe.scheduler.config if scheduler == "flow" else self.config
        self.pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(config)
        return {"num_inference_steps": int(steps), "guidance_scale": float(scale)}


def there(name: str) -> bool:
    """Whether the model of a setting is on this machine."""
    return not name.startswith("flow") or "emoji-flow" in samples.models()


def named() -> list[str]:
    """The settings named on the command line, or all of them."""
    found = [argument for argument in sys.argv[1:] if not argument.startswith("--")] or [*filter(there, NAMES)]
    if wrong := {*found} - {*NAMES}:
        sys.exit(f"no settings {', '.join(sorted(wrong))}: choose among {', '.join(NAMES)}")
    return found


def report(name: str):
    return lambda what, done, total: print(f"{name} {done}/{total} {what}", flush=True)
