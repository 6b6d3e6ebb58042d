"""Measures `Forecast()` with further schedulers: docs/results/schedulers.json, and the table in docs/forecast.md.

    python benchmarks/schedulers.py

On the first bundled model at scale 5, four held-out prompts and one seed: the mean of the pictures' PSNR to full
guidance, beside CFG in as many steps as make no more evaluations, and `Hold`. It writes each row at once, and keeps
existing rows.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
from bundled import Bundled, prompts
from rows import Rows

from diffusers_guidance import EveryStep, Forecast, Hold, samples
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity

DOCS = Path(__file__).parents[1] / "docs"
OUT, PAGE = DOCS / "results" / "schedulers.json", DOCS / "forecast.md"
PART = re.compile(r"(<!-- by benchmarks/schedulers.py -->\n).*?(?=<!-- end -->)", re.DOTALL)
SEED, SCALE = 97531, 5.0


@dataclass(frozen=True)
class Setting:
    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    steps: int = 20


SETTINGS = {
    "Heun, 12 steps (23 evaluations)": Setting("HeunDiscreteScheduler", steps=12),
    "KDPM2, 12 steps (23 evaluations)": Setting("KDPM2DiscreteScheduler", steps=12),
    "DPM-Solver++ 2M, Karras sigmas": Setting("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "Euler, Karras sigmas": Setting("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM-Solver++ 2S": Setting("DPMSolverSinglestepScheduler"),
    "DEIS": Setting("DEISMultistepScheduler"),
    "DDIM, trailing, zero terminal SNR": Setting(
        "DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    ),
    "Euler ancestral (the same noise)": Setting("EulerAncestralDiscreteScheduler"),
    "DDPM (the same noise)": Setting("DDPMScheduler"),
    "SDE-DPM-Solver++ (the same noise)": Setting("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "LCM (the same noise)": Setting("LCMScheduler"),
    "PNDM": Setting("PNDMScheduler"),
}


def evaluations(scheduler: Any, steps: int) -> int:
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def measured(bundled: Bundled, setting: Setting) -> dict[str, float]:
    """A row: dB by what was done."""
    pipe = bundled.first
    pipe.scheduler = getattr(diffusers, setting.scheduler).from_config(bundled.config, **setting.config)
    call = {"num_inference_steps": setting.steps, "guidance_scale": SCALE}
    full = Fidelity(pipe, prompts(samples.HELDOUT_PROMPTS)[8:12], (SEED,), **call)
    ours = full(Forecast())
    fewer = max(n for n in range(4, setting.steps) if 2 * evaluations(pipe.scheduler, n) <= ours.nfe)
    return {
        "nfe": ours.nfe,
        "Forecast": ours.psnr,
        "steps": fewer,
        "CFG in fewer steps": full(EveryStep(), num_inference_steps=fewer).psnr,
        "Hold": full(Hold()).psnr,
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    """With the best of each row in bold."""
    ways = ("Forecast", "CFG in fewer steps", "Hold")
    lines = ["| scheduler | `Forecast` | CFG in fewer steps | `Hold` |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        best = max(row[way] for way in ways)
        cells = [f"**{row[way]:.1f}**" if row[way] == best else f"{row[way]:.1f}" for way in ways]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows, bundled = Rows(OUT, seed=SEED, scale=SCALE), Bundled()
    for name, setting in SETTINGS.items():
        rows.once(name, lambda setting=setting: measured(bundled, setting))
    found = {name: rows[name] for name in SETTINGS}
    write(PAGE, PART.sub(lambda part: part[1] + "\n" + table(found) + "\n", PAGE.read_text()).encode())


if __name__ == "__main__":
    main()
