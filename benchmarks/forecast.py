"""Measures `Forecast`, with nothing calibrated, beside CFG in fewer steps: docs/results/forecast/*.json and summary.md.

    python benchmarks/forecast.py [ddim-20-5 ...]

Settings are scheduler-steps-guidance scale. It uses 16 held-out prompts and one seed; none of them was used for any
choice (but the first eight prompts had been looked at with another seed). It writes each row at once, and keeps
existing rows. It measures the mean of the pictures' PSNR to full guidance, for CFG in fewer steps too.
"""

import json
import sys
from functools import cached_property
from pathlib import Path

from bundled import SCHEDULERS, Bundled, prompts, there

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

    def __init__(self, bundled: Bundled, name: str):
        self.bundled, self.name, self.path = bundled, name, OUT / f"{name}.json"
        _, steps, scale = name.split("-")
        self.steps, self.scale = int(steps), float(scale)
        bundled.set_up(name)
        self.rows = json.loads(self.path.read_text()) if self.path.is_file() else []

    @cached_property
    def fidelity(self) -> Fidelity:
        texts = prompts(samples.HELDOUT_PROMPTS)[8:]
        call = {"num_inference_steps": self.steps, "guidance_scale": self.scale}
        return Fidelity(self.bundled.pipe, texts, (SEED,), **call)

    def measure(self, what: str, nfe: int, policy: Policy, **changed: int) -> None:
        if any((row["what"], row["budget"]) == (what, nfe) for row in self.rows):
            return
        score = self.fidelity(policy, **changed)
        self.rows.append({"what": what, "budget": nfe, "nfe": score.nfe, "psnr": score.psnr, "ssim": score.ssim})
        write(self.path, json.dumps(self.rows, indent=1).encode())
        print(f"{self.name} {nfe} {what}: {score.psnr:.2f} dB", flush=True)

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
        path = OUT / f"{name}.json"
        rows = {(row["what"], row["budget"]): row for row in json.loads(path.read_text())} if path.is_file() else {}
        scheduler, steps, scale = name.split("-")
        for nfe in BUDGETS[int(steps)]:
            if found := rows.get(("Forecast", nfe)):
                others = [rows.get((what, nfe)) for what in ("CFG in fewer steps", "Hold")]
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
