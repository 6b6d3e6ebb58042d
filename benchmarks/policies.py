"""Measures the frontier of the bundled model with its calibrations: docs/results/policies/*.json and *.png.

    python benchmarks/policies.py [dpm-20-5 ...]

16 held-out prompts, a seed each that took no part in calibrating. Interrupted, it goes on where it stopped.
"""

import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from diffusers_guidance import samples
from diffusers_guidance.calibration import Calibration
from diffusers_guidance.pipelines.frontier import frontier, plot

SCHEDULERS = {"dpm": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}
OUT = Path(__file__).parents[1] / "docs" / "results" / "policies"
SEED = 4321
SEARCHES = {"dpm-20-5": [0.625, 0.75, 0.875], "dpm-20-7.5": [0.625, 0.75, 0.875]}
"""Where searches by real runs, which take minutes each, are measured too."""


def main() -> None:
    torch.set_num_threads(1)
    pipe = StableDiffusionPipeline.from_pretrained(samples.MODEL)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    heldout = samples.HELDOUT_PROMPTS.read_text().splitlines()[:16]
    searched = samples.CALIBRATION_PROMPTS.read_text().splitlines()[::6]
    names = [name for name in sys.argv[1:] if name[0] != "-"] or sorted(
        path.stem for path in samples.CALIBRATIONS.glob("*.safetensors")
    )
    for name in names:
        pipe.scheduler = SCHEDULERS[name.split("-")[0]].from_config(config)
        calibration = Calibration.load(samples.CALIBRATIONS / f"{name}.safetensors")
        budgets = [] if "--quick" in sys.argv else SEARCHES.get(name, [])
        rows = frontier(
            pipe,
            calibration,
            heldout,
            search_prompts=searched,
            seeds=[SEED],
            refine=budgets,
            nas=budgets[1:2],
            path=OUT / f"{name}.json",
            progress=lambda what, done, total, name=name: print(name, done, total, what, flush=True),
        )
        plot(rows, OUT / f"{name}.png", f"{type(pipe.scheduler).__name__}, {calibration.steps} steps, bundled model")
        for row in rows:
            print(f"{row.series:48s} {row.label:28s} {row.nfe:6.2f} {row.psnr:6.2f} dB {row.ssim:.4f}")


if __name__ == "__main__":
    main()
