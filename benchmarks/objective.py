"""What the closed-form search rests on, measured on the bundled model: docs/results/policies/objective-*.json.

    python benchmarks/objective.py [dpm-20-5 ...]

* Rank correlation of `predicted_error` with the PSNR of real runs over 48 random schedules, and the schedules that
  minimise it beside even spacing.
* Fits: target, regressors, per channel.
* A negative prompt that was calibrated with, and one that was not.

12 prompts of those calibrated with, a seed of its own.
"""

import json
import random
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from diffusers_guidance import samples
from diffusers_guidance.calibration import Calibration, Fit
from diffusers_guidance.pipelines.calibrate import calibrate
from diffusers_guidance.pipelines.fidelity import Fidelity
from diffusers_guidance.policies import EveryStep, Schedule
from diffusers_guidance.search import even, predicted_error, search

SCHEDULERS = {"dpm": DPMSolverMultistepScheduler, "ddim": DDIMScheduler}
OUT = Path(__file__).parents[1] / "docs" / "results" / "policies"
SEED = 77_000


def main() -> None:
    torch.set_num_threads(1)
    pipe = StableDiffusionPipeline.from_pretrained(samples.MODEL)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    prompts = samples.CALIBRATION_PROMPTS.read_text().splitlines()[::5][:12]
    for name in sys.argv[1:] or ["dpm-20-5", "dpm-20-7.5"]:
        scheduler, steps, scale = name.split("-")
        pipe.scheduler = SCHEDULERS[scheduler].from_config(config)
        calibration = Calibration.load(samples.CALIBRATIONS / f"{name}.safetensors")
        settings = {"num_inference_steps": int(steps), "guidance_scale": float(scale)}
        fidelity = Fidelity(pipe, prompts, [SEED], **settings)
        found = {
            "calibration": repr(calibration),
            "random": ranked(calibration, fidelity),
            "minimisers": minimisers(calibration, fidelity),
            "fits": fits(pipe, calibration, fidelity, settings),
            "negative prompts": negatives(pipe, calibration, prompts, settings),
        }
        (OUT / f"objective-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({key: value for key, value in found.items() if key != "random"}, indent=1))
        print("rank correlation", found["random"]["all"], "within a budget", found["random"]["within"], flush=True)


def ranked(calibration: Calibration, fidelity: Fidelity) -> dict:
    """Random schedules, half of them denser at the start."""
    draw = random.Random(1)
    rows = []
    for i in range(48):
        count = [7, 10, 12, 15][i % 4]
        keys = {t: draw.random() ** (2.718 ** (t / 8 * (i % 8 < 4))) for t in range(1, calibration.steps)}
        chosen = {0, *sorted(keys, key=lambda t: -keys[t])[: count - 1]}
        schedule = Schedule(["both" if t in chosen else "neither" for t in range(calibration.steps)], calibration)
        rows.append((count, predicted_error(schedule), fidelity(schedule).psnr))
        print(i, rows[-1], flush=True)
    within = [[row for row in rows if row[0] == count] for count in {row[0] for row in rows}]
    return {"all": spearman(rows), "within": sum(map(spearman, within)) / len(within), "rows": rows}


def spearman(rows: list) -> float:
    """Rank correlation of small predicted error with high PSNR."""
    ranks = torch.stack([torch.tensor([row[k] for row in rows]).argsort().argsort().double() for k in (1, 2)])
    return -float(torch.corrcoef(ranks)[0, 1])


def minimisers(calibration: Calibration, fidelity: Fidelity) -> list:
    return [
        {
            "nfe": nfe,
            "search": fidelity(search(calibration, nfe)).psnr,
            "even": fidelity(Schedule(even(calibration.steps, nfe // 2, "neither"), calibration)).psnr,
        }
        for nfe in (10, 14, 20, 24, 30, 34)
    ]


def fits(pipe, calibration: Calibration, fidelity: Fidelity, settings: dict) -> list:
    prompts = samples.CALIBRATION_PROMPTS.read_text().splitlines()
    channels = calibrate(pipe, prompts, trajectories=96, batch_size=16, per_channel=True, **settings)
    rows = []
    steps = calibration.steps
    for label, actions in {
        "25 NFEs, conditional always": even(steps, 5),
        "30 NFEs, conditional always": even(steps, 10),
        "24 NFEs, search": search(calibration, 24).actions,
        "16 NFEs, search": search(calibration, 16).actions,
    }.items():
        for fit in (Fit(), Fit("recent"), Fit(target="uncond"), Fit("recent", "uncond"), Fit(ridge=1e-3)):
            rows.append(
                {"schedule": label, "fit": repr(fit), "psnr": fidelity(Schedule(actions, calibration, fit)).psnr}
            )
        for fit in (Fit(), Fit(per_channel=True)):
            psnr = fidelity(Schedule(actions, channels, fit)).psnr
            rows.append({"schedule": label, "fit": f"{fit!r}, 96 trajectories", "psnr": psnr})
    return rows


def negatives(pipe, calibration: Calibration, prompts: list, settings: dict) -> list:
    rows = []
    for negative in ("", "noto emoji", "flat emoji"):
        fidelity = Fidelity(pipe, prompts, [SEED], negative_prompt=negative, **settings)
        for nfe in (16, 24, 30):
            rows.append(
                {
                    "negative prompt": negative,
                    "calibrated with": calibration.prompts.get(negative, 0),
                    "nfe": nfe,
                    "search": fidelity(search(calibration, nfe)).psnr,
                    "fewer steps": fidelity(EveryStep(), num_inference_steps=nfe // 2).psnr,
                }
            )
    return rows


if __name__ == "__main__":
    main()
