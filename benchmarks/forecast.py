"""Measures `Forecast`, with nothing calibrated, beside CFG in fewer steps: docs/results/forecast/*.json and summary.md.

    python benchmarks/forecast.py [ddim-20-5 ...]

Settings are scheduler-steps-guidance scale. It uses 16 held-out prompts and one seed; none of them was used for any
choice (but the first eight prompts had been looked at with another seed). It writes each row at once, and keeps
existing rows. It measures the mean of the pictures' PSNR to full guidance, for CFG in fewer steps too.
"""

import sys
from functools import cached_property
from pathlib import Path

from bundled import SCHEDULERS, Bundled, prompts, there
from rows import Rows

from diffusers_guidance import EveryStep, Forecast, Hold, Policy, samples
from diffusers_guidance.files import write
from diffusers_guidance.pipelines.pictures.fidelity import Fidelity
from diffusers_guidance.pipelines.pictures.measures import PSNR

OUT = Path(__file__).parents[1] / "docs" / "results" / "forecast"
SEED = 97531
NAMES = (
    "ddim-20-5", "euler-20-5", "dpm-20-5", "unipc-20-5", "ddim-20-7.5", "dpm-20-7.5", "ddim-50-5", "ancestral-20-5",
    "dpm-50-5", "unipc-20-7.5", "euler-20-7.5", "flow-20-5",
)  # fmt: skip
BUDGETS = {20: (30, 26, 20), 50: (58, 40, 30)}


class Setting:
    """One scheduler, number of steps and scale: pictures of full guidance, and the rows measured so far."""

    def __init__(self, bundled: Bundled, name: str, folder: Path = OUT):
        self.bundled, self.name = bundled, name
        self.call = bundled.set_up(name)
        self.steps, self.scale = self.call["num_inference_steps"], self.call["guidance_scale"]
        self.rows = Rows(folder / f"{name}.json")

    @cached_property
    def fidelity(self) -> Fidelity:
        return Fidelity(self.bundled.pipe, prompts(samples.HELDOUT_PROMPTS)[8:], (SEED,), **self.call)

    def measure(self, what: str, nfe: int, policy: Policy, **changed: int) -> None:
        def row() -> dict[str, float]:
            score = self.fidelity(policy, **changed)
            return {"nfe": score.nfe, "psnr": score.psnr, "ssim": score.ssim}

        self.rows.once(f"{what}, {nfe}", row)

    def measure_all(self) -> None:
        for nfe in BUDGETS[self.steps]:
            self.measure("Forecast", nfe, Forecast(nfe=nfe))
            self.measure("CFG in fewer steps", nfe, EveryStep(), num_inference_steps=nfe // 2)
        if self.steps == 20:
            self.measure("Hold", 30, Hold())


def summary() -> str:
    """A table of all measured rows."""
    lines = [
        "| scheduler, steps, scale | NFEs | CFG in fewer steps | `Hold` | **`Forecast`** | SSIM |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in NAMES:
        rows = Rows(OUT / f"{name}.json")
        scheduler, steps, scale = name.split("-")
        for nfe in BUDGETS[int(steps)]:
            if found := rows.get(f"Forecast, {nfe}"):
                others = [rows.get(f"{what}, {nfe}") for what in ("CFG in fewer steps", "Hold")]
                cells = [f"{row['psnr']:.1f}" if row else "" for row in others]
                setting = f"{SCHEDULERS[scheduler].removesuffix('Scheduler')}, {steps}, {scale}"
                lines.append(
                    f"| {setting} | {nfe} of {2 * int(steps)} | {' | '.join(cells)} | **{found['psnr']:.1f}** | "
                    f"{found['ssim']:.4f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    bundled, names = Bundled(), sys.argv[1:] or [*filter(there, NAMES)]
    if wrong := {*names} - {*NAMES}:
        sys.exit(f"no settings {', '.join(sorted(wrong))}: choose among {', '.join(NAMES)}")
    for name in names:
        Setting(bundled, name).measure_all()
        write(OUT / "summary.md", f"# Forecast, nothing calibrated\n\nMean PSNR in dB. {PSNR}.\n\n{summary()}".encode())


if __name__ == "__main__":
    main()
